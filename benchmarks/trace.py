"""Trace: what eviction keeps when recorded requests are asked again, without tensors.

    python -m benchmarks.trace mooncake_conversation_trace.jsonl --limit 1TB

The store is a real one: it matches, cuts, saves, evicts and holds its limit by itself.
Only its blobs have sizes in place of files, and the order in which its leaves go can be
another one than the last use. A file with the ending `.jsonl` is in the format of
Mooncake's traces, a folder of `.json` files one of agents' sessions, as SemiAnalysis
publishes them; both name the blocks of prompts by hashes, and tell no tokens.
"""

import argparse
import contextlib
import json
import math
import mmap
import sys
import tempfile
import time
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import machine, print_table
from promptcache.blobs import BlobFolder
from promptcache.chain import BLOCK_SIZE, Chain
from promptcache.errors import StoreError
from promptcache.index import Index
from promptcache.store import MAX_SEGMENT_TOKENS, PrefixStore
from promptcache.types import (
    EncodedSegment,
    Fingerprint,
    Garbage,
    Leaf,
    Match,
    Receipt,
    SegmentInfo,
    Tensor,
)
from promptcache.units import format_size, parse_size

FINGERPRINT = Fingerprint("0" * 32, "model")
# Qwen3-8B: 36 layers × 8 heads × 128 values × 2 (keys and values) × 2 bytes.
NBYTES_PER_TOKEN = 147_456
# At this position a token of Qwen3-8B costs twice as much as the first: its attention
# then takes as many operations (4 × 36 layers × 32 heads × 128 each) as its 8.2 billion
# weights (2 each).
ATTENTION_DEPTH = 28_000
UNLIMITED = sys.maxsize
# One session of a folder begins every half an hour; each clock starts at 0 there.
SECONDS_BETWEEN_SESSIONS = 1800.0


class Request(NamedTuple):
    """A prompt: its length, and the number of each block, equal where prefixes are."""

    num_tokens: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their times.

    Attributes:
        name: Where they come from.
        block_size: Tokens of a block.
        requests: All of them.
    """

    name: str
    block_size: int
    requests: Sequence[Request]

    def token_ids(self, request: Request) -> Sequence[int]:
        """Return token ids that are equal as far as the blocks are.

        All tokens of a block have its number, so that others differ from the first on.
        """
        ids = array("I")
        for number in request.blocks:
            ids += array("I", [number]) * self.block_size
        return ids[: request.num_tokens]

    def asked_at(self) -> Mapping[int, Sequence[int]]:
        """Return the numbers of the requests that have each block."""
        found = defaultdict(list)
        for number, request in enumerate(self.requests):
            for block in request.blocks:
                found[block].append(number)
        return found


class Entry(NamedTuple):
    """A request as a file has it; `scope` is where its hashes are unique."""

    at: float
    num_tokens: int
    scope: Hashable
    hash_ids: Sequence[int]


def read_trace(path: Path, *, num_requests: int | None = None) -> Trace:
    """Read a file of Mooncake's, or a folder of sessions as one trace.

    Args:
        path: The file, or the folder.
        num_requests: How many to take from the start; None: all.
    """
    if path.is_dir():
        entries, block_size = _sessions(sorted(path.glob("*.json")))
    else:
        entries, block_size = _mooncake(path), 512
    entries.sort(key=lambda entry: entry.at)
    numbered = _numbered(entries[:num_requests], block_size)
    return Trace(path.stem, block_size, list(numbered))


def _mooncake(path: Path) -> list[Entry]:
    """Read one request a line; its last block may be a part of one."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        Entry(row["timestamp"], row["input_length"], None, row["hash_ids"])
        for row in rows
    ]


def _sessions(paths: Sequence[Path]) -> tuple[list[Entry], int]:
    """Read one session a file; the last tokens of a prompt are in no block."""
    entries = []
    sizes = {64}
    for i, path in enumerate(paths):
        session = json.loads(path.read_text())
        sizes = {session["block_size"]}
        for row in _rows(session["requests"]):
            at = row["t"] + i * SECONDS_BETWEEN_SESSIONS
            entries.append(Entry(at, row["in"], path.stem, row["hash_ids"]))
    (block_size,) = sizes
    return entries, block_size


def _rows(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield requests, also those of subagents, whose times are the session's."""
    for row in rows:
        if "requests" in row:
            yield from _rows(row["requests"])
        else:
            yield row


def _numbered(entries: Iterable[Entry], block_size: int) -> Iterator[Request]:
    """Yield requests whose blocks are numbered by what they are and come after.

    What is in no block is taken to be in no other prompt.
    """
    numbers: dict[Hashable, int] = {}
    for i, entry in enumerate(entries):
        blocks: list[int] = []
        names: list[Hashable] = [(entry.scope, hash_id) for hash_id in entry.hash_ids]
        names += [("rest of", i)] * (entry.num_tokens > len(names) * block_size)
        for name in names:
            after = blocks[-1] if blocks else None
            blocks.append(numbers.setdefault((after, name), len(numbers)))
        yield Request(entry.num_tokens, tuple(blocks))


# Orderings


@dataclass(slots=True)
class Past:
    """What is known of a segment; times are numbers of requests.

    Attributes:
        start: First token of its range.
        end: The token after the last.
        asked_at: The requests that go on into it, also those to come.
        created_at: When it was saved.
        used_at: When it was used last.
        used_before: When it was used last before that, -1 if never.
        num_uses: How often it was saved or reused.
        floor: What the best segment ranked that had gone when it was used last.
    """

    start: int
    end: int
    asked_at: Sequence[int]
    created_at: int
    used_at: int
    used_before: int = -1
    num_uses: int = 1
    floor: float = 0.0

    def note_use(self, now: int, floor: float) -> None:
        """Note that it was reused."""
        self.used_before, self.used_at = self.used_at, now
        self.num_uses += 1
        self.floor = floor


# Ranks a segment at a time; of all leaves the one with the least rank goes first.
Ordering = Callable[[Leaf, Past, int], float]
# More than there are requests: weighs the first of two criteria.
FIRST = 1e9


def lru(leaf: Leaf, past: Past, now: int) -> float:
    """Rank by the last use, as the store does."""
    return leaf.used_at


def fifo(leaf: Leaf, past: Past, now: int) -> float:
    """Rank by age."""
    return past.created_at


def lfu(leaf: Leaf, past: Past, now: int) -> float:
    """Rank by the number of uses, then by the last."""
    return past.num_uses * FIRST + past.used_at


def lru_2(leaf: Leaf, past: Past, now: int) -> float:
    """Rank by the last use but one (O'Neil et al., 1993), then by the last."""
    return past.used_before * FIRST + past.used_at


def twice(leaf: Leaf, past: Past, now: int) -> float:
    """Rank by the last use, but those never reused first, as a segmented LRU does."""
    return (past.num_uses > 1) * FIRST + past.used_at


def gds(leaf: Leaf, past: Past, now: int) -> float:
    """Rank by what a byte saves, and age (GreedyDual-Size, Cao and Irani, 1997)."""
    return past.floor + work(past.start, past.end) / (past.end - past.start)


def gdsf(leaf: Leaf, past: Past, now: int) -> float:
    """Rank by what a byte has saved, and age (Cherkasova, 1998)."""
    value = work(past.start, past.end) / (past.end - past.start)
    return past.floor + past.num_uses * value


def belady(leaf: Leaf, past: Past, now: int) -> float:
    """Rank by the next use, which nobody can know (Belady, 1966)."""
    i = bisect_right(past.asked_at, now)
    return -past.asked_at[i] if i < len(past.asked_at) else -math.inf


ORDERINGS: Mapping[str, Ordering] = {
    "lru": lru,
    "fifo": fifo,
    "lfu": lfu,
    "lru-2": lru_2,
    "twice": twice,
    "gds": gds,
    "gdsf": gdsf,
    "belady": belady,
}


def work(start: int, end: int) -> float:
    """Return what it costs to read `[start, end)`, the first token being 1."""
    return (end - start) * (1 + (start + end) / 2 / ATTENTION_DEPTH)


# A store without files


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


class RankingIndex(Index):
    """An index that tells the rank of its leaves as the time of their last use."""

    def __init__(self, path: Path, ordering: Ordering) -> None:
        """Take the database and an ordering."""
        super().__init__(path)
        # Waiting for the disk is not what is measured.
        self._execute("PRAGMA synchronous=OFF")
        self._ordering = ordering
        self._floor = 0.0
        self._ranks: dict[str, float] = {}
        # Of segments that are there or about to be.
        self.pasts: dict[str, Past] = {}
        self.now = 0
        self.num_evictions = 0

    def leaves(self) -> list[Leaf]:
        """Return all segments as eviction is to see them."""
        leaves = super().leaves()
        if self._ordering is lru:
            return leaves
        self._ranks = {
            leaf.key: self._ordering(leaf, self.pasts[leaf.key], self.now)
            for leaf in leaves
        }
        return [leaf._replace(used_at=self._ranks[leaf.key]) for leaf in leaves]

    def add_segment(self, info: SegmentInfo, chain: Chain, *, nbytes: int) -> None:
        """Add a segment whose past is known, for which room has been made."""
        self.pasts[info.key].floor = self._floor
        super().add_segment(info, chain, nbytes=nbytes)

    def touch(
        self, segment_keys: Sequence[str], cached_tokens: int, *, now: float
    ) -> str | None:
        """Note a hit."""
        for key in segment_keys:
            if key in self.pasts:
                self.pasts[key].note_use(self.now, self._floor)
        return super().touch(segment_keys, cached_tokens, now=now)

    def note_eviction(
        self, segment_key: str, keys: Mapping[int, str], reason: str, *, now: float
    ) -> None:
        """Remember that a segment is being taken away."""
        self.num_evictions += 1
        self._floor = max(self._floor, self._ranks.get(segment_key, 0.0))
        del self.pasts[segment_key]
        super().note_eviction(segment_key, keys, reason, now=now)


class BypassedError(StoreError):
    """What is new was worth the least of all, and went."""


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
        self._trace = trace
        self._asked_at = trace.asked_at()
        super().__init__(path, max_nbytes=max_nbytes)
        self._blobs = WeightlessBlobs(self.path)
        self._nbytes_per_token = nbytes_per_token
        # Zeros that take no memory, because nobody looks at them.
        rows = mmap.mmap(-1, MAX_SEGMENT_TOKENS * nbytes_per_token)
        self._rows = memoryview(rows)

    def _new_index(self) -> Index:
        return RankingIndex(self.path / "index.db", self._ordering)

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
        self.record(Receipt(FINGERPRINT, match, num_new, 0.0, 0.0))
        return match, is_saved

    def _encode(self, start: int, end: int) -> EncodedSegment:
        data = self._rows[: (end - start) * self._nbytes_per_token]
        return EncodedSegment("", [Tensor("rows", "U8", (data.nbytes,), data)])

    def _add(self, info: SegmentInfo, segment: EncodedSegment, chain: Chain) -> bool:
        number = self._index.now
        blocks = self._trace.requests[number].blocks
        asked_at = self._asked_at[blocks[info.start // self._trace.block_size]]
        self._index.pasts[info.key] = Past(
            info.start, info.end, asked_at, created_at=number, used_at=number
        )
        is_added = super()._add(info, segment, chain)
        if info.key not in self._index.pasts:
            raise BypassedError("nothing that is kept is worth less")
        return is_added

    def _make_room(self, nbytes: int, *, protect: str | None) -> None:
        """Make room; who knows the future may give up what is new."""
        if self._ordering is not belady:
            super()._make_room(nbytes, protect=protect)
        elif not nbytes:
            super()._make_room(0, protect=None)


# Replay


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one replay came to.

    Attributes:
        trace: Where the requests come from.
        policy: The ordering.
        max_nbytes: The limit, None without one.
        num_requests: How many there were.
        num_hits: How many of them reused 32 tokens or more.
        num_unsaved: How many prompts did not fit into the limit.
        prompt_tokens: Tokens of all prompts.
        cached_tokens: How many of them were reused.
        prompt_work: What reading all prompts costs, see `work`.
        cached_work: How much of it was spared.
        written_nbytes: Bytes of all blobs that were saved.
        num_evictions: Segments that went.
        held_nbytes: Bytes of the blobs at the end.
        seconds: Time of the CPU in matching, saving and evicting.
    """

    trace: str
    policy: str
    max_nbytes: int | None
    num_requests: int
    num_hits: int
    num_unsaved: int
    prompt_tokens: int
    cached_tokens: int
    prompt_work: float
    cached_work: float
    written_nbytes: int
    num_evictions: int
    held_nbytes: int
    seconds: float


def replay(
    trace: Trace,
    policy: str = "lru",
    *,
    max_nbytes: int | None = None,
    nbytes_per_token: int = NBYTES_PER_TOKEN,
) -> Outcome:
    """Ask all requests of a trace of an empty store."""
    matches: list[Match] = []
    seconds, num_unsaved = 0.0, 0
    with (
        tempfile.TemporaryDirectory() as folder,
        TraceStore(
            Path(folder),
            trace,
            max_nbytes=UNLIMITED if max_nbytes is None else max_nbytes,
            ordering=ORDERINGS[policy],
            nbytes_per_token=nbytes_per_token,
        ) as store,
    ):
        for number, request in enumerate(trace.requests):
            token_ids = trace.token_ids(request)
            started = time.process_time()
            match, is_saved = store.ask(number, token_ids)
            seconds += time.process_time() - started
            num_unsaved += not is_saved
            matches.append(match)
        lengths = [request.num_tokens for request in trace.requests]
        cached = [match.cached_tokens for match in matches]
        return Outcome(
            trace=trace.name,
            policy=policy,
            max_nbytes=max_nbytes,
            num_requests=len(matches),
            num_hits=sum(num_tokens >= BLOCK_SIZE for num_tokens in cached),
            num_unsaved=num_unsaved,
            prompt_tokens=sum(lengths),
            cached_tokens=sum(cached),
            prompt_work=sum(work(0, num_tokens) for num_tokens in lengths),
            cached_work=sum(work(0, num_tokens) for num_tokens in cached),
            written_nbytes=store.blobs.written_nbytes,
            num_evictions=store.num_evictions,
            held_nbytes=store.blobs.held_nbytes,
            seconds=seconds,
        )


def parse_limit(text: str) -> int | None:
    """Return a size limit in bytes, None for `unlimited`."""
    return None if text == "unlimited" else parse_size(text)


def replays(
    traces: Iterable[Trace],
    limits: Sequence[int | None],
    policies: Sequence[str],
    nbytes_per_token: int,
) -> Iterator[Outcome]:
    """Yield what each trace comes to; without a limit nothing has to be ordered."""
    for trace in traces:
        for limit in limits:
            for policy in policies if limit is not None else policies[:1]:
                yield replay(
                    trace, policy, max_nbytes=limit, nbytes_per_token=nbytes_per_token
                )


HEADERS = (
    "limit",
    "policy",
    "tokens reused",
    "work spared",
    "requests with a hit",
    "written",
    "evictions",
    "held",
    "not saved",
    "CPU a request",
)


def row(outcome: Outcome) -> list[object]:
    """Return an outcome as the table has it."""
    limit = outcome.max_nbytes
    return [
        "none" if limit is None else format_size(limit),
        "any" if limit is None else outcome.policy,
        f"{outcome.cached_tokens / outcome.prompt_tokens:.1%}",
        f"{outcome.cached_work / outcome.prompt_work:.1%}",
        f"{outcome.num_hits / outcome.num_requests:.1%}",
        format_size(outcome.written_nbytes),
        f"{outcome.num_evictions:,}",
        format_size(outcome.held_nbytes),
        f"{outcome.num_unsaved:,}",
        f"{outcome.seconds / outcome.num_requests * 1e3:.1f} ms",
    ]


def main() -> None:
    """Replay each trace with each limit and policy; print a table for each trace."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="FILE_OR_FOLDER")
    parser.add_argument("--limit", nargs="+", default=["50GB", "500GB", "unlimited"])
    parser.add_argument(
        "--policy", nargs="+", choices=list(ORDERINGS), default=list(ORDERINGS)
    )
    parser.add_argument(
        "--requests", type=int, default=200, help="the first ones only; 0: all"
    )
    parser.add_argument("--nbytes-per-token", type=int, default=NBYTES_PER_TOKEN)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    limits = [parse_limit(text) for text in options.limit]
    print(machine(), flush=True)
    outcomes = list[Outcome]()
    for path in options.paths:
        trace = read_trace(path, num_requests=options.requests or None)
        own = list(replays([trace], limits, options.policy, options.nbytes_per_token))
        outcomes += own
        print(
            f"\n{trace.name}: {own[0].num_requests:,} requests, "
            f"{own[0].prompt_tokens:,} tokens\n"
        )
        print_table(HEADERS, [row(outcome) for outcome in own])
    if options.json is not None:
        rows = [asdict(outcome) for outcome in outcomes]
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
