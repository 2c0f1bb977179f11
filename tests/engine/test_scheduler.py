"""Many requests at once: their answers are those of single runs, whatever happens."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load_tokenizer

from promptcache import CachedGenerator, UsageError
from tests.architectures import architectures
from tests.helpers import tiny
from tests.helpers.listening import Requests
from tests.helpers.marks import all_but
from tests.helpers.runs import cold, ids

MEMORY_LIMIT = 64 * 10**6
SYSTEM = ids(90, seed=5)
MODELS = ("llama", "gemma3_text", "qwen3_next", "mamba", "dynamic")


@pytest.fixture
def make_requests(
    make_model: Callable[[str], Path], tmp_path: Path
) -> Iterator[Callable[..., Requests]]:
    """Return a function that makes a scheduler for a tiny model."""
    opened: list[CachedGenerator] = []

    def make(name: str = "llama", **options: Any) -> Requests:
        generator = CachedGenerator.load(
            make_model(name),
            store=tmp_path / "store",
            memory_limit=MEMORY_LIMIT,
            save=True,
        )
        opened.append(generator)
        return Requests(generator, **options)

    yield make
    for generator in opened:
        generator.close()


class CountedModel:
    """A model that counts its passes, and may fail in one of them."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.shapes: list[tuple[int, int]] = []
        self.fail_at = -1

    def __call__(self, tokens: mx.array, *args: Any, **kwargs: Any) -> Any:
        self.shapes.append(tokens.shape)
        if len(self.shapes) - 1 == self.fail_at:
            raise RuntimeError("out of memory")
        return self._model(tokens, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def counted(requests: Requests) -> CountedModel:
    """Count the passes of the model that a scheduler runs."""
    model = CountedModel(requests.generator.model)
    requests.generator.loaded.model = model
    requests.scheduler._batch._model = model
    return model


@pytest.mark.parametrize("name", all_but(["llama", "qwen3_next"], MODELS))
def test_answers_are_those_of_single_runs(
    make_requests: Callable[..., Requests], name: str
) -> None:
    requests = make_requests(name)
    prompts = [[*SYSTEM, *ids(n, seed=n)] for n in (1, 3, 30, 31, 33, 70, 200, 3)]
    heard = []
    for prompt in prompts:
        heard.append(requests.submit(prompt, 24)[1])
        # Others join at any time.
        requests.scheduler.step()
    requests.scheduler.run_all()

    expected = [cold(requests.generator, prompt).tokens for prompt in prompts]
    assert [each.tokens for each in heard] == expected
    assert {each.finish_reason for each in heard} <= {"stop", "length"}
    assert all(each.ends == [None] for each in heard)


def test_seeds_are_each_requests_own(make_requests: Callable[..., Requests]) -> None:
    requests = make_requests()
    prompt = ids(40)
    seeds = (7, 8, None, 7, 2**64 - 1)
    heard = [requests.submit(prompt, 20, temp=1.0, seed=seed)[1] for seed in seeds]
    requests.scheduler.run_all()

    for seed, each in zip(seeds, heard, strict=True):
        if seed is not None:
            alone = cold(requests.generator, prompt, max_tokens=20, temp=1.0, seed=seed)
            assert each.tokens == alone.tokens
    assert len({tuple(each.tokens) for each in heard}) == 4


# The first has no other rows than those of its windows, of 32 tokens; the second has
# layers that keep nothing.
@pytest.mark.parametrize("name", ["recurrent_gemma", "nemotron-nas"])
def test_answer_longer_than_a_window_misleads_nobody(tmp_path: Path, name: str) -> None:
    model = architectures.build(name)
    tokenizer = load_tokenizer(tiny.save_model(tmp_path / "tiny", tiny.LLAMA))
    with CachedGenerator(
        model, tokenizer, store=tmp_path / "store", memory_limit=MEMORY_LIMIT, save=True
    ) as generator:
        requests = Requests(generator)
        prompts = [ids(40, seed=n) for n in range(3)]
        heard = [requests.submit(prompt, 80, save_answer=True)[1] for prompt in prompts]
        requests.scheduler.run_all()

        for prompt, each in zip(prompts, heard, strict=True):
            assert each.ends == [None]
            for longer in ([*prompt, *ids(5, seed=9)], [*prompt, *each.tokens, 7]):
                _, again = requests.submit(longer, 12, save=False)
                requests.scheduler.run_all()
                assert again.tokens == cold(generator, longer, max_tokens=12).tokens


@pytest.mark.parametrize(
    "options",
    [
        {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0},
        {"max_kv_size": 40},
        {"exact": True, "prefill_step_size": 64},
    ],
)
def test_what_a_batch_cannot_do_is_answered_beside_it(
    make_requests: Callable[..., Requests], options: dict[str, Any]
) -> None:
    requests = make_requests()
    prompt = ids(100)
    heard = [
        requests.submit(prompt, 24, **some)[1]
        for some in (options, {}, options, {"repetition_penalty": 1.3})
    ]
    requests.scheduler.run_all()

    expected = [
        cold(requests.generator, prompt, **some).tokens
        for some in (options, {}, options, {"repetition_penalty": 1.3})
    ]
    assert [each.tokens for each in heard] == expected


def test_draft_is_answered_beside_a_batch(
    make_requests: Callable[..., Requests], make_model: Callable[[str], Path]
) -> None:
    requests = make_requests()
    draft = requests.generator.load_draft(make_model("draft"))
    prompt = ids(100)
    heard = [
        requests.submit(prompt, 24, draft_model=model)[1]
        for model in (None, draft, None)
    ]
    requests.scheduler.run_all()

    expected = cold(requests.generator, prompt).tokens
    assert [each.tokens for each in heard] == [expected] * 3


def test_shared_prefix_is_read_once(make_requests: Callable[..., Requests]) -> None:
    requests = make_requests()
    model = counted(requests)
    heard = [requests.submit([*SYSTEM, *ids(9, seed=n)], 2)[1] for n in range(8)]
    requests.scheduler.run_all()

    assert sorted(each.cached_tokens or 0 for each in heard)[1] >= len(SYSTEM)
    num_read = sum(rows * length for rows, length in model.shapes if length > 1)
    assert num_read <= len(SYSTEM) + 8 * 9


def test_warm_prompt_takes_one_pass_to_its_first_token(
    make_requests: Callable[..., Requests],
) -> None:
    requests = make_requests()
    prompt = ids(200)
    requests.submit(prompt, 2)
    requests.scheduler.run_all()
    model = counted(requests)

    _, heard = requests.submit([*prompt, *ids(7, seed=3)], 1)
    requests.scheduler.run_all()

    assert heard.cached_tokens == 200
    assert model.shapes == [(1, 7)]


def test_short_prompt_does_not_wait_behind_a_long_one(
    make_requests: Callable[..., Requests],
) -> None:
    requests = make_requests()
    model = counted(requests)
    _, long = requests.submit(ids(4000), 2, prefill_step_size=100)
    while len(model.shapes) < 5:
        requests.scheduler.step()
    before = len(model.shapes)

    _, short = requests.submit(ids(20, seed=9), 2)
    while not short.tokens:
        requests.scheduler.step()

    # At most two pieces of the long one come first.
    lengths = [length for _, length in model.shapes[before:]]
    assert [length <= 20 for length in lengths].index(True) <= 2
    assert not long.tokens
    requests.scheduler.run_all()
    assert long.ends == [None]


def test_long_prompt_is_not_kept_waiting_by_short_ones(
    make_requests: Callable[..., Requests],
) -> None:
    requests = make_requests()
    _, long = requests.submit(ids(2000), 2, prefill_step_size=100)
    num_short = 0
    while not long.tokens:
        requests.submit(ids(150, seed=num_short), 1, prefill_step_size=50)
        num_short += 1
        requests.scheduler.step()
        assert num_short < 400


# Cancelling


@pytest.mark.parametrize("num_steps", all_but([0, 3, 12], range(0, 16, 3)))
def test_cancelled_request_ends_at_its_next_step_and_disturbs_no_other(
    make_requests: Callable[..., Requests], num_steps: int
) -> None:
    requests = make_requests()
    cancelled, unwanted = requests.submit(ids(500), 400, prefill_step_size=100)
    _, other = requests.submit(ids(100, seed=3), 24)
    for _ in range(num_steps):
        requests.scheduler.step()
    requests.scheduler.cancel(cancelled)
    # Its prefix may be loading; nothing is read or generated for it any more.
    num_tokens = len(unwanted.tokens)
    requests.scheduler.run_all()

    assert len(unwanted.tokens) == num_tokens
    assert unwanted.ends == [None]
    assert other.tokens == cold(requests.generator, ids(100, seed=3)).tokens


@pytest.mark.parametrize("with_other", [False, True])
def test_what_was_read_of_a_cancelled_prompt_is_kept(
    make_requests: Callable[..., Requests], with_other: bool
) -> None:
    requests = make_requests()
    prompt = ids(900)
    if with_other:
        requests.submit(ids(50, seed=4), 60)
    run, _ = requests.submit(prompt, 5, prefill_step_size=100)
    while run.num_read < 500:
        requests.scheduler.step()
    requests.scheduler.cancel(run)
    requests.scheduler.run_all()

    _, heard = requests.submit(prompt, 5, prefill_step_size=100)
    requests.scheduler.run_all()
    assert heard.cached_tokens is not None and heard.cached_tokens >= 500
    store = requests.generator.store
    assert store is not None
    match = store.lookup(prompt, requests.generator.fingerprint())
    assert match.cached_tokens >= 500


def test_listener_that_has_enough_ends_its_request(
    make_requests: Callable[..., Requests],
) -> None:
    requests = make_requests()
    heard = [
        requests.submit(ids(60, seed=n), 50, stop_after=after)[1]
        for n, after in enumerate((1, 5, None, 9))
    ]
    requests.scheduler.run_all()

    for n, (each, after) in enumerate(zip(heard, (1, 5, None, 9), strict=True)):
        expected = cold(requests.generator, ids(60, seed=n), max_tokens=50).tokens
        assert each.tokens == expected[:after]
        assert each.ends == [None]


@pytest.mark.filterwarnings("ignore:the prompt is not saved")
@pytest.mark.parametrize("is_alone", [True, False])
def test_model_that_changes_under_a_request_leaves_nothing(
    make_requests: Callable[..., Requests], is_alone: bool
) -> None:
    requests = make_requests()
    prompt = ids(300)
    _, heard = requests.submit(prompt, 30, prefill_step_size=100)
    if not is_alone:
        requests.submit(ids(50, seed=2), 60)
    while len(heard.tokens) < 5:
        requests.scheduler.step()
    requests.generator.model.set_dtype(mx.bfloat16)
    requests.scheduler.run_all()

    for _ in range(2):
        _, again = requests.submit(prompt, 5)
        requests.scheduler.run_all()
        assert again.tokens == cold(requests.generator, prompt, max_tokens=5).tokens
        requests.generator.model.set_dtype(mx.float32)
    assert again.cached_tokens == 0


# Errors


def failing_sampler(at: int) -> Callable[[mx.array], mx.array]:
    """Return a sampler that fails when it is called for this token."""
    calls = iter(range(10**6))

    def sample(logprobs: mx.array) -> mx.array:
        if next(calls) == at:
            raise ValueError("nothing to sample from")
        return mx.argmax(logprobs, axis=-1)

    return sample


def failing_processor(at: int) -> Callable[[mx.array, mx.array], mx.array]:
    calls = iter(range(10**6))

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        if next(calls) == at:
            raise TypeError("what is this?")
        return logits

    return process


@pytest.mark.parametrize("at", all_but([0, 5], [0, 1, 2, 5]))
@pytest.mark.parametrize("kind", ["sampler", "logits_processors"])
def test_error_of_a_request_is_its_own(
    make_requests: Callable[..., Requests], kind: str, at: int
) -> None:
    requests = make_requests()
    options: dict[str, Any] = {
        "sampler": {"sampler": failing_sampler(at)},
        "logits_processors": {"logits_processors": [failing_processor(at)]},
    }[kind]
    _, wrong = requests.submit(ids(50), 20, **options)
    others = [requests.submit(ids(50, seed=n), 20)[1] for n in (3, 4)]
    requests.scheduler.run_all()

    [error] = wrong.ends
    assert isinstance(error, UsageError | ValueError | TypeError)
    for n, heard in zip((3, 4), others, strict=True):
        expected = cold(requests.generator, ids(50, seed=n), max_tokens=20)
        assert heard.tokens == expected.tokens
        assert heard.ends == [None]


@pytest.mark.filterwarnings("ignore:a batch has failed")
@pytest.mark.parametrize("fail_at", all_but([1, 6, 12], range(0, 20, 3)))
def test_failing_pass_ends_at_most_one_request(
    make_requests: Callable[..., Requests], fail_at: int
) -> None:
    requests = make_requests()
    model = counted(requests)
    model.fail_at = fail_at
    heard = [requests.submit(ids(50, seed=n), 20)[1] for n in range(3)]
    requests.scheduler.run_all()

    requests.generator.loaded.model = requests.generator.model
    failed = [each for each in heard if each.ends != [None]]
    assert len(failed) <= 1
    for n, each in enumerate(heard):
        expected = cold(requests.generator, ids(50, seed=n), max_tokens=20).tokens
        if each in failed:
            assert expected[: len(each.tokens)] == each.tokens
        else:
            assert each.tokens == expected


@pytest.mark.filterwarnings("ignore::promptcache.PromptCacheWarning")
@pytest.mark.parametrize("seed", all_but(range(2), range(12)))
def test_nothing_that_some_do_changes_what_others_get(
    make_requests: Callable[..., Requests], seed: int
) -> None:
    chance = random.Random(seed)
    requests = make_requests(chance.choice(MODELS), max_decoding=5, max_reading=3)
    model = counted(requests)
    prompts = [
        [*SYSTEM[: chance.choice([0, 40, 90])], *ids(chance.randrange(1, 250), seed=n)]
        for n in range(12)
    ]
    asked = []
    for _ in range(40):
        n, limit = chance.randrange(len(prompts)), chance.randrange(1, 30)
        options = chance.choice(
            [
                *([{}] * 6),
                {"sampler": failing_sampler(chance.randrange(9))},
                {"logits_processors": [failing_processor(chance.randrange(9))]},
                {"kv_bits": 8, "kv_group_size": 32},
                {"save": False},
                {"reuse": False},
            ]
        )
        step = chance.choice([20, 64, 2048])
        stop_after = chance.choice([None, None, None, 3])
        run, heard = requests.submit(
            prompts[n], limit, stop_after=stop_after, prefill_step_size=step, **options
        )
        for _ in range(chance.randrange(6)):
            requests.scheduler.step()
        if is_cancelled := chance.random() < 0.2:
            requests.scheduler.cancel(run)
        asked.append((n, limit, options, step, heard, stop_after, is_cancelled))
        if chance.random() < 0.05:
            model.fail_at = len(model.shapes) + chance.randrange(9)
    requests.scheduler.run_all()

    requests.generator.loaded.model = requests.generator.model
    for n, limit, options, step, heard, stop_after, is_cancelled in asked:
        [error] = heard.ends
        if "sampler" in options or "logits_processors" in options:
            options = {}
        expected = cold(
            requests.generator,
            prompts[n],
            max_tokens=limit,
            prefill_step_size=step,
            **{k: v for k, v in options.items() if k.startswith("kv")},
        ).tokens
        is_whole = error is None and not is_cancelled
        stop = min(stop_after or limit, limit) if is_whole else len(heard.tokens)
        assert heard.tokens == expected[:stop]
