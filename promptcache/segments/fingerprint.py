"""Fingerprints: everything besides the token ids that KV values depend on.

A fingerprint changes only when the values could: paths, file times, names and unrelated
releases of mlx-lm do not matter. Its parts come from `models`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import xxhash


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The hash of named parts.

    Attributes:
        digest: 32 hex digits over `parts`, the first parent of every chain hash.
        model: The model's name for people; not part of the digest.
        source: The folder or hub repository that the model was loaded from, or None.
        exact: If rows are stored in fewer bits, the fingerprint of the same rows
            without loss, which are reused as well.
    """

    digest: str
    model: str
    source: str | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    exact: "Fingerprint | None" = field(default=None, compare=False)

    @property
    def namespace(self) -> str:
        """Return its namespace, empty for the default one."""
        return str(self.parts.get("namespace", ""))

    @property
    def reusable(self) -> "tuple[Fingerprint, ...]":
        """Return the fingerprints whose rows are reused, the best first."""
        alone = self if self.exact is None else replace(self, exact=None)
        return (alone,) if self.exact is None else (self.exact, alone)


# Incremented when segments are computed or stored in a way that makes older ones
# unusable.
STATE_VERSION = "3"


def make_fingerprint(
    parts: Mapping[str, str],
    *,
    model: str,
    source: str | None = None,
    exact: Fingerprint | None = None,
) -> Fingerprint:
    """Return the fingerprint over named parts."""
    complete = {"state_version": STATE_VERSION, **parts}
    return Fingerprint(hash_json(complete), model, source, complete, exact)


def hash_json(value: object) -> str:
    """Return the XXH3-128 of a value's canonical JSON, in hex."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return xxhash.xxh3_128_hexdigest(canonical.encode())
