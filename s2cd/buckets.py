"""What clients of object stores are made of: the same for the scenes that are read and the maps that are written."""

from __future__ import annotations

import hashlib
import os

# Who names a server by http:// wants it read and written so.
ALLOW_HTTP = True
# What obstore takes from the environment: keys, regions and servers of S3, Azure and Google.
_PREFIXES = ("AWS_", "AZURE_", "GOOGLE_")


def s3_endpoint() -> dict[str, str]:
    """Return the options of obstore's S3Store that name the server, none for Amazon's.

    It comes from the environment, in the words of the AWS SDKs (AWS_ENDPOINT_URL) or in GDAL's (AWS_S3_ENDPOINT, with
    AWS_HTTPS=NO for http).
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_S3_ENDPOINT")
    if not endpoint:
        return {}
    scheme = "http" if os.environ.get("AWS_HTTPS", "YES").upper() in {"NO", "FALSE"} else "https"
    return {"endpoint": endpoint if "://" in endpoint else f"{scheme}://{endpoint}"}


def environment_digest() -> str:
    """Return a digest that changes when keys are renewed: clients that are kept belong to one, and tell no key."""
    found = sorted((name, value) for name, value in os.environ.items() if name.startswith(_PREFIXES))
    return hashlib.sha256(repr(found).encode()).hexdigest()
