"""API keys and the namespace of each."""

import hashlib
import hmac
import ipaddress
from collections.abc import Collection

# A name that is always this machine's own.
LOOPBACK_NAMES = ("localhost",)


class ApiKeys:
    """The keys of a server, which may have none.

    Args:
        keys: The API keys.
        secret: What namespaces are derived with.
        metrics_key: The key that opens the metrics.
    """

    def __init__(
        self,
        keys: Collection[str] = (),
        *,
        secret: bytes = b"",
        metrics_key: str | None = None,
    ) -> None:
        self._namespace_by_key = {key.encode(): _namespace(key, secret) for key in keys}
        self._metrics_key = metrics_key

    def __len__(self) -> int:
        return len(self._namespace_by_key)

    def namespace(self, authorization: str | None) -> str | None:
        """Return the namespace that an `Authorization` header opens, or None.

        Without keys that is the one that everything else uses, too. The time it takes
        does not depend on how much of a key is right.
        """
        if not self._namespace_by_key:
            return ""
        presented = _presented(authorization)
        match = None
        for key, namespace in self._namespace_by_key.items():
            # An empty key would be one for those without any.
            if hmac.compare_digest(key, presented) and presented:
                match = namespace
        return match

    def opens_metrics(self, authorization: str | None) -> bool:
        """Return whether an `Authorization` header opens the metrics.

        They are about all keys together, so that a key of one does not.
        """
        if self._metrics_key is None:
            return not self._namespace_by_key
        presented = _presented(authorization)
        return hmac.compare_digest(self._metrics_key.encode(), presented)


def _presented(authorization: str | None) -> bytes:
    """Return the key in an `Authorization` header, empty without one."""
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer":
        return b""
    return key.strip().encode("utf-8", "replace")


def _namespace(key: str, secret: bytes) -> str:
    """Return the namespace of a key, which is stored and does not reveal the key.

    Without the secret, nobody can try keys that are likely.
    """
    digest = hmac.digest(secret, key.encode(), hashlib.sha256)
    return f"api-key-{digest.hex()[:32]}"


def is_loopback(host: str) -> bool:
    """Return whether a host can be reached from this machine only."""
    if host in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
