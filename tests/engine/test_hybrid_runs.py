"""Models that only a checkpoint can resume."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from promptcache import CachedGenerator, PrefixStore, PromptCacheWarning
from promptcache.store.blobs.folder import BlobFolder
from tests.helpers import tiny
from tests.helpers.runs import (
    MAX_TOKENS,
    OTHER,
    PROMPT,
    QUANTIZED,
    cold,
    ids,
    largest_difference,
    only_warning,
    plain,
    run,
)
from tests.helpers.segments import flip


@pytest.fixture(scope="module")
def hybrid_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("hybrid"), tiny.QWEN3_NEXT)


@pytest.fixture
def hybrid(hybrid_dir: Path, store: PrefixStore) -> CachedGenerator:
    """A generator whose model has linear attention in every other layer."""
    return CachedGenerator.load(hybrid_dir, store=store)


@pytest.fixture
def calls(hybrid: CachedGenerator, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many tokens the model reads with each call."""
    noted: list[int] = []
    model_class = type(hybrid.model)
    call = model_class.__call__

    def noting(model: Any, inputs: mx.array, *args: Any, **kwargs: Any) -> Any:
        noted.append(inputs.size)
        return call(model, inputs, *args, **kwargs)

    monkeypatch.setattr(model_class, "__call__", noting)
    return noted


def chat(*contents: str) -> list[dict[str, str]]:
    """Return a system message, and what user and assistant say in turns."""
    roles = ["system", *(["user", "assistant"] * len(contents))]
    return [
        {"role": role, "content": content}
        for role, content in zip(roles, contents, strict=False)
    ]


FIRST_TURN = chat("You narrate. " * 5, "I open the door. " * 8)


SECOND_TURN = [
    *FIRST_TURN,
    {"role": "assistant", "content": "It is dark. " * 8},
    {"role": "user", "content": "I light a torch."},
]


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1], FIRST_TURN], ids=len)
def test_prompt_that_was_answered_costs_its_last_token(
    hybrid: CachedGenerator, calls: list[int], prompt: Any
) -> None:
    first = run(hybrid, prompt, save=True)
    num_read = sum(calls)
    calls.clear()
    steps: list[tuple[int, int]] = []

    again = run(
        hybrid, prompt, prompt_progress_callback=lambda *done: steps.append(done)
    )

    num_tokens = again.last.prompt_tokens
    assert first.last.cached_tokens == 0
    assert again.last.cached_tokens == num_tokens - 1
    assert num_read == num_tokens + MAX_TOKENS - 1
    assert calls == [1] * MAX_TOKENS
    assert steps == [(num_tokens - 1, num_tokens), (num_tokens, num_tokens)]
    assert again.tokens == first.tokens
    assert largest_difference(again.logprobs, first.logprobs) == 0.0


def test_prompt_that_was_built_costs_its_last_token(
    hybrid: CachedGenerator, calls: list[int]
) -> None:
    hybrid.build(PROMPT)
    assert sum(calls) == len(PROMPT) - 1
    calls.clear()

    warm = run(hybrid, PROMPT)

    assert warm.last.cached_tokens == len(PROMPT) - 1
    assert calls == [1] * MAX_TOKENS
    expected = cold(hybrid, PROMPT)
    assert warm.tokens == expected.tokens
    assert largest_difference(warm.logprobs, expected.logprobs) == 0.0


def test_prefix_that_was_built_is_not_read_again(
    hybrid: CachedGenerator, calls: list[int]
) -> None:
    first = hybrid.build(PROMPT, prefill_step_size=32)
    calls.clear()

    again = hybrid.build(PROMPT, prefill_step_size=32)

    assert (first.cached_tokens, again.cached_tokens) == (0, len(PROMPT) - 1)
    assert calls == []


def test_second_turn_reads_that_turn_only(
    hybrid: CachedGenerator, calls: list[int]
) -> None:
    first = run(hybrid, FIRST_TURN, save=True, max_tokens=1)
    calls.clear()

    second = run(hybrid, SECOND_TURN, max_tokens=1)

    num_first, num_second = first.last.prompt_tokens, second.last.prompt_tokens
    # The state is taken before the last token, which is read alone.
    assert second.last.cached_tokens == num_first - 1
    assert sum(calls) == num_second - num_first + 1
    expected = cold(hybrid, SECOND_TURN, max_tokens=1)
    assert second.tokens == expected.tokens
    assert largest_difference(second.logprobs, expected.logprobs) < 1e-4


THINKING_TEMPLATE = tiny.CHAT_TEMPLATE.replace(
    "{% if add_generation_prompt %}<|assistant|>",
    "{% if add_generation_prompt %}<|assistant|><think>",
)


def test_second_turn_resumes_where_the_answer_begins_if_thinking_is_dropped(
    hybrid_dir: Path, store: PrefixStore, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(hybrid_dir, tmp_path / "thinking"))
    tiny.save_tokenizer(folder, THINKING_TEMPLATE)
    generator = CachedGenerator.load(folder, store=store)
    first = run(generator, FIRST_TURN, save=True)
    start_of_answer = first.last.prompt_tokens - len(
        generator.tokenizer.encode("<think>", add_special_tokens=False)
    )

    second = run(generator, SECOND_TURN, save=True)
    third = run(generator, [*SECOND_TURN[:3], SECOND_TURN[1]])

    assert second.last.cached_tokens == start_of_answer
    assert second.tokens == cold(generator, SECOND_TURN).tokens
    assert third.last.cached_tokens >= start_of_answer
    assert third.tokens == cold(generator, [*SECOND_TURN[:3], SECOND_TURN[1]]).tokens


def test_chat_after_its_built_system_reads_the_rest_only(
    hybrid: CachedGenerator, calls: list[int]
) -> None:
    built = hybrid.build(system=FIRST_TURN[0]["content"])
    calls.clear()

    warm = run(hybrid, FIRST_TURN, max_tokens=1)

    assert warm.last.cached_tokens == built.num_tokens
    assert sum(calls) == warm.last.prompt_tokens - built.num_tokens
    expected = cold(hybrid, FIRST_TURN, max_tokens=1)
    assert largest_difference(warm.logprobs, expected.logprobs) == 0.0


def checkpoint_paths(store: PrefixStore) -> list[Path]:
    """Return the blobs of checkpoints, the deepest first."""
    blobs = BlobFolder(store.path)
    infos = [blobs.read_header(key).info for key, _ in blobs.stored()]
    deepest = sorted(infos, key=lambda info: -info.end)
    return [blobs.path(info.key) for info in deepest if info.is_checkpoint]


@pytest.mark.parametrize("damage", ["flipped", "deleted"])
def test_damaged_checkpoint_is_one_warning_and_the_right_tokens(
    hybrid: CachedGenerator, store: PrefixStore, damage: str
) -> None:
    run(hybrid, FIRST_TURN, save=True)
    path = checkpoint_paths(store)[0]
    path.unlink() if damage == "deleted" else flip(path)

    with pytest.warns(PromptCacheWarning) as record:
        warm = run(hybrid, FIRST_TURN, save=True)
    healed = run(hybrid, FIRST_TURN)

    assert "read again" in only_warning(record)
    assert 0 < warm.last.cached_tokens < warm.last.prompt_tokens
    assert healed.last.cached_tokens == healed.last.prompt_tokens - 1
    expected = cold(hybrid, FIRST_TURN).tokens
    assert warm.tokens == healed.tokens == expected
    assert store.verify().is_sound


def test_all_checkpoints_damaged_is_a_warning_each_and_the_right_tokens(
    hybrid: CachedGenerator, store: PrefixStore
) -> None:
    run(hybrid, FIRST_TURN, save=True)
    paths = checkpoint_paths(store)
    for path in paths:
        flip(path)

    with pytest.warns(PromptCacheWarning) as record:
        warm = run(hybrid, FIRST_TURN)

    assert len(record) == len(paths) > 1
    assert warm.last.cached_tokens == 0
    assert warm.tokens == cold(hybrid, FIRST_TURN).tokens


def test_checkpoint_over_the_size_limit_is_one_warning_and_the_right_tokens(
    hybrid_dir: Path, tmp_path: Path
) -> None:
    store = PrefixStore(tmp_path / "small", max_nbytes=200_000)
    generator = CachedGenerator.load(hybrid_dir, store=store)

    with pytest.warns(PromptCacheWarning) as record:
        tokens = run(generator, ids(300), save=True).tokens

    assert "limit" in only_warning(record)
    assert tokens == cold(generator, ids(300)).tokens
    assert store.total_nbytes() <= 200_000
    store.close()


def test_early_close_keeps_what_was_read(hybrid: CachedGenerator) -> None:
    responses = hybrid.stream_generate(PROMPT, MAX_TOKENS, save=True)
    next(responses)

    responses.close()

    warm = run(hybrid, PROMPT)
    assert warm.last.cached_tokens == len(PROMPT) - 1
    assert warm.tokens == cold(hybrid, PROMPT).tokens


def test_interrupted_build_resumes_at_its_last_piece(hybrid: CachedGenerator) -> None:
    def interrupt(done: int, _: int) -> None:
        if done >= 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hybrid.build(PROMPT, prefill_step_size=32, prompt_progress_callback=interrupt)

    built = hybrid.build(PROMPT, prefill_step_size=32)

    assert built.cached_tokens == 64
    warm = run(hybrid, PROMPT, prefill_step_size=32)
    expected = cold(hybrid, PROMPT, prefill_step_size=32)
    assert warm.last.cached_tokens == len(PROMPT) - 1
    assert largest_difference(warm.logprobs, expected.logprobs) == 0.0


def test_match_tells_all_but_the_last_token(hybrid: CachedGenerator) -> None:
    key = hybrid.build(PROMPT).key

    assert hybrid.match(PROMPT).cached_tokens == len(PROMPT) - 1
    assert hybrid.match([*PROMPT, 1]).cached_tokens == len(PROMPT) - 1
    assert hybrid.match([*PROMPT, 1]).key == key
    assert hybrid.match(PROMPT[:99]).cached_tokens == 0


def test_hybrid_logprobs_equal_plain_ones_to_the_bit(hybrid: CachedGenerator) -> None:
    saved = run(hybrid, PROMPT, save=True)
    again = run(hybrid, PROMPT)

    expected = plain(hybrid, PROMPT)
    assert saved.tokens == again.tokens == expected.tokens
    assert largest_difference(again.logprobs, expected.logprobs) == 0.0


def test_hybrid_samples_the_same_warm(hybrid: CachedGenerator) -> None:
    options: dict[str, Any] = {"temp": 1.0, "seed": 7, "repetition_penalty": 1.5}
    first = run(hybrid, PROMPT, save=True, **options)

    again = run(hybrid, PROMPT, **options)

    assert again.last.cached_tokens == len(PROMPT) - 1
    assert again.tokens == first.tokens == cold(hybrid, PROMPT, **options).tokens


@pytest.mark.parametrize("kv", QUANTIZED)
def test_quantized_hybrid_runs_warm(
    hybrid: CachedGenerator, kv: dict[str, Any]
) -> None:
    longer, kv = [*PROMPT, *OTHER], {**kv, "max_tokens": 8}
    run(hybrid, PROMPT, save=True, prefill_step_size=32, **kv)

    again = run(hybrid, PROMPT, prefill_step_size=32, **kv)
    warm = run(hybrid, longer, prefill_step_size=32, **kv)

    assert again.tokens == cold(hybrid, PROMPT, prefill_step_size=32, **kv).tokens
    assert warm.tokens == cold(hybrid, longer, prefill_step_size=32, **kv).tokens
    assert warm.last.cached_tokens >= 96
