"""The tier on disk: fill a fresh cache with what the store has of a prompt."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from promptcache.errors import DamagedBlobError, StoreError, warn
from promptcache.kvcache import restore, snapshot
from promptcache.kvcache.classes import parts_of
from promptcache.kvcache.kv_quantization import KVSettings, quantize
from promptcache.kvcache.layout import is_quantized
from promptcache.kvcache.loading.cuda_buffers import make_buffers
from promptcache.kvcache.loading.row_buffers import RowBuffers
from promptcache.kvcache.loading.segment_loader import LoadedSegment, SegmentLoad
from promptcache.models.prefill_plan import PrefillPlan
from promptcache.segments.blob_format import BlobHeader
from promptcache.segments.chain import pack
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import Match, SegmentSlice
from promptcache.store import PrefixStore
from promptcache.store.types import LoadEstimate
from promptcache.tiers import memory_limits

# An answer's first tokens need no new allocation; more would only take time here.
DECODE_ROOM = 64
# How many segments to read ahead of the one that is waited for.
READ_AHEAD = 8


class RestoredPrefix(NamedTuple):
    """What a cache was filled with.

    Attributes:
        match: The longest prefix that the store has.
        cached_tokens: How many tokens the cache holds, from the store or from memory.
        declined: Why the match was not loaded, if it was not.
        restored: All of it, if it is stored under another fingerprint only.
    """

    match: Match = Match()
    cached_tokens: int = 0
    declined: LoadEstimate | None = None
    restored: snapshot.Snapshot | None = None


def restore_prefix(
    store: PrefixStore,
    fingerprint: Fingerprint,
    cache: list[Any],
    token_ids: Sequence[int],
    *,
    plan: PrefillPlan,
    kv: KVSettings,
    match: Match | None = None,
    may_decline: bool = False,
) -> RestoredPrefix:
    """Fill a fresh cache with the longest cached prefix of token ids.

    A blob that is missing or damaged is forgotten, with one warning, and the next
    best prefix taken. The cache is then quantized if a run from nothing would have it
    so by now, and has room for all of `token_ids` and the first steps of decoding.

    Args:
        store: Where to look.
        fingerprint: What KV values depend on.
        cache: A fresh cache, which is filled.
        token_ids: The prompt, up to where it may be restored.
        plan: Where the pieces of its prefill end.
        kv: When keys and values are quantized.
        match: What `lookup` has just found of it, if it was asked.
        may_decline: Load nothing where the model reads the same tokens sooner.

    Raises:
        StoreError: The index cannot be read.
    """
    if match is None:
        match = store.lookup(token_ids, fingerprint)
    if not match.slices:
        return RestoredPrefix(match)
    if may_decline and (declined := _declines(store, fingerprint, match)):
        return RestoredPrefix(match, declined=declined)
    room = len(token_ids) + DECODE_ROOM
    buffers = make_buffers(dict(parts_of(cache)), room)
    with buffers or contextlib.nullcontext():
        loader = _Loader(store, token_ids, plan, kv, buffers)
        skip: set[str] = set()
        while match.slices:
            loader.at = match.slices[0]
            try:
                memory_limits.check_fits(store.segments.nbytes_of(match))
                segments = loader.load(match.slices)
                cache[:] = restore.restore(cache, segments, room)
                break
            except _TooEarlyError:
                skip.add(loader.at.key)
            except StoreError as error:
                skip |= _unusable(store, match, loader.at, error)
            match = store.lookup(token_ids, fingerprint, skip=skip)
    if not match.slices:
        return RestoredPrefix(match)
    quantized_from = plan.quantized_from(kv)
    if quantized_from is not None and match.cached_tokens >= quantized_from:
        quantize(cache, match.cached_tokens, kv)
    restored = None
    if loader.digests[match.slices[-1].key] != fingerprint.digest:
        restored = snapshot.snapshot_restored(cache, segments, match.cached_tokens)
    return RestoredPrefix(match, match.cached_tokens, restored=restored)


def _declines(
    store: PrefixStore, fingerprint: Fingerprint, match: Match
) -> LoadEstimate | None:
    """Return why to read a match again rather than to load it, if that is faster."""
    estimate = store.usage_log.estimate(fingerprint, match.cached_tokens)
    return estimate if estimate is not None and estimate.prefill_is_faster else None


def _unusable(
    store: PrefixStore, match: Match, part: SegmentSlice, error: StoreError
) -> set[str]:
    """Return the keys to do without after an error with a part of a match."""
    # Split or removed since it was found: another look finds what is left.
    if not store.segments.holds(part):
        return set()
    _give_up(store, part, error)
    # What does not fit into memory does not fit in part either.
    is_damaged = isinstance(error, DamagedBlobError)
    return {part.key if is_damaged else match.slices[0].key}


class _TooEarlyError(Exception):
    """A segment is quantized where a run from nothing is not yet."""


class _Loader:
    """Reads segments, each once, also where a second try needs some of them again.

    Attributes:
        at: The segment that is being read, or was the last one.
        digests: By key, the digest of the fingerprint that a segment is stored under.
    """

    at: SegmentSlice

    def __init__(
        self,
        store: PrefixStore,
        token_ids: Sequence[int],
        plan: PrefillPlan,
        kv: KVSettings,
        destination: RowBuffers | None,
    ) -> None:
        self._loaded: dict[SegmentSlice, LoadedSegment] = {}
        self._opened: dict[SegmentSlice, tuple[Path, BlobHeader]] = {}
        self._begun: dict[SegmentSlice, SegmentLoad] = {}
        self.digests: dict[str, str] = {}
        self._store = store
        self._token_ids = token_ids
        self._quantized_from = plan.quantized_from(kv) or 0
        self._destination = destination

    def load(self, parts: Sequence[SegmentSlice]) -> list[LoadedSegment]:
        """Read what is wanted of segments. Raises StoreError and _TooEarlyError."""
        try:
            for part in parts:
                self._open(part)
                if part is parts[0] and len(parts) > READ_AHEAD:
                    self._zero(part)
            for i, part in enumerate(parts):
                for other in parts[i : i + READ_AHEAD]:
                    self._begin(other)
                self._finish(part)
            if self._destination is not None:
                self._destination.finish()
        finally:
            for reading in self._begun.values():
                reading.give_up()
            self._begun.clear()
            self._opened.clear()
        return [self._loaded[part] for part in parts]

    def _open(self, part: SegmentSlice) -> None:
        if part in self._loaded:
            return
        self.at = part
        path, header = self._store.segments.open_blob(part)
        self.digests[part.key] = header.info.fingerprint.digest
        # A run from nothing still reads these rows as they were computed.
        if is_quantized(header.layout) and part.start < self._quantized_from:
            raise _TooEarlyError
        self._opened[part] = path, header

    def _zero(self, part: SegmentSlice) -> None:
        """Let the arrays be zeroed while the headers of many segments are decoded."""
        if self._destination is not None and part in self._opened:
            _, header = self._opened[part]
            self._destination.prepare(header.tensors)
            self._destination.prefault()

    def _begin(self, part: SegmentSlice) -> None:
        if part in self._loaded or part in self._begun:
            return
        self.at = part
        # Of another try, rows may lie where these are going to.
        self._loaded = {
            other: segment
            for other, segment in self._loaded.items()
            if other.stop <= part.start or part.stop <= other.start
        }
        ids = pack(self._token_ids[part.start : part.stop])
        path, header = self._opened[part]
        reading = SegmentLoad(path, header, part, ids, self._destination)
        self._begun[part] = reading

    def _finish(self, part: SegmentSlice) -> None:
        self.at = part
        if part not in self._loaded:
            self._loaded[part] = self._begun.pop(part).finish()


def check_blobs(store: PrefixStore, match: Match) -> bool:
    """Return whether the blobs of a match are there, forgetting one that is damaged."""
    for part in match.slices:
        try:
            store.segments.open_blob(part)
        except StoreError as error:
            if store.segments.holds(part):
                _give_up(store, part, error)
            return False
    return True


def _give_up(store: PrefixStore, part: SegmentSlice, error: StoreError) -> None:
    names: list[str] = []
    if isinstance(error, DamagedBlobError):
        with contextlib.suppress(StoreError):
            names = store.segments.give_up(part.key)
    lost = f", and {', '.join(names)} is no longer pinned" if names else ""
    warn(
        f"cached segment {part.key[:12]} cannot be used and is read again: "
        f"{error}{lost}"
    )
