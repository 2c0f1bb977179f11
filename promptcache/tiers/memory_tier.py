"""The tier in memory: what this process has read lately.

Prefixes form a tree here, too. Its roots are whole caches: a generation pops one,
writes on behind the rows that it shares, and inserts it again when it is longer. Where
prompts part, the smaller side is copied: rows that would be overwritten become a
suffix, or the shared ones a cache of their own. So a prompt that continues another one
costs no copy, and one that shares a long system prompt costs that of the few rows
after it.

A server's batches copy what they are given, so that a prefix can stay here while they
use it: they `view` it, and `insert_shared` what is new, which becomes a suffix.

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
    shared_rows,
    trim,
)
from promptcache.kvcache.state import positions_of
from promptcache.segments.chain import TOKEN_NBYTES, common_length, pack

# A prefix of more pieces than this is merged into one.
MAX_PIECES = 8


@dataclass(eq=False, slots=True)
class _Entry:
    """What has been read.

    Attributes:
        fingerprint: What its values depend on.
        data: The packed token ids, from the first one on.
        nbytes: The size of its arrays.
    """

    fingerprint: str
    data: bytes
    nbytes: int

    @property
    def num_tokens(self) -> int:
        return len(self.data) // TOKEN_NBYTES


@dataclass(eq=False, slots=True)
class _CacheEntry(_Entry):
    """A whole cache: one mlx-lm cache object a layer."""

    cache: list[Any]

    @property
    def is_sliceable(self) -> bool:
        """Return whether a run can resume at any token of it."""
        return has_only_rows(self.cache)


@dataclass(eq=False, slots=True)
class _SuffixEntry(_Entry):
    """Rows that continue a prefix, which lies in a cache and other suffixes.

    Attributes:
        start: The first of its rows.
        rows: For each part of the cache its keys and values, shape
            `(1, kv_heads, tokens, head_dim)`.
    """

    start: int
    rows: Rows


class _Piece(NamedTuple):
    """The rows up to `stop` of an entry, which others come before."""

    entry: _Entry
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
        self.max_nbytes = max_nbytes
        self.num_evicted = 0
        self._entries: list[_Entry] = []
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
            suffixes = self._suffixes(fingerprint, data)
            prefixes = (
                self._prefix(root, suffixes, data, last_resume_point)
                for root in self._entries
                if isinstance(root, _CacheEntry) and root.fingerprint == fingerprint
            )
            best = max(prefixes, key=lambda prefix: prefix.num_tokens, default=None)
        return best if best and best.num_tokens else None

    def _suffixes(self, fingerprint: str, data: bytes) -> list[_Piece]:
        """Return all suffixes with how far they agree with a prompt."""
        return [
            _Piece(entry, common_length(entry.data, data))
            for entry in self._entries
            if isinstance(entry, _SuffixEntry) and entry.fingerprint == fingerprint
        ]

    def _prefix(
        self,
        root: _CacheEntry,
        suffixes: Sequence[_Piece],
        data: bytes,
        last_resume_point: Callable[[int], int],
    ) -> MemoryPrefix:
        """Return what a root has of a prompt, with the suffixes that go on from it."""
        last = len(data) // TOKEN_NBYTES - 1
        covered = min(common_length(root.data, data), last)
        if not root.is_sliceable:
            is_whole = covered == root.num_tokens == last_resume_point(covered)
            return MemoryPrefix(
                covered if is_whole else 0, False, (_Piece(root, covered),)
            )
        pieces = [_Piece(root, covered)]
        while longer := _longest_suffix(suffixes, covered, last):
            pieces.append(longer)
            covered = longer.stop
        return MemoryPrefix(last_resume_point(covered), True, tuple(pieces))

    def pop(self, prefix: MemoryPrefix) -> list[Any] | None:
        """Return a cache with a prefix that was just found; it is the caller's.

        None if another thread has popped it meanwhile. A generation that is done with
        it inserts it again.
        """
        with self._lock:
            if not self._holds(prefix):
                return None
            entry, stop = prefix.pieces[0]
            assert isinstance(entry, _CacheEntry)
            covered = min(stop, prefix.num_tokens)
            cache = self._popped(entry, covered)
            for suffix, stop in self._append_suffixes(cache, prefix, covered):
                if stop == suffix.num_tokens:
                    self._entries.remove(suffix)
            self._hold_limit()
            return cache

    def _popped(self, entry: _CacheEntry, num_tokens: int) -> list[Any]:
        """Return a cache with the first tokens of an entry; the rest of it stays."""
        num_left = entry.num_tokens - num_tokens
        if num_left > num_tokens:
            self._use(entry)
            return copied_cache(entry.cache, num_tokens)
        self._entries.remove(entry)
        if num_left:
            rest = _suffix_of(entry.fingerprint, entry.data, entry.cache, num_tokens)
            self._entries.append(rest)
            trim(entry.cache, num_tokens)
        return entry.cache

    def view(self, prefix: MemoryPrefix) -> list[Any] | None:
        """Return a cache with a prefix that was just found, which stays here, too.

        Its arrays are objects of its own, and it has no room: what is written to it is
        written to copies. None if another thread has popped it meanwhile.
        """
        with self._lock:
            if not self._holds(prefix):
                return None
            entry, stop = prefix.pieces[0]
            assert isinstance(entry, _CacheEntry)
            if not entry.is_sliceable:
                self._use(entry)
                return deepcopy(entry.cache)
            covered = min(stop, prefix.num_tokens)
            cache = shared_rows(entry.cache, covered)
            self._append_suffixes(cache, prefix, covered)
            # Last, so that it outlives what is of no use without it.
            self._use(entry)
            return cache

    def _holds(self, prefix: MemoryPrefix) -> bool:
        return all(piece.entry in self._entries for piece in prefix.pieces)

    def _append_suffixes(
        self, cache: list[Any], prefix: MemoryPrefix, covered: int
    ) -> list[_Piece]:
        """Add the rows of a prefix's suffixes to a cache; return those pieces."""
        suffixes = []
        for suffix, stop in prefix.pieces[1:]:
            assert isinstance(suffix, _SuffixEntry)
            stop = min(stop, prefix.num_tokens)
            if stop > covered:
                _append(cache, suffix, covered, stop)
                self._use(suffix)
                covered = stop
                suffixes.append(_Piece(suffix, stop))
        return suffixes

    def _use(self, entry: _Entry) -> None:
        """Make an entry the last to go."""
        self._entries.remove(entry)
        self._entries.append(entry)

    def insert(
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
        if any(position != num_good for position in positions_of(cache)):
            return
        try:
            nbytes = sum(layer.nbytes for layer in cache)
        except (AttributeError, NotImplementedError):
            # A class of the model's own, whose size nobody knows.
            return
        new = _CacheEntry(fingerprint, pack(token_ids[:num_good]), nbytes, cache)
        with self._lock:
            equivalents = [*self._equivalents(new)]
            for entry in equivalents:
                if entry.num_tokens > new.num_tokens:
                    self._use(entry)
                    return
            for entry in equivalents:
                self._entries.remove(entry)
            self._entries.append(new)
            self._hold_limit()

    def insert_shared(
        self, fingerprint: str, token_ids: Sequence[int], cache: list[Any]
    ) -> None:
        """Keep what a cache has read, but only rows of it that are not here yet.

        Args:
            fingerprint: What its values depend on.
            token_ids: What it has read.
            cache: One mlx-lm cache object a layer, of which the caller keeps nothing.
        """
        if not has_only_rows(cache):
            return self.insert(fingerprint, token_ids, cache)
        with self._lock:
            # One more, as a prefix leaves one to read.
            prefix = self.find(fingerprint, [*token_ids, 0], lambda end: end)
            if prefix is None or len(prefix.pieces) >= MAX_PIECES:
                data = pack(token_ids)
                self._forget_prefixes(fingerprint, data)
                return self.insert(fingerprint, token_ids, cache)
            for entry, _ in reversed(prefix.pieces):
                self._use(entry)
            if prefix.num_tokens == len(token_ids):
                return
            suffix = _suffix_of(fingerprint, pack(token_ids), cache, prefix.num_tokens)
            # Before the cache that it continues, which is to outlive it.
            self._entries.insert(len(self._entries) - 1, suffix)
            self._hold_limit()

    def _forget_prefixes(self, fingerprint: str, data: bytes) -> None:
        """Remove the suffixes that a longer root makes superfluous."""
        self._entries = [
            entry
            for entry in self._entries
            if isinstance(entry, _CacheEntry)
            or entry.fingerprint != fingerprint
            or not data.startswith(entry.data)
        ]

    def set_limit(self, max_nbytes: int) -> None:
        """Set how many bytes to hold, and give up what is more."""
        with self._lock:
            self.max_nbytes = max_nbytes
            self._hold_limit()

    def _equivalents(self, new: _CacheEntry) -> Iterator[_CacheEntry]:
        """Yield the roots that are good for all that a new one is, or the reverse."""
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


def _suffix_of(
    fingerprint: str, data: bytes, cache: Sequence[Any], start: int
) -> _SuffixEntry:
    """Return a copy of the rows that a cache has from a token on."""
    rows = copied_rows(cache, start, len(data) // TOKEN_NBYTES)
    nbytes = sum(array.nbytes for arrays in rows.values() for array in arrays)
    return _SuffixEntry(fingerprint, data, nbytes, start, rows)


def _longest_suffix(
    suffixes: Sequence[_Piece], covered: int, last: int
) -> _Piece | None:
    """Return the suffix that reaches furthest beyond what is covered, if any."""
    pieces = (
        _Piece(entry, min(stop, last))
        for entry, stop in suffixes
        if isinstance(entry, _SuffixEntry) and entry.start <= covered
    )
    best = max(pieces, key=lambda piece: piece.stop, default=None)
    return best if best and best.stop > covered else None


def _append(cache: Sequence[Any], suffix: _SuffixEntry, start: int, stop: int) -> None:
    """Add the rows `[start, stop)` of a suffix to a cache that holds those before."""
    for name, part in parts_of(cache):
        if not part.empty():
            span = slice(start - suffix.start, stop - suffix.start)
            part.update_and_fetch(*(array[..., span, :] for array in suffix.rows[name]))
