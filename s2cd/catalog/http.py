"""HTTP as catalogues and files are asked for: retries that wait as servers ask, and the environment's proxies."""

from __future__ import annotations

from typing import Any

import urllib3
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies, prepend_scheme_if_needed, select_proxy

RETRIED_STATUS = (429, 500, 502, 503, 504)
LONGEST_WAIT = 60.0
BACKOFF = 0.3


class Retry(urllib3.Retry):
    """Retries that wait as long as a server asks for, but never longer than a minute."""

    def get_retry_after(self, response: urllib3.BaseHTTPResponse) -> float | None:
        """Return seconds to wait, as the answer states them."""
        asked = super().get_retry_after(response)
        return None if asked is None else min(asked, LONGEST_WAIT)


def retry_policy() -> Retry:
    """Retries for catalogue requests: every method, so POST too, honouring Retry-After, with back-off."""
    return Retry(
        total=6,
        connect=3,
        backoff_factor=BACKOFF,
        backoff_max=20,
        backoff_jitter=0.2,
        status_forcelist=RETRIED_STATUS,
        allowed_methods=None,
        respect_retry_after_header=True,
        raise_on_status=False,
    )


class Http:
    """Connections that are kept, up to `connections` a server; any thread may ask.

    Proxies are those that HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY name, which urllib3 does not look at by
    itself: found as requests, and so a search, finds them.
    """

    def __init__(self, connections: int, retries: Retry, timeout: urllib3.Timeout):
        self._adapter = HTTPAdapter(pool_maxsize=connections)
        self._retries, self._timeout = retries, timeout

    def request(self, method: str, url: str, **options: Any) -> urllib3.BaseHTTPResponse:
        """Ask for `url`, as `urllib3.PoolManager.request` does. Raises HTTPError where there is no answer."""
        proxy = select_proxy(url, get_environ_proxies(url))
        pools = self._adapter.poolmanager
        if proxy:
            pools = self._adapter.proxy_manager_for(prepend_scheme_if_needed(proxy, "http"))
        return pools.request(method, url, retries=self._retries, timeout=self._timeout, **options)
