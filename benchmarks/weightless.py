"""A real store whose blobs have sizes in place of files.

It matches, cuts, saves, evicts and holds its limit as any. Only the order in which its
leaves go can be another one than the last use.
"""

import contextlib
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.orderings import Ordering, Past, belady, lru
from benchmarks.recorded import Trace
from promptcache.errors import StoreError
from promptcache.segments.chain import Chain
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import EncodedSegment, Match, SegmentInfo, Tensor
from promptcache.store import MAX_SEGMENT_TOKENS, PrefixStore
from promptcache.store.blobs.folder import BlobFolder
from promptcache.store.index import Index
from promptcache.store.index.database import Opener
from promptcache.store.index.events import History
from promptcache.store.index.rows import SegmentNode
from promptcache.store.maintenance.disk_budget import Room
from promptcache.store.reports import Garbage
from promptcache.store.types import RequestUsage
from promptcache.store.writer import SegmentWriter

FINGERPRINT = Fingerprint("0" * 32, "model")
# Qwen3-8B: 36 layers × 8 heads × 128 values × 2 (keys and values) × 2 bytes.
NBYTES_PER_TOKEN = 147_456


@dataclass(frozen=True, slots=True)
class WeightlessBlob:
    """A blob that would be published under its key."""

    key: str
    nbytes: int
    blobs: "WeightlessBlobs"

    def publish(self) -> None:
        """Let it count from now on."""
        self.blobs.add(self.key, self.nbytes)


class WeightlessBlobs(BlobFolder):
    """Blobs of which only the sizes are known."""

    def __init__(self, root: Path) -> None:
        """Take the folder of the store's other files."""
        super().__init__(root)
        self._nbytes_by_key: dict[str, int] = {}
        self.held_nbytes = 0
        self.written_nbytes = 0

    def add(self, key: str, nbytes: int) -> None:
        """Add a blob."""
        assert key not in self._nbytes_by_key
        self._nbytes_by_key[key] = nbytes
        self.held_nbytes += nbytes
        self.written_nbytes += nbytes

    @contextlib.contextmanager
    def staged(self, info: SegmentInfo, segment: EncodedSegment) -> Iterator[Any]:
        """Take a blob, to publish it or to drop it."""
        nbytes = sum(tensor.data.nbytes for tensor in segment.tensors)
        yield WeightlessBlob(info.key, nbytes, self)

    def stored(self) -> Iterator[tuple[str, int]]:
        """Yield the key and size of every blob."""
        yield from self._nbytes_by_key.items()

    def garbage(self) -> list[Garbage]:
        """Return nothing."""
        return []

    def remove(self, key: str) -> int:
        """Remove a blob and return its size."""
        nbytes = self._nbytes_by_key.pop(key, 0)
        self.held_nbytes -= nbytes
        return nbytes

    def total_nbytes(self) -> int:
        """Return the size of all blobs, and of the index."""
        return super().total_nbytes() + self.held_nbytes


class RankingHistory(History):
    """A history that tells which segments are taken away."""

    def __init__(self, index: Index, on_eviction: Callable[[str], None]) -> None:
        """Take the index, and what is called with the key of each one that goes."""
        super().__init__(index.database, index.fingerprints)
        self._on_eviction = on_eviction

    def note_eviction(
        self, segment_key: str, keys: Mapping[int, str], reason: str, *, now: float
    ) -> None:
        """Remember that a segment is being taken away."""
        self._on_eviction(segment_key)
        super().note_eviction(segment_key, keys, reason, now=now)


class RankingIndex(Index):
    """An index that tells the rank of its leaves as the time of their last use."""

    def __init__(self, path: Path, ordering: Ordering, opener: Opener) -> None:
        """Take the database, an ordering, and what opens the database."""
        super().__init__(path, opener=opener)
        # Waiting for the disk is not what is measured.
        self.database.execute("PRAGMA synchronous=OFF")
        self.history = RankingHistory(self, self._forget)
        self._ordering = ordering
        self._floor = 0.0
        self._ranks: dict[str, float] = {}
        # Of segments that are there or about to be.
        self.pasts: dict[str, Past] = {}
        self.now = 0
        self.num_evictions = 0

    def leaves(
        self,
        namespace: str | None = None,
        *,
        protect: Mapping[str, int] | None = None,
    ) -> list[SegmentNode]:
        """Return all segments as eviction is to see them."""
        leaves = super().leaves(namespace, protect=protect)
        if self._ordering is lru:
            return leaves
        self._ranks = {
            leaf.key: self._ordering(leaf, self.pasts[leaf.key], self.now)
            for leaf in leaves
        }
        return [leaf._replace(used_at=self._ranks[leaf.key]) for leaf in leaves]

    def add_segment(
        self,
        info: SegmentInfo,
        chain: Chain,
        *,
        parent_key: str | None,
        nbytes: int,
        token_nbytes: int = 0,
        created_at: float | None = None,
    ) -> None:
        """Add a segment whose past is known, for which room has been made."""
        self.pasts[info.key].floor = self._floor
        super().add_segment(info, chain, parent_key=parent_key, nbytes=nbytes)

    def touch(
        self, segment_keys: Sequence[str], cached_tokens: int, *, now: float
    ) -> str | None:
        """Note a hit."""
        for key in segment_keys:
            if key in self.pasts:
                self.pasts[key].note_use(self.now, self._floor)
        return super().touch(segment_keys, cached_tokens, now=now)

    def _forget(self, segment_key: str) -> None:
        """Forget the past of a segment that is being taken away."""
        self.num_evictions += 1
        self._floor = max(self._floor, self._ranks.get(segment_key, 0.0))
        del self.pasts[segment_key]


class BypassedError(StoreError):
    """What is new was worth the least of all, and went."""


class ForeseeingRoom(Room):
    """Room that is made by who knows the future, and may give up what is new."""

    def make(self, nbytes: int, *, protect: Mapping[str, int] | None = None) -> None:
        """Make room once it is taken."""
        if not nbytes:
            super().make(0)


class TraceWriter(SegmentWriter):
    """A writer that notes the past of what it writes."""

    _index: RankingIndex

    def __init__(
        self, index: RankingIndex, blobs: BlobFolder, room: Room, trace: Trace
    ) -> None:
        """Take a store's files, and what will be asked."""
        super().__init__(index, blobs, room)
        self._trace = trace
        self._asked_at = trace.asked_at()

    def _add(
        self,
        info: SegmentInfo,
        segment: EncodedSegment,
        chain: Chain,
        protect: Mapping[str, int],
        more_nbytes: int = 0,
    ) -> bool:
        number = self._index.now
        blocks = self._trace.requests[number].blocks
        asked_at = self._asked_at[blocks[info.start // self._trace.block_size]]
        self._index.pasts[info.key] = Past(
            info.start, info.end, asked_at, created_at=number, used_at=number
        )
        is_added = super()._add(info, segment, chain, protect, more_nbytes)
        if info.key not in self._index.pasts:
            raise BypassedError("nothing that is kept is worth less")
        return is_added


class TraceStore(PrefixStore):
    """A store that answers the requests of a trace."""

    _blobs: WeightlessBlobs
    _index: RankingIndex

    def __init__(
        self,
        path: Path,
        trace: Trace,
        *,
        max_nbytes: int,
        ordering: Ordering = lru,
        nbytes_per_token: int = NBYTES_PER_TOKEN,
    ) -> None:
        """Open an empty store.

        Args:
            path: A folder for the index.
            trace: What will be asked.
            max_nbytes: Size limit in bytes.
            ordering: In which order leaves go.
            nbytes_per_token: What a token takes.
        """
        self._ordering = ordering
        super().__init__(path, max_nbytes=max_nbytes)
        self._blobs = WeightlessBlobs(self.path)
        make_room = ForeseeingRoom if ordering is belady else Room
        self._room = make_room(
            self._index,
            self._blobs,
            max_nbytes=max_nbytes,
            allowance=self._room.allowance,
        )
        self._writer = TraceWriter(self._index, self._blobs, self._room, trace)
        self._nbytes_per_token = nbytes_per_token
        # Zeros that take no memory, because nobody looks at them.
        rows = mmap.mmap(-1, MAX_SEGMENT_TOKENS * nbytes_per_token)
        self._rows = memoryview(rows)

    def _new_index(self) -> Index:
        return RankingIndex(self.path / "index.db", self._ordering, self._open_index)

    @property
    def blobs(self) -> WeightlessBlobs:
        """Return the blobs."""
        return self._blobs

    @property
    def num_evictions(self) -> int:
        """Return how many segments made room for others."""
        return self._index.num_evictions

    def ask(self, number: int, token_ids: Sequence[int]) -> tuple[Match, bool]:
        """Match the prompt of a request, save what is new, and note the hit.

        Return the match, and whether all that is new was saved.
        """
        self._index.now = number
        match = self.lookup(token_ids, FINGERPRINT, generating=True)
        try:
            self.save(token_ids, FINGERPRINT, self._encode)
            is_saved = True
        except StoreError:
            is_saved = False
        num_new = len(token_ids) - match.cached_tokens
        cached = match.cached_tokens
        self.record(RequestUsage(FINGERPRINT, match, cached, num_new, 0.0, 0.0))
        return match, is_saved

    def _encode(self, start: int, end: int) -> EncodedSegment:
        data = self._rows[: (end - start) * self._nbytes_per_token]
        return EncodedSegment("", [Tensor("rows", "U8", (data.nbytes,), data)])
