"""With a draft model a warm run equals a cold one, and plain mlx-lm."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

from promptcache import CachedGenerator, PrefixStore, PromptCacheWarning, UsageError
from promptcache.models.draft import DraftPair
from tests.helpers import tiny
from tests.helpers.marks import all_but
from tests.helpers.runs import (
    OTHER,
    PROMPT,
    collected,
    largest_difference,
    only_warning,
    stored_token_ids,
)

MAX_TOKENS = 12


@pytest.fixture(scope="module")
def draft_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with other weights, and with other layers than the main one."""
    config = {**tiny.LLAMA, "num_hidden_layers": 1, "num_key_value_heads": 4}
    return tiny.save_model(tmp_path_factory.mktemp("draft"), config, seed=5)


@pytest.fixture(params=["other", "same"])
def draft(request: pytest.FixtureRequest, draft_dir: Path, model_dir: Path) -> Any:
    """A draft model that is rarely right, or always."""
    folder = draft_dir if request.param == "other" else model_dir
    return mlx_lm.load(str(folder))[0]


@pytest.fixture
def other_draft(draft_dir: Path) -> Any:
    return mlx_lm.load(str(draft_dir))[0]


@pytest.fixture
def make_generator(
    tmp_path_factory: pytest.TempPathFactory, store: PrefixStore
) -> Callable[[dict[str, Any]], CachedGenerator]:
    """Return a function that makes a generator of a tiny model."""

    def make(config: dict[str, Any]) -> CachedGenerator:
        folder = tmp_path_factory.mktemp("model")
        return CachedGenerator.load(tiny.save_model(folder, config), store=store)

    return make


def run(generator: CachedGenerator, prompt: Any, draft: Any, **options: Any) -> Any:
    """Run with a draft model, saving nothing unless asked for."""
    options = {"max_tokens": MAX_TOKENS, "save": False, **options}
    return collected(generator.stream_generate(prompt, draft_model=draft, **options))


def cold(generator: CachedGenerator, prompt: Any, draft: Any, **options: Any) -> Any:
    return run(generator, prompt, draft, reuse=False, **options)


def assert_alike(warm: Any, expected: Any) -> None:
    assert warm.tokens == expected.tokens
    assert warm.text == expected.text
    assert largest_difference(warm.logprobs, expected.logprobs) < 1e-4


# Warm equals cold equals plain


@pytest.mark.parametrize("num_tokens", all_but([2, 100], [1, 2, 33, 100]))
@pytest.mark.parametrize("num_draft_tokens", [1, 3])
def test_drafted_run_equals_plain_mlx_lm(
    generator: CachedGenerator, draft: Any, num_tokens: int, num_draft_tokens: int
) -> None:
    options = {"draft_model": draft, "num_draft_tokens": num_draft_tokens}
    prompt = PROMPT[:num_tokens]

    found = list(generator.stream_generate(prompt, MAX_TOKENS, save=True, **options))

    expected = list(
        mlx_lm.stream_generate(
            generator.model, generator.tokenizer, prompt, MAX_TOKENS, **options
        )
    )
    names = ("token", "from_draft", "text", "prompt_tokens", "finish_reason")
    assert [[getattr(r, name) for name in names] for r in found] == [
        [getattr(r, name) for name in names] for r in expected
    ]


def test_draft_that_is_always_right_is_taken(
    generator: CachedGenerator, model_dir: Path
) -> None:
    draft = mlx_lm.load(str(model_dir))[0]
    generator.build(PROMPT, draft_model=draft)

    responses = list(
        generator.stream_generate(PROMPT, MAX_TOKENS, draft_model=draft, save=False)
    )

    # Two of three tokens are the draft's.
    assert [r.from_draft for r in responses] == [True, True, False] * (MAX_TOKENS // 3)
    assert responses[-1].cached_tokens == 99


@pytest.mark.parametrize("step", [16, 33])
def test_long_suffix_is_read_in_pieces_by_both(
    generator: CachedGenerator, other_draft: Any, step: int
) -> None:
    told: list[tuple[int, int]] = []
    generator.build(PROMPT[:20], draft_model=other_draft)

    warm = run(
        generator,
        PROMPT,
        other_draft,
        prefill_step_size=step,
        prompt_progress_callback=lambda *done: told.append(done),
    )

    ends = [*range(20 // step * step + step, 99, step), 99, 100]
    assert told == [(done, 100) for done in [20, *ends]]
    expected = cold(generator, PROMPT, other_draft, prefill_step_size=step)
    assert_alike(warm, expected)


def test_answered_prompt_is_stored_up_to_its_last_token(
    generator: CachedGenerator, store: PrefixStore, other_draft: Any
) -> None:
    run(generator, PROMPT, other_draft, save=True)

    again = run(generator, PROMPT, other_draft, save=True)

    assert stored_token_ids(store) == [PROMPT[:99]]
    assert again.last.cached_tokens == 99


def test_prompt_of_one_token_leaves_nothing_to_store(
    generator: CachedGenerator, store: PrefixStore, other_draft: Any
) -> None:
    run(generator, [65], other_draft, save=True)

    assert stored_token_ids(store) == []


def test_early_close_saves_the_prompt(
    generator: CachedGenerator, store: PrefixStore, other_draft: Any
) -> None:
    responses = generator.stream_generate(
        PROMPT, MAX_TOKENS, draft_model=other_draft, save=True
    )
    next(responses)

    responses.close()

    assert stored_token_ids(store) == [PROMPT[:99]]
    warm = run(generator, PROMPT, other_draft)
    assert_alike(warm, cold(generator, PROMPT, other_draft))


def test_prefix_is_found_with_the_same_draft_only(
    generator: CachedGenerator, draft_dir: Path, model_dir: Path
) -> None:
    first, same, other = (
        mlx_lm.load(str(path))[0] for path in (draft_dir, draft_dir, model_dir)
    )
    generator.build(PROMPT, draft_model=first)

    found = {
        name: generator.match(PROMPT, draft_model=draft).cached_tokens
        for name, draft in {"same": same, "other": other, "none": None}.items()
    }

    assert found == {"same": 99, "other": 0, "none": 0}


def test_prefix_without_a_draft_is_not_found_with_one(
    generator: CachedGenerator, other_draft: Any
) -> None:
    generator.build(PROMPT)

    assert run(generator, PROMPT, other_draft).last.cached_tokens == 0


# Settings


@pytest.mark.parametrize("context_size", [20, 200])
def test_repetition_penalty_looks_into_the_whole_prompt(
    generator: CachedGenerator, draft: Any, context_size: int
) -> None:
    options: dict[str, Any] = {
        "repetition_penalty": 1.8,
        "repetition_context_size": context_size,
    }
    generator.build(PROMPT[:80], draft_model=draft)

    warm = run(generator, PROMPT, draft, **options)

    assert warm.last.cached_tokens == 80
    assert_alike(warm, cold(generator, PROMPT, draft, **options))
    # Greedy speculation never changes what the main model says.
    alone = collected(
        generator.stream_generate(PROMPT, MAX_TOKENS, save=False, **options)
    )
    assert warm.tokens == alone.tokens
    assert warm.tokens != run(generator, PROMPT, draft).tokens


def test_logits_processors_see_the_whole_prompt(
    generator: CachedGenerator, other_draft: Any
) -> None:
    seen: list[list[int]] = []

    def record(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        return logits

    generator.build(PROMPT[:80], draft_model=other_draft)
    warm = run(generator, PROMPT, other_draft, logits_processors=[record])

    assert warm.last.cached_tokens == 80
    assert seen[0] == PROMPT
    assert all(tokens[: len(PROMPT)] == PROMPT for tokens in seen)


def test_sampling_with_a_seed_is_the_same_warm(
    generator: CachedGenerator, draft: Any
) -> None:
    generator.build(PROMPT[:70], draft_model=draft)

    warm = run(generator, PROMPT, draft, temp=1.0, seed=7)

    assert warm.last.cached_tokens == 70
    assert warm.tokens == cold(generator, PROMPT, draft, temp=1.0, seed=7).tokens
    assert warm.tokens != run(generator, PROMPT, draft, temp=1.0, seed=8).tokens


@pytest.mark.parametrize("start", [0, 60])
@pytest.mark.parametrize("num_stored", all_but([80], [50, 80, 100]))
def test_quantized_drafted_run_is_the_same_warm(
    generator: CachedGenerator, other_draft: Any, start: int, num_stored: int
) -> None:
    kv: dict[str, Any] = {
        "kv_bits": 8,
        "kv_group_size": 32,
        "quantized_kv_start": start,
    }
    generator.build(PROMPT[:num_stored], draft_model=other_draft, **kv)

    warm = run(generator, PROMPT, other_draft, **kv)

    assert warm.last.cached_tokens > 0
    assert warm.tokens == cold(generator, PROMPT, other_draft, **kv).tokens


@pytest.mark.parametrize("step", [32, 64])
def test_exact_drafted_run_of_a_built_prompt_reads_its_last_token_once(
    generator: CachedGenerator, draft: Any, step: int
) -> None:
    options: dict[str, Any] = {"exact": True, "prefill_step_size": step}
    generator.build(PROMPT, draft_model=draft, **options)

    warm = run(generator, PROMPT, draft, **options)

    assert warm.last.cached_tokens < len(PROMPT)
    assert_alike(warm, cold(generator, PROMPT, draft, **options))


# What cannot be done


@pytest.mark.parametrize("hybrid_is", ["main", "draft"])
def test_model_that_cannot_take_tokens_back_is_refused_at_once(
    make_generator: Callable[[dict[str, Any]], CachedGenerator], hybrid_is: str
) -> None:
    hybrid = make_generator(tiny.QWEN3_NEXT)
    plain = make_generator(tiny.LLAMA)
    main, draft = (hybrid, plain) if hybrid_is == "main" else (plain, hybrid)

    with pytest.raises(UsageError, match="which a ArraysCache cannot, leave the draft"):
        main.stream_generate(PROMPT, draft_model=draft.model)


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "is_allowed"),
    [(10, 19, True), (10, 20, False), (29, 1, False), (10, -1, False), (100, 1, False)],
)
@pytest.mark.parametrize("windowed_is", ["main", "draft"])
def test_window_that_would_wrap_is_refused_at_once(
    make_generator: Callable[[dict[str, Any]], CachedGenerator],
    windowed_is: str,
    num_tokens: int,
    max_tokens: int,
    is_allowed: bool,
) -> None:
    windowed = make_generator(tiny.GEMMA3)
    plain = make_generator(tiny.LLAMA)
    main, draft = (windowed, plain) if windowed_is == "main" else (plain, windowed)

    def answer() -> Any:
        return main.stream_generate(
            PROMPT[:num_tokens], max_tokens, draft_model=draft.model, save=False
        )

    if is_allowed:
        assert list(answer())
    else:
        with pytest.raises(
            UsageError, match="a RotatingKVCache cannot beyond its window of 32 tokens"
        ):
            answer()


@pytest.mark.parametrize("windowed_is", ["main", "draft"])
def test_window_that_does_not_wrap_runs_warm(
    make_generator: Callable[[dict[str, Any]], CachedGenerator], windowed_is: str
) -> None:
    windowed = make_generator(tiny.GEMMA3)
    plain = make_generator(tiny.LLAMA)
    main, draft = (windowed, plain) if windowed_is == "main" else (plain, windowed)
    run(main, PROMPT[:12], draft.model, save=True, max_tokens=10)

    warm = run(main, [*PROMPT[:9], *OTHER[:3]], draft.model, max_tokens=15)

    assert warm.last.cached_tokens == 9
    prompt = [*PROMPT[:9], *OTHER[:3]]
    assert_alike(warm, cold(main, prompt, draft.model, max_tokens=15))


def test_input_embeddings_with_a_draft_are_refused(
    generator: CachedGenerator, other_draft: Any
) -> None:
    embeddings = generator.model.model.embed_tokens(mx.array(OTHER))

    with pytest.raises(UsageError, match="no input_embeddings with a draft"):
        generator.stream_generate(
            PROMPT, draft_model=other_draft, input_embeddings=embeddings
        )


def test_trouble_with_the_store_is_one_warning_and_the_right_tokens(
    generator: CachedGenerator, store: PrefixStore, other_draft: Any
) -> None:
    run(generator, PROMPT, other_draft, save=True)
    for path in store.path.glob("blobs/*/*.safetensors"):
        path.write_bytes(b"garbage")

    with pytest.warns(PromptCacheWarning) as record:
        warm = run(generator, PROMPT, other_draft)

    assert "read again" in only_warning(record)
    assert warm.last.cached_tokens == 0
    assert_alike(warm, cold(generator, PROMPT, other_draft))


# The pair


def test_pair_has_one_cache_and_splits_it(
    make_generator: Callable[[dict[str, Any]], CachedGenerator], model_dir: Path
) -> None:
    windowed = make_generator(tiny.GEMMA3).model
    draft = mlx_lm.load(str(model_dir))[0]
    pair = DraftPair(windowed, draft)

    cache = pair.make_cache()
    logits = pair(mx.array(PROMPT[:5])[None], cache=cache)

    classes = [type(part) for part in cache]
    assert classes == [RotatingKVCache, KVCache] * 2 + [KVCache] * 2
    assert [part.offset for part in cache] == [5] * 6
    alone = windowed(mx.array(PROMPT[:5])[None], cache=windowed.make_cache())
    assert mx.array_equal(logits, alone)
    assert set(map(id, draft.modules())) < set(map(id, pair.modules()))
