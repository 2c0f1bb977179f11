"""API keys: who may use a server, and which namespace is whose."""

import hashlib
import hmac
import ipaddress
from collections.abc import Collection

# A name that is always this machine's own.
LOOPBACK_NAMES = ("localhost",)


class ApiKeys:
    """The keys of a server, which may have none."""

    def __init__(self, keys: Collection[str] = ()) -> None:
        """Take the keys."""
        self._namespace_by_key = {key.encode(): _namespace(key) for key in keys}

    def __len__(self) -> int:
        return len(self._namespace_by_key)

    def namespace(self, authorization: str | None) -> str | None:
        """Return the namespace that an `Authorization` header opens, or None.

        Without keys that is the one that everything else uses, too. The time it takes
        does not depend on how much of a key is right.
        """
        if not self._namespace_by_key:
            return ""
        scheme, _, given = (authorization or "").partition(" ")
        presented = given.strip().encode("utf-8", "replace")
        found = None
        for key, namespace in self._namespace_by_key.items():
            if hmac.compare_digest(key, presented) and scheme.lower() == "bearer":
                found = namespace
        return found


def _namespace(key: str) -> str:
    """Return a namespace that does not tell the key, as it is stored."""
    return "api-key-" + hashlib.sha256(b"promptcache" + key.encode()).hexdigest()[:32]


def is_loopback(host: str) -> bool:
    """Return whether a host can be reached from this machine only."""
    if host in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
