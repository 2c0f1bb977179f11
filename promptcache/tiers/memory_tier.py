"""The hot tier: what this process has read lately, in memory.

Prefixes form a tree here, too. Its trunks are whole caches: a generation takes one,
writes on behind the rows that it shares, and puts it back longer. Where prompts part,
the smaller side is copied: rows that would be overwritten become a branch, or the
shared ones a cache of their own. So a prompt that goes on where another one stopped
costs no copy, and one that shares a long system prompt costs that of the few rows
after it.

A server's batches copy what they are given, so that a prefix can stay here while they
use it: they `share` it, and `add` what is new, which becomes a branch.

Rows of `KVCache` are shared at any token. A cache with parts of other classes is taken
as a whole, by prompts that continue all it has read.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

from promptcache.kvcache.classes import (
    Rows,
    copied_cache,
    copied_rows,
    has_only_rows,
    parts_of,
    row_parts,
    shared_rows,
    trim,
)
from promptcache.segments.chain import TOKEN_NBYTES, common_length, pack

# Of how many pieces a prefix is put together before they become one.
MAX_PIECES = 8


@dataclass(eq=False, slots=True)
class _CacheEntry:
    """A whole cache.

    Attributes:
        fingerprint: What its values depend on.
        data: The packed token ids that it has read.
        cache: One mlx-lm cache object a layer.
        nbytes: The size of its arrays.
    """

    fingerprint: str
    data: bytes
    cache: list[Any]
    nbytes: int

    @property
    def num_tokens(self) -> int:
        return len(self.data) // TOKEN_NBYTES

    @property
    def is_sliceable(self) -> bool:
        """Return whether a run can take over at any token of it."""
        return has_only_rows(self.cache)


@dataclass(eq=False, slots=True)
class _SuffixEntry:
    """Rows that hang on a prefix which lies in some trunk and other branches.

    Attributes:
        fingerprint: What its values depend on.
        data: The packed token ids, from the first token on.
        start: The first of its rows.
        rows: For each part of the cache its keys and values, shape
            `(1, kv_heads, tokens, head_dim)`.
        nbytes: The size of these.
    """

    fingerprint: str
    data: bytes
    start: int
    rows: Rows
    nbytes: int

    @property
    def num_tokens(self) -> int:
        return len(self.data) // TOKEN_NBYTES


class _Piece(NamedTuple):
    """The rows up to `stop` of an entry, which others come before."""

    entry: _CacheEntry | _SuffixEntry
    stop: int


class MemoryPrefix(NamedTuple):
    """What the tier has of a prompt.

    Attributes:
        num_tokens: How many tokens of it.
        is_sliceable: Whether its rows can be read one by one.
    """

    num_tokens: int
    is_sliceable: bool
    pieces: tuple[_Piece, ...] = ()


class MemoryTier:
    """Caches of recent prompts, the least recently used of which go first.

    Invariants:
        All arrays that it holds fit into `max_nbytes`.
        Nobody else writes to an array that it holds.

    Attributes:
        max_nbytes: How many bytes it holds at most.
        num_evicted: How many entries had to go for that.
    """

    def __init__(self, max_nbytes: int) -> None:
        """Take how many bytes to hold, 0 to hold nothing."""
        self.max_nbytes = max_nbytes
        self.num_evicted = 0
        self._entries: list[_CacheEntry | _SuffixEntry] = []
        self._lock = threading.RLock()

    @property
    def nbytes(self) -> int:
        """Return the size of what it holds."""
        return sum(entry.nbytes for entry in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()

    # Finding and taking

    def find(
        self,
        fingerprint: str,
        token_ids: Sequence[int],
        last_resume_point: Callable[[int], int],
    ) -> MemoryPrefix | None:
        """Return the longest prefix of a prompt that a run can take over from.

        It leaves at least one token to read.

        Args:
            fingerprint: What its values depend on.
            token_ids: The prompt.
            last_resume_point: Returns the last position up to a given one at which
                prompts may take over.
        """
        data = pack(token_ids)
        with self._lock:
            branches = self._branches(fingerprint, data)
            found = (
                self._prefix(trunk, branches, data, last_resume_point)
                for trunk in self._entries
                if isinstance(trunk, _CacheEntry) and trunk.fingerprint == fingerprint
            )
            best = max(found, key=lambda prefix: prefix.num_tokens, default=None)
        return best if best and best.num_tokens else None

    def _branches(self, fingerprint: str, data: bytes) -> list[_Piece]:
        """Return all branches with how far they agree with a prompt."""
        return [
            _Piece(entry, common_length(entry.data, data))
            for entry in self._entries
            if isinstance(entry, _SuffixEntry) and entry.fingerprint == fingerprint
        ]

    def _prefix(
        self,
        trunk: _CacheEntry,
        branches: Sequence[_Piece],
        data: bytes,
        last_resume_point: Callable[[int], int],
    ) -> MemoryPrefix:
        """Return what a trunk has of a prompt, with the branches that go on from it."""
        last = len(data) // TOKEN_NBYTES - 1
        covered = min(common_length(trunk.data, data), last)
        if not trunk.is_sliceable:
            is_whole = covered == trunk.num_tokens == last_resume_point(covered)
            return MemoryPrefix(
                covered if is_whole else 0, False, (_Piece(trunk, covered),)
            )
        pieces = [_Piece(trunk, covered)]
        while longer := _longest_branch(branches, covered, last):
            pieces.append(longer)
            covered = longer.stop
        return MemoryPrefix(last_resume_point(covered), True, tuple(pieces))

    def take(self, found: MemoryPrefix) -> list[Any] | None:
        """Return a cache that holds a prefix which was just found; it is the caller's.

        None if another thread has taken it meanwhile. A generation that is done with it
        puts it back.
        """
        with self._lock:
            (trunk, stop), *branches = found.pieces
            if any(piece.entry not in self._entries for piece in found.pieces):
                return None
            assert isinstance(trunk, _CacheEntry)
            covered = min(stop, found.num_tokens)
            cache = self._taken(trunk, covered)
            for branch, stop in branches:
                assert isinstance(branch, _SuffixEntry)
                stop = min(stop, found.num_tokens)
                if stop > covered:
                    _append(cache, branch, covered, stop)
                    self._use(branch)
                    covered = stop
                if covered == branch.num_tokens:
                    self._entries.remove(branch)
            self._hold_limit()
            return cache

    def _taken(self, trunk: _CacheEntry, num_tokens: int) -> list[Any]:
        """Return a cache with the first tokens of a trunk; the rest of it stays."""
        num_left = trunk.num_tokens - num_tokens
        if num_left > num_tokens:
            self._use(trunk)
            return copied_cache(trunk.cache, num_tokens)
        self._entries.remove(trunk)
        if num_left:
            rows = copied_rows(trunk.cache, num_tokens, trunk.num_tokens)
            nbytes = sum(array.nbytes for arrays in rows.values() for array in arrays)
            self._entries.append(
                _SuffixEntry(trunk.fingerprint, trunk.data, num_tokens, rows, nbytes)
            )
            trim(trunk.cache, num_tokens)
        return trunk.cache

    def share(self, found: MemoryPrefix) -> list[Any] | None:
        """Return a cache with a prefix that was just found, which stays here, too.

        Its arrays are objects of its own, and it has no room: what is written to it is
        written to copies. None if another thread has taken it meanwhile.
        """
        with self._lock:
            (trunk, stop), *branches = found.pieces
            if any(piece.entry not in self._entries for piece in found.pieces):
                return None
            assert isinstance(trunk, _CacheEntry)
            covered = min(stop, found.num_tokens)
            if not trunk.is_sliceable:
                self._use(trunk)
                return deepcopy(trunk.cache)
            cache = shared_rows(trunk.cache, covered)
            for branch, stop in branches:
                assert isinstance(branch, _SuffixEntry)
                stop = min(stop, found.num_tokens)
                if stop > covered:
                    _append(cache, branch, covered, stop)
                    self._use(branch)
                    covered = stop
            # Last, so that it outlives what is of no use without it.
            self._use(trunk)
            return cache

    def _use(self, entry: _CacheEntry | _SuffixEntry) -> None:
        """Make an entry the last to go."""
        self._entries.remove(entry)
        self._entries.append(entry)

    # Putting back

    def put(
        self,
        fingerprint: str,
        token_ids: Sequence[int],
        cache: list[Any],
        *,
        good_to: int | None = None,
    ) -> None:
        """Keep a cache, of which the caller keeps nothing.

        Args:
            fingerprint: What its values depend on.
            token_ids: What it has read.
            cache: One mlx-lm cache object a layer.
            good_to: How many of these other prompts may share, all if None.
        """
        num_good = len(token_ids) if good_to is None else good_to
        if has_only_rows(cache):
            trim(cache, num_good)
        elif num_good < len(token_ids):
            return
        if not num_good:
            return
        if any(part.offset != num_good for part in row_parts(cache)):
            return
        try:
            nbytes = sum(layer.nbytes for layer in cache)
        except (AttributeError, NotImplementedError):
            # A class of the model's own, whose size nobody knows.
            return
        new = _CacheEntry(fingerprint, pack(token_ids[:num_good]), cache, nbytes)
        with self._lock:
            known = [*self._alike(new)]
            for entry in known:
                if entry.num_tokens > new.num_tokens:
                    self._use(entry)
                    return
            for entry in known:
                self._entries.remove(entry)
            self._entries.append(new)
            self._hold_limit()

    def add(self, fingerprint: str, token_ids: Sequence[int], cache: list[Any]) -> None:
        """Keep what a cache has read, but only rows of it that are not here yet.

        Args:
            fingerprint: What its values depend on.
            token_ids: What it has read.
            cache: One mlx-lm cache object a layer, of which the caller keeps nothing.
        """
        if not has_only_rows(cache):
            return self.put(fingerprint, token_ids, cache)
        with self._lock:
            # One more, as a prefix leaves one to read.
            found = self.find(fingerprint, [*token_ids, 0], lambda end: end)
            if found is None or len(found.pieces) >= MAX_PIECES:
                data = pack(token_ids)
                self._forget_prefixes(fingerprint, data)
                return self.put(fingerprint, token_ids, cache)
            for entry, _ in reversed(found.pieces):
                self._use(entry)
            if found.num_tokens == len(token_ids):
                return
            rows = copied_rows(cache, found.num_tokens, len(token_ids))
            nbytes = sum(array.nbytes for arrays in rows.values() for array in arrays)
            branch = _SuffixEntry(
                fingerprint, pack(token_ids), found.num_tokens, rows, nbytes
            )
            # Before its trunk, which is to outlive it.
            self._entries.insert(len(self._entries) - 1, branch)
            self._hold_limit()

    def _forget_prefixes(self, fingerprint: str, data: bytes) -> None:
        """Remove the branches that a longer trunk makes superfluous."""
        self._entries = [
            entry
            for entry in self._entries
            if isinstance(entry, _CacheEntry)
            or entry.fingerprint != fingerprint
            or not data.startswith(entry.data)
        ]

    def hold(self, max_nbytes: int) -> None:
        """Set how many bytes to hold, and give up what is more."""
        with self._lock:
            self.max_nbytes = max_nbytes
            self._hold_limit()

    def _alike(self, new: _CacheEntry) -> Iterator[_CacheEntry]:
        """Yield the trunks that are good for all that a new one is, or the reverse."""
        for entry in self._entries:
            if isinstance(entry, _CacheEntry) and entry.fingerprint == new.fingerprint:
                shared = common_length(entry.data, new.data)
                lengths = (entry.num_tokens, new.num_tokens)
                longer = entry if entry.num_tokens > new.num_tokens else new
                if shared == min(lengths) and (
                    longer.is_sliceable or len({*lengths}) == 1
                ):
                    yield entry

    def _hold_limit(self) -> None:
        while self._entries and self.nbytes > self.max_nbytes:
            self._entries.pop(0)
            self.num_evicted += 1


def _longest_branch(
    branches: Sequence[_Piece], covered: int, last: int
) -> _Piece | None:
    """Return the branch that reaches furthest beyond what is covered, if any."""
    pieces = (
        _Piece(entry, min(stop, last))
        for entry, stop in branches
        if isinstance(entry, _SuffixEntry) and entry.start <= covered
    )
    best = max(pieces, key=lambda piece: piece.stop, default=None)
    return best if best and best.stop > covered else None


def _append(cache: Sequence[Any], branch: _SuffixEntry, start: int, stop: int) -> None:
    """Add the rows `[start, stop)` of a branch to a cache that holds those before."""
    for name, part in parts_of(cache):
        if not part.empty():
            span = slice(start - branch.start, stop - branch.start)
            part.update_and_fetch(*(array[..., span, :] for array in branch.rows[name]))
