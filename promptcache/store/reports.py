"""Reports: what a store shows people, under which names, and what it plans."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from promptcache.errors import UsageError
from promptcache.segments.fingerprint import Fingerprint
from promptcache.units import format_size, iso_time

# Longer ones fill what lists them.
MAX_NAME_LENGTH = 128


def check_name(name: str) -> None:
    """Raise UsageError if this cannot name a prefix."""
    if len(name) > MAX_NAME_LENGTH:
        raise UsageError(
            f"{name[:20]!r}… is too long for a name, use up to {MAX_NAME_LENGTH} "
            "characters"
        )
    if not name.strip() or not name.isprintable():
        raise UsageError(f"{name!r} cannot be a name, use printable characters")


def full_name(namespace: str, name: str | None) -> str | None:
    """Return what a name in a namespace is in the whole store: `namespace/name`.

    In the default namespace that is the name itself.
    """
    return f"{namespace}/{name}" if namespace and name is not None else name


class PinQuota(NamedTuple):
    """How much may be pinned in one namespace.

    Attributes:
        num_pins: How many names.
        nbytes: How many bytes they keep, those of ancestors included.
    """

    num_pins: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prefix that was built or saved, as `ls` shows it; times are Unix times.

    Attributes:
        key: Chain hash at its end, in hex.
        name: Its pin, or None.
        nbytes: What removing it would free.
        used_at: The last hit.
        hits: How often it was reused.
        namespace: Where its name is valid, empty for the default one.
    """

    key: str
    name: str | None
    model: str
    num_tokens: int
    nbytes: int
    created_at: float
    used_at: float
    hits: int
    namespace: str = ""

    @property
    def pinned(self) -> bool:
        """Return whether eviction keeps it."""
        return self.name is not None

    @property
    def full_name(self) -> str | None:
        """Return its name as one that means nothing else in the whole store."""
        return full_name(self.namespace, self.name)

    def to_json(self) -> dict[str, Any]:
        """Return it as commands print it, and servers answer it."""
        return {
            "key": self.key,
            "name": self.name,
            "model": self.model,
            "num_tokens": self.num_tokens,
            "nbytes": self.nbytes,
            "created_at": iso_time(self.created_at),
            "used_at": iso_time(self.used_at),
            "hits": self.hits,
            "pinned": self.pinned,
            "namespace": self.namespace,
        }


@dataclass(frozen=True, slots=True)
class Usage:
    """What requests got from one prefix, or, without a key, from none.

    Attributes:
        key: The prefix that was reused, or None for misses.
        name: Its pin, or None.
        requests: How many there were.
        cached_tokens: Tokens of their prompts that were reused.
        prefilled_tokens: Tokens of their prompts that were processed.
        load_seconds: Time that matching and loading took.
        prefill_seconds: Time that processing the others took.
        saved_seconds: Time that processing the reused ones would have taken.
    """

    model: str
    key: str | None
    name: str | None
    requests: int
    cached_tokens: int
    prefilled_tokens: int
    load_seconds: float
    prefill_seconds: float
    saved_seconds: float
    namespace: str = ""

    @property
    def full_name(self) -> str | None:
        """Return its name as one that means nothing else in the whole store."""
        return full_name(self.namespace, self.name)


class Written(NamedTuple):
    """How many bytes of blobs were written; days are those of UTC."""

    total_nbytes: int
    today_nbytes: int


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """One segment of a prefix, as `show` lists it."""

    key: str
    start: int
    end: int
    nbytes: int
    layers: str


@dataclass(frozen=True, slots=True)
class PrefixReport:
    """One prefix with all that is known of it; `token_ids` is the whole prefix."""

    prefix: Prefix
    fingerprint: Fingerprint
    segments: tuple[SegmentReport, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrunePolicy:
    """What `prune` may take away.

    Attributes:
        max_nbytes: Evict until all files of the store fit into this.
        older_than: Evict what was not used for this many seconds.
        model: Evict everything of this model.
    """

    max_nbytes: int | None = None
    older_than: float | None = None
    model: str | None = None


class Removal(NamedTuple):
    """A segment to evict, and why.

    `cut_at` is where it ends from then on, because others need what is before;
    None if all of it goes.
    """

    key: str
    reason: str
    nbytes: int
    cut_at: int | None = None


class Garbage(NamedTuple):
    """A file that nothing refers to; `path` is relative to the store."""

    path: str
    nbytes: int


class ForeignFile(NamedTuple):
    """A file that no promptcache put there; `path` is relative to the store."""

    path: str
    nbytes: int


def describe_foreign(files: Sequence[ForeignFile]) -> str:
    """Return how much files take that are not promptcache's, and what to do."""
    size = format_size(sum(file.nbytes for file in files))
    more = f" and {len(files) - 1} more" if files[1:] else ""
    return (
        f"{size} of the store are files that are not promptcache's, "
        f"{files[0].path}{more}, move them somewhere else"
    )


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """What a prune would do; executing it is a second step.

    Attributes:
        removals: Segments to evict, leaves first.
        garbage: Files to sweep.
        foreign: Files that stay, since no promptcache put them there.
        total_nbytes: Size of all files of the store before.
        over_nbytes: By how much the limit would still be exceeded.
    """

    removals: tuple[Removal, ...]
    garbage: tuple[Garbage, ...]
    total_nbytes: int
    over_nbytes: int = 0
    foreign: tuple[ForeignFile, ...] = ()


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a prune did, measured."""

    removals: tuple[Removal, ...]
    garbage: tuple[Garbage, ...]
    freed_nbytes: int
    kept_nbytes: int


class Damage(NamedTuple):
    """A blob that cannot be used, and what is wrong with it."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        checked: Blobs read in full.
        damaged: Blobs that do not hold what was written.
        quarantined: Keys of blobs set aside earlier, until prune sweeps them.
        orphans: Sound blobs that the index did not know.
        missing: Keys of segments of the index whose blob is gone.
        rebuilt: Segments that were added to the index from their blobs.
        foreign: Files that no promptcache put there.
        fixed: Whether what was damaged or missing has been taken out.
    """

    checked: int
    damaged: tuple[Damage, ...]
    quarantined: tuple[str, ...]
    orphans: int
    missing: tuple[str, ...]
    rebuilt: int
    fixed: bool
    foreign: tuple[ForeignFile, ...] = ()

    @property
    def is_sound(self) -> bool:
        """Return whether everything the index lists can be used now."""
        return self.fixed or not (self.damaged or self.missing)
