"""Trace: what eviction keeps when recorded requests are asked again, without tensors.

    python -m benchmarks.trace mooncake_conversation_trace.jsonl --limit 1TB

The store is a real one without files (`weightless`), which is asked in the order of the
requests' times and saves every prompt.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.harness import machine, print_table
from benchmarks.orderings import ORDERINGS, work
from benchmarks.recorded import Trace, read_trace
from benchmarks.weightless import NBYTES_PER_TOKEN, TraceStore
from promptcache.segments.chain import BLOCK_SIZE
from promptcache.segments.types import Match
from promptcache.units import format_size, parse_size

UNLIMITED = sys.maxsize


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
    parser.add_argument("--limit", nargs="+", default=["100GB", "unlimited"])
    parser.add_argument(
        "--policy",
        nargs="+",
        choices=list(ORDERINGS),
        default=["lru", "gdsf", "belady"],
    )
    parser.add_argument(
        "--requests", type=int, default=250, help="the first ones only; 0: all"
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
