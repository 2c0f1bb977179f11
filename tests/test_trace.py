"""Replays of traces: what is counted is what brute force counts, and limits hold."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.orderings import ORDERINGS
from benchmarks.recorded import Request, Trace, read_trace
from benchmarks.trace import replay
from benchmarks.weightless import TraceStore

DATA = Path(__file__).parents[2] / "shared" / "data"
TRACES = (DATA / "mooncake_conversation_trace.jsonl", DATA / "claude-code-traces")
# Not a divisor of the store's blocks, nor a multiple.
BLOCK_SIZE = 48
# Enough for the index not to matter.
NBYTES_PER_TOKEN = 100_000
NBYTES_PER_BLOCK = BLOCK_SIZE * NBYTES_PER_TOKEN


def random_trace(seed: int, num_requests: int = 80) -> Trace:
    """Return conversations that go on in turn, fork, and are given up."""
    random_ = random.Random(seed)
    conversations: list[list[int]] = [[0]]
    requests: list[Request] = []
    num_blocks = 1
    for _ in range(num_requests):
        if requests and random_.random() < 0.1:
            # Asked once more.
            requests.append(requests[-1])
            continue
        said = random_.choice(conversations[-6:])
        kept = said[: random_.randint(1, len(said))] if random_.random() < 0.3 else said
        new = range(num_blocks, num_blocks + random_.randint(1, 3))
        num_blocks = new.stop
        conversations.append([*kept, *new])
        length = BLOCK_SIZE * len(conversations[-1]) - random_.randrange(BLOCK_SIZE)
        requests.append(Request(length, tuple(conversations[-1])))
    return Trace("random", BLOCK_SIZE, requests)


def shared_tokens(trace: Trace) -> list[int]:
    """Return how much of each prompt begins some prompt before, by brute force."""
    prompts = [list(trace.token_ids(request)) for request in trace.requests]
    return [
        min(
            max((shared(prompt, other) for other in prompts[:i]), default=0),
            len(prompt) - 1,
        )
        for i, prompt in enumerate(prompts)
    ]


def shared(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    ends = (i for i, (one, other) in pairs if one != other)
    return next(ends, min(len(left), len(right)))


def trace_of(*prompts: Sequence[int]) -> Trace:
    requests = [Request(BLOCK_SIZE * len(blocks), tuple(blocks)) for blocks in prompts]
    return Trace("prompts", BLOCK_SIZE, requests)


def reused(trace: Trace, policy: str, *, num_blocks: int) -> int:
    """Return how many whole blocks of a trace's last prompt are reused."""
    limit = int((num_blocks + 0.5) * NBYTES_PER_BLOCK)
    options = {"max_nbytes": limit, "nbytes_per_token": NBYTES_PER_TOKEN}
    before = Trace(trace.name, trace.block_size, trace.requests[:-1])
    both = [replay(t, policy, **options).cached_tokens for t in (trace, before)]
    # The last token of a prompt is always read.
    return round((both[0] - both[1]) / BLOCK_SIZE)


@pytest.mark.parametrize("seed", range(5))
def test_without_a_limit_all_is_reused_that_brute_force_finds(seed: int) -> None:
    trace = random_trace(seed)

    outcome = replay(trace)

    assert outcome.cached_tokens == sum(shared_tokens(trace))
    assert outcome.num_evictions == outcome.num_unsaved == 0
    assert outcome.held_nbytes == outcome.written_nbytes


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_the_start_of_a_real_trace_reuses_what_brute_force_finds(path: Path) -> None:
    if not path.exists():
        pytest.skip("the trace is not here")
    trace = read_trace(path, num_requests=40)

    outcome = replay(trace)

    assert outcome.cached_tokens == sum(shared_tokens(trace))
    assert outcome.num_evictions == 0


@pytest.mark.parametrize("policy", ORDERINGS)
def test_a_limit_holds_after_every_request(tmp_path: Path, policy: str) -> None:
    trace = random_trace(1)
    limit = 20 * NBYTES_PER_BLOCK

    with TraceStore(
        tmp_path,
        trace,
        max_nbytes=limit,
        ordering=ORDERINGS[policy],
        nbytes_per_token=NBYTES_PER_TOKEN,
    ) as store:
        for number, request in enumerate(trace.requests):
            store.ask(number, trace.token_ids(request))
            # The receipt comes after the save, which held the limit.
            assert store.total_nbytes() <= limit + 16 * 1024
            stored = dict(store.blobs.stored())
            assert sum(stored.values()) == store.blobs.held_nbytes

    assert store.num_evictions > 0


def test_who_knows_the_future_reuses_most() -> None:
    totals = dict.fromkeys(ORDERINGS, 0)
    for seed in range(6):
        trace = random_trace(seed)
        for policy in ORDERINGS:
            outcome = replay(
                trace,
                policy,
                max_nbytes=16 * NBYTES_PER_BLOCK,
                nbytes_per_token=NBYTES_PER_TOKEN,
            )
            totals[policy] += outcome.cached_tokens

    best = totals.pop("belady")
    assert best > max(totals.values())


def test_the_last_use_decides_in_lru_and_the_age_in_fifo() -> None:
    trace = trace_of([1], [2], [1], [3], [1])

    assert reused(trace, "lru", num_blocks=2) == 1
    assert reused(trace, "fifo", num_blocks=2) == 0


@pytest.mark.parametrize("policy", ["lfu", "lru-2", "twice", "gdsf"])
def test_what_was_used_twice_outlives_what_was_not(policy: str) -> None:
    trace = trace_of([1], [1], [2], [3], [1])

    assert reused(trace, "lru", num_blocks=2) == 0
    assert reused(trace, policy, num_blocks=2) == 1


def test_belady_keeps_what_comes_again_rather_than_what_is_new() -> None:
    trace = trace_of([1], [2], [3], [4], [1])

    assert reused(trace, "lru", num_blocks=1) == 0
    assert reused(trace, "belady", num_blocks=1) == 1


@pytest.mark.parametrize("policy", ["gds", "gdsf"])
def test_late_tokens_are_worth_more_of_the_limit(policy: str) -> None:
    late = [*range(100, 800)]
    trace = trace_of(late, [1], [2], late)

    assert reused(trace, "lru", num_blocks=len(late) + 1) < len(late)
    assert reused(trace, policy, num_blocks=len(late) + 1) == len(late)


def test_uses_long_ago_count_less_in_greedy_dual() -> None:
    often_then_never = [[1]] * 3 + [[i] for i in range(2, 12)]
    trace = trace_of(*often_then_never, [20], [21], [20], [22], [20])

    assert reused(trace, "gdsf", num_blocks=2) == 1
    assert reused(trace_of(*often_then_never, [1]), "lfu", num_blocks=2) == 1
    assert reused(trace_of(*often_then_never, [1]), "gdsf", num_blocks=2) == 0


def test_a_prompt_that_does_not_fit_is_counted() -> None:
    trace = trace_of([1], range(2, 60), [1])

    outcome = replay(
        trace,
        max_nbytes=10 * NBYTES_PER_BLOCK,
        nbytes_per_token=NBYTES_PER_TOKEN,
    )

    assert outcome.num_unsaved == 1


def test_mooncake_blocks_are_told_by_their_hashes(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 2, "input_length": 1000, "hash_ids": [0, 7]},
        {"timestamp": 1, "input_length": 1100, "hash_ids": [0, 7, 8]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))

    trace = read_trace(path)

    assert [request.num_tokens for request in trace.requests] == [1100, 1000]
    first, second = map(trace.token_ids, trace.requests)
    assert [len(first), len(second)] == [1100, 1000]
    assert shared(first, second) == 1000
    assert len(read_trace(path, num_requests=1).requests) == 1


def session(*requests: dict[str, object]) -> str:
    return json.dumps({"block_size": 64, "requests": requests})


def asked(at: float, num_tokens: int, hash_ids: list[int]) -> dict[str, object]:
    return {"t": at, "in": num_tokens, "hash_ids": hash_ids}


def test_sessions_share_nothing_and_subagents_share_their_session(
    tmp_path: Path,
) -> None:
    subagent = {"type": "subagent", "t": 1.0, "requests": [asked(2.0, 128, [1, 3])]}
    first = session(asked(0.0, 150, [1, 2]), subagent, asked(9.0, 192, [1, 2, 4]))
    (tmp_path / "a.json").write_text(first)
    (tmp_path / "b.json").write_text(session(asked(0.0, 128, [1, 2])))

    trace = read_trace(tmp_path)

    prompts = [trace.token_ids(request) for request in trace.requests]
    assert [len(prompt) for prompt in prompts] == [150, 128, 192, 128]
    assert shared(prompts[0], prompts[1]) == 64
    # What is in no block is not known to come again.
    assert shared(prompts[0], prompts[2]) == 128
    assert shared(prompts[0], prompts[3]) == 0
