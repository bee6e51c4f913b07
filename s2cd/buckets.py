"""What clients of object stores are made of: the same for the scenes that are read and the maps that are written.

S2CD_SOURCE_ENDPOINT_URL, S2CD_SOURCE_ACCESS_KEY_ID and S2CD_SOURCE_SECRET_ACCESS_KEY are of the scenes alone, and go
before AWS_*.
"""

from __future__ import annotations

import hashlib
import os
import re
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from obstore.store import ObjectStore, from_url

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Config, S3Credential

# What obstore takes from the environment: keys, regions and servers of S3, Azure and Google.
_PREFIXES = {
    **dict.fromkeys(("s3", "s3a"), "AWS_"),
    **dict.fromkeys(("az", "azure", "abfs", "abfss"), "AZURE_"),
    "gs": "GOOGLE_",
}
_SOURCE = "S2CD_SOURCE_"
SOURCE_KEYS = (f"{_SOURCE}ACCESS_KEY_ID", f"{_SOURCE}SECRET_ACCESS_KEY")
# What it takes from there of connections, unless it is told anything of them.
_CONNECTION = (
    "allow_invalid_certificates",
    "connect_timeout",
    "proxy_ca_certificate",
    "proxy_excludes",
    "proxy_url",
    "timeout",
    "user_agent",
)

UPLOAD_TIMEOUT = "600s"  # of each piece of 5 MB: many maps may share a thin link


def s3_endpoint() -> dict[str, str]:
    """Return the options of obstore's S3Store that name the server, none for Amazon's.

    It comes from the environment, in the words of the AWS SDKs (AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL) or in GDAL's
    (AWS_S3_ENDPOINT, with AWS_HTTPS=NO for http).
    """
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_S3_ENDPOINT")
    endpoint = next(filter(None, map(os.environ.get, names)), None)
    return _endpoint(endpoint, "http" if os.environ.get("AWS_HTTPS", "YES").upper() in {"NO", "FALSE"} else "https")


def source_endpoint() -> dict[str, str]:
    """Return the options of obstore's S3Store that name the server of scenes alone, none where maps have the same."""
    return _endpoint(os.environ.get(f"{_SOURCE}ENDPOINT_URL"), "https")


def source_keys() -> S3Credential | None:
    """Return the keys of scenes alone, None if the environment does not have both."""
    key, secret = map(os.environ.get, SOURCE_KEYS)
    if not key or not secret:
        return None
    return {"access_key_id": key, "secret_access_key": secret, "token": None, "expires_at": None}


def _endpoint(endpoint: str | None, scheme: str) -> dict[str, str]:
    if not endpoint:
        return {}
    return {"endpoint": endpoint if "://" in endpoint else f"{scheme}://{endpoint}"}


def client_options(scheme: str, **usual: str) -> ClientConfig:
    """Return what obstore is told of connections to the store of a URL's `scheme`.

    The environment goes before what is `usual`. A server that is named by http:// is read and written so.
    """
    prefix = _PREFIXES.get(scheme, "")
    stated = {name: os.environ.get(f"{prefix}{name.upper()}") for name in _CONNECTION} if prefix else {}
    known = {name: value for name, value in stated.items() if value is not None}
    return cast("ClientConfig", {"allow_http": True, **usual, **known})


def open_bucket(url: str) -> ObjectStore:
    """Return the store of what lies below a URL such as s3://bucket/prefix; keys come from the environment.

    Raises obstore's errors, and ValueError, for a URL of an unknown kind.
    """
    scheme = urlsplit(url).scheme
    config = cast("S3Config", s3_endpoint()) if scheme in {"s3", "s3a"} else None
    return from_url(url, config=config, client_options=client_options(scheme, timeout=UPLOAD_TIMEOUT))


def reason_of(error: Exception) -> str:
    """Return what went wrong in one line, without the page of internals that obstore appends."""
    text = str(error)
    answer = re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", text, re.DOTALL)  # what a bucket says
    if answer:
        return f"{answer[1]}: {answer[2]}"
    if "//169.254." in text:  # where machines of a cloud ask for keys, which obstore does if it has none
        return "found no credentials, expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
    return re.sub(r"^Generic \w+ error: ", "", text.split("\n", 1)[0].strip())


def environment_digest() -> str:
    """Return a digest that changes when keys are renewed: clients that are kept belong to one, and tell no key."""
    prefixes = (*_PREFIXES.values(), _SOURCE)
    found = sorted((name, os.environ.get(name)) for name in os.environ if name.startswith(prefixes))
    return hashlib.sha256(repr(found).encode()).hexdigest()
