"""API keys: who may use a server, and which namespace is whose."""

import hashlib
import hmac
from collections.abc import Collection

# Whether these are this machine's own; anything else can be reached from outside.
LOOPBACK_NAMES = ("localhost", "::1")


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
    return host in LOOPBACK_NAMES or host.startswith("127.")
