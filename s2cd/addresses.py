"""Addresses of catalogues and files: which of them are paths of this machine, and what of them may be told."""

from __future__ import annotations

import os
import re
from base64 import b64encode
from urllib.parse import unquote, urlsplit

# An address within a text, with what may be secret: the user before @, and the query. urllib3 says "url: /path?query".
# Quotes may be part of both: the one around an address is the last before a blank.
_END = r"(?=['\"]?[:;,.)\]}]*(?:\s|$))"
_ADDRESS = re.compile(rf"(://|url: /)(?:[^\s/]*@)?([^\s?#'\"]*)(?:[?#]\S*?{_END})?")


def local_path(href: str) -> str:
    """Return the path that a file:// address names, or one below ~, a home; any other href as it is."""
    return unquote(urlsplit(href).path) if href.startswith("file://") else os.path.expanduser(href)


def public_href(href: str) -> str:
    """Return an href without what may be secret: user, password, query string and fragment."""
    scheme, mark, rest = href.partition("://")
    if not mark:
        return href
    host, slash, path = rest.partition("/")
    return scheme + mark + re.split("[?#]", host.rpartition("@")[2] + slash + path, maxsplit=1)[0]


def login_headers(url: str) -> dict[str, str]:
    """Return the HTTP header that states user and password of a URL, none without a user.

    urllib3 does not read them from a URL. It leaves the header out where a redirect leads to another server.
    """
    parts = urlsplit(url)
    if parts.username is None:
        return {}
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": f"Basic {b64encode(login.encode()).decode()}"}


def with_login(href: str, base: str) -> str:
    """Return an href with the user and password of `base` where it leads to the same server and states none."""
    try:
        parts, known = urlsplit(href), urlsplit(base)
    except ValueError:  # no address at all
        return href
    same = (parts.scheme, parts.netloc) == (known.scheme, known.netloc.rpartition("@")[2])
    return parts._replace(netloc=known.netloc).geturl() if same and known.username is not None else href


def without_secrets(text: str) -> str:
    """Return a text with the addresses in it as `public_href` has them."""
    return _ADDRESS.sub(r"\1\2", text)
