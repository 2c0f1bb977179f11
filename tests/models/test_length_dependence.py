"""Models whose values depend on the length are resumed where it makes no difference."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest

from promptcache import CachedGenerator, PrefixStore, PromptCacheWarning, UsageError
from promptcache.models.length_dependence import LengthDependence, length_dependence
from promptcache.models.settings import Settings
from tests.helpers import runs, tiny
from tests.helpers.marks import all_but
from tests.helpers.runs import OTHER, PROMPT, Run, ids, largest_difference

MAX_POSITION = 64
DYNAMIC = {
    **tiny.LLAMA,
    "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    "max_position_embeddings": MAX_POSITION,
}
# Unlike Llama it leaves it to mlx-lm to make a cache, which `max_kv_size` limits.
QWEN3 = {**tiny.LLAMA, "model_type": "qwen3"}
# mlx-lm has no way to quantize any part of its cache.
MAMBA = {
    "model_type": "mamba",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "state_size": 16,
    "num_hidden_layers": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 4,
}
CONFIGS = {
    "dynamic": DYNAMIC,
    "llama": tiny.LLAMA,
    "qwen3": QWEN3,
    "gemma3_text": tiny.GEMMA3,
    "mamba": MAMBA,
}

LONG = ids(300, seed=3)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that saves a tiny model once."""
    folders: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            folders[name] = tiny.save_model(folder, CONFIGS[name])
        return folders[name]

    return save


@pytest.fixture
def make_generator(
    folder_of: Callable[[str], Path], store: PrefixStore
) -> Callable[[str], CachedGenerator]:
    """Return a function that loads a tiny model."""
    return lambda name: CachedGenerator.load(folder_of(name), store=store)


@pytest.fixture
def dynamic(make_generator: Callable[[str], CachedGenerator]) -> CachedGenerator:
    """A generator whose model has a rope that depends on the length beyond 64."""
    return make_generator("dynamic")


@pytest.fixture
def limited(make_generator: Callable[[str], CachedGenerator]) -> CachedGenerator:
    """A generator whose cache can be limited."""
    return make_generator("qwen3")


def run(generator: CachedGenerator, prompt: Any, **options: Any) -> Run:
    """Run with the store, saving nothing unless asked for."""
    return runs.run(generator, prompt, **{"max_tokens": 8, **options})


def cold(generator: CachedGenerator, prompt: Any, **options: Any) -> Run:
    """Run without the store."""
    return runs.cold(generator, prompt, **{"max_tokens": 8, **options})


def plain(generator: CachedGenerator, prompt: Any, **options: Any) -> Run:
    """Run plain mlx-lm."""
    return runs.plain(generator, prompt, **{"max_tokens": 8, **options})


def assert_equal(warm: Run, expected: Run) -> None:
    """Check that two runs are the same to the bit."""
    assert warm.tokens == expected.tokens
    assert largest_difference(warm.logprobs, expected.logprobs) == 0.0


def build(generator: CachedGenerator, prompt: Any, **options: Any) -> list[str]:
    """Build, and return what it warned of, or why there is nothing to build."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always", PromptCacheWarning)
        try:
            generator.build(prompt, **options)
        except UsageError as error:
            return [str(error)]
    return [str(w.message) for w in record]


def last_kept(num_tokens: int, step: int, exact_after: int = 0) -> int:
    """Return up to where a prompt is kept whose last token is read alone."""
    if num_tokens <= exact_after:
        return num_tokens
    return max((num_tokens - 1) // step * step, exact_after)


# Which models


def test_dynamic_rope_depends_on_the_length_beyond_its_positions(
    dynamic: CachedGenerator,
) -> None:
    found = length_dependence(dynamic.model)

    assert found == LengthDependence(
        MAX_POSITION, "its dynamic rope depends on the length beyond 64 tokens"
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "mamba"])
def test_other_models_do_not_depend_on_the_length(
    folder_of: Callable[[str], Path], name: str
) -> None:
    assert length_dependence(mlx_lm.load(str(folder_of(name)))[0]) is None


def module_of(name: str) -> nn.Module:
    """Return a layer of a class that a module of mlx-lm defines."""
    return type("Attention", (nn.Module,), {"__module__": f"mlx_lm.models.{name}"})()


@pytest.mark.parametrize(
    ("name", "reason"), [("phi3small", "block-sparse mask"), ("plamo3", "one token")]
)
def test_model_whose_mask_reaches_further_depends_on_every_length(
    name: str, reason: str
) -> None:
    model = nn.Sequential(module_of("llama"), module_of(name))

    found = length_dependence(model)

    assert found is not None
    assert found.start == 0
    assert reason in found.reason


def test_part_that_depends_first_counts(dynamic: CachedGenerator) -> None:
    model = nn.Sequential(dynamic.model, module_of("phi3small"))

    found = length_dependence(model)

    assert found is not None
    assert found.start == 0


# A model with a dynamic rope


@pytest.mark.parametrize("num_tokens", all_but([65, 96], [65, 95, 96, 97, 128, 200]))
@pytest.mark.parametrize("step", all_but([32], [32, 2048]))
def test_same_prompt_again_is_known_to_the_bit(
    dynamic: CachedGenerator, num_tokens: int, step: int
) -> None:
    prompt = LONG[:num_tokens]
    first = run(dynamic, prompt, save=True, prefill_step_size=step)

    again = run(dynamic, prompt, prefill_step_size=step)

    assert first.last.cached_tokens == 0
    exact_after = MAX_POSITION // step * step
    assert again.last.cached_tokens == last_kept(num_tokens, step, exact_after)
    assert_equal(again, first)
    assert_equal(again, plain(dynamic, prompt, prefill_step_size=step))


CONVERSATIONS = {
    "growing": [100, 200, 300],
    "ending with a piece": [96, 128, 200],
    "at the end of a piece again": [128, 128, 160, 300],
    "beginning at the end of the positions": [64, 65, 128, 129],
    "shorter each time": [300, 200, 128, 100, 90],
    "shorter, then longer": [100, 90, 120],
    "far shorter than the first": [200, 40, 64, 65],
}
FEW = ["at the end of a piece again", "shorter each time"]


@pytest.mark.parametrize("name", all_but(FEW, CONVERSATIONS))
@pytest.mark.parametrize("how", all_but(["answered"], ["built", "answered"]))
def test_prompts_that_share_a_start_do_not_disturb_each_other(
    dynamic: CachedGenerator, store: PrefixStore, name: str, how: str
) -> None:
    for num_tokens in CONVERSATIONS[name]:
        prompt = LONG[:num_tokens]
        expected = cold(dynamic, prompt, prefill_step_size=32)

        warm = run(dynamic, prompt, prefill_step_size=32)
        if how == "built":
            build(dynamic, prompt, prefill_step_size=32)
        else:
            run(dynamic, prompt, save=True, prefill_step_size=32, max_tokens=1)
        again = run(dynamic, prompt, prefill_step_size=32)

        for found in (warm, again):
            assert found.tokens == expected.tokens
            assert largest_difference(found.logprobs, expected.logprobs) < 1e-4
        kept = last_kept(num_tokens, 32, MAX_POSITION)
        assert again.last.cached_tokens >= min(kept, num_tokens - 1)
    assert store.verify().is_sound


@pytest.mark.parametrize("step", [32, 2048])
@pytest.mark.parametrize("num_tokens", all_but([65, 96], [40, 64, 65, 96, 100, 128]))
def test_build_tells_how_much_other_prompts_can_reuse(
    dynamic: CachedGenerator, num_tokens: int, step: int
) -> None:
    messages = build(dynamic, LONG[:num_tokens], prefill_step_size=step)

    found = run(dynamic, LONG, prefill_step_size=step, max_tokens=1).last.cached_tokens
    assert found == last_kept(num_tokens, step, MAX_POSITION // step * step)
    if found < num_tokens:
        advice = "" if found else "; try a smaller prefill_step_size"
        assert messages == [
            f"other prompts can reuse {found} of these {num_tokens} tokens: "
            f"its dynamic rope depends on the length beyond 64 tokens{advice}"
        ]
    else:
        assert messages == []


def test_system_that_is_shorter_than_a_piece_is_refused_with_the_reason(
    dynamic: CachedGenerator,
) -> None:
    with pytest.raises(UsageError) as error:
        dynamic.build(system="You narrate. " * 3)

    assert "other prompts can reuse 0 of these " in str(error.value)
    assert "dynamic rope depends on the length beyond 64 tokens" in str(error.value)


def test_exactness_can_be_given_up(dynamic: CachedGenerator) -> None:
    messages = build(
        dynamic, LONG[:100], exact=False, name="loose", prefill_step_size=32
    )

    loose = run(dynamic, LONG[:150], exact=False, prefill_step_size=32)
    exact = run(dynamic, LONG[:150], prefill_step_size=32)

    assert messages == []
    assert loose.last.cached_tokens == 100
    assert exact.last.cached_tokens == 0
    assert_equal(exact, cold(dynamic, LONG[:150], prefill_step_size=32))


# Exact runs of any model


@pytest.mark.parametrize("num_tokens", all_but([33, 64], [1, 2, 31, 32, 33, 64, 100]))
def test_exact_run_knows_the_same_prompt_to_the_bit(
    make_generator: Callable[[str], CachedGenerator], num_tokens: int
) -> None:
    generator = make_generator("llama")
    prompt = PROMPT[:num_tokens]
    options: dict[str, Any] = {"prefill_step_size": 32}
    run(generator, prompt, save=True, exact=True, **options)

    again = run(generator, prompt, exact=True, **options)

    assert again.last.cached_tokens == last_kept(num_tokens, 32)
    assert_equal(again, plain(generator, prompt, **options))


@pytest.mark.parametrize("name", all_but(FEW, CONVERSATIONS))
@pytest.mark.parametrize("how", all_but(["answered"], ["built", "answered"]))
def test_exact_prompts_that_share_a_start_equal_plain_mlx_lm(
    make_generator: Callable[[str], CachedGenerator],
    store: PrefixStore,
    name: str,
    how: str,
) -> None:
    generator = make_generator("llama")
    options: dict[str, Any] = {"prefill_step_size": 32, "max_tokens": 4}
    for num_tokens in CONVERSATIONS[name]:
        prompt = LONG[:num_tokens]
        if how == "built":
            generator.build(prompt, exact=True, prefill_step_size=32)
        else:
            run(generator, prompt, save=True, exact=True, **options)

        warm = run(generator, prompt, exact=True, **options)

        assert_equal(warm, plain(generator, prompt, **options))
        assert warm.last.cached_tokens == last_kept(num_tokens, 32)
    assert store.verify().is_sound


@pytest.mark.parametrize("num_tokens", [64, 100])
def test_exact_prefix_that_was_built_is_not_read_again(
    make_generator: Callable[[str], CachedGenerator], num_tokens: int
) -> None:
    generator = make_generator("llama")

    built = [
        generator.build(PROMPT[:num_tokens], exact=True, prefill_step_size=32)
        for _ in range(2)
    ]

    assert [one.cached_tokens for one in built] == [0, last_kept(num_tokens, 32)]


def test_exact_and_other_runs_do_not_share(
    make_generator: Callable[[str], CachedGenerator],
) -> None:
    generator = make_generator("llama")
    generator.build(PROMPT)

    found = {
        exact: generator.match(PROMPT, exact=exact).cached_tokens
        for exact in (None, False, True)
    }

    assert found == {None: 99, False: 99, True: 0}


def test_exact_runs_of_other_steps_do_not_share(
    make_generator: Callable[[str], CachedGenerator],
) -> None:
    generator = make_generator("llama")
    settings = [
        Settings.of(exact=True, prefill_step_size=step) for step in (32, 64, 2048)
    ]

    digests = {generator.fingerprint(wanted).digest for wanted in settings}

    assert len(digests) == 3


def test_exact_build_of_a_model_that_does_not_need_it_warns_of_nothing(
    make_generator: Callable[[str], CachedGenerator],
) -> None:
    generator = make_generator("llama")

    assert build(generator, PROMPT, exact=True, prefill_step_size=32) == []


def test_exact_build_of_less_than_a_piece_is_refused_with_the_reason(
    make_generator: Callable[[str], CachedGenerator],
) -> None:
    with pytest.raises(UsageError, match="reuse 0 of these 100 tokens: exact mode"):
        make_generator("llama").build(PROMPT, exact=True)


# A limited cache


@pytest.mark.parametrize("num_tokens", all_but([31, 33], [1, 20, 31, 32, 33, 100]))
@pytest.mark.parametrize("step", [2048, 40])
@pytest.mark.parametrize("how", ["built", "answered"])
def test_limited_cache_knows_the_same_prompt_to_the_bit(
    limited: CachedGenerator, num_tokens: int, step: int, how: str
) -> None:
    prompt = PROMPT[:num_tokens]
    options: dict[str, Any] = {"max_kv_size": 32, "prefill_step_size": step}
    if how == "built":
        build(limited, prompt, **options)
    else:
        run(limited, prompt, save=True, **options)

    again = run(limited, prompt, **options)

    # The state is taken before the last token is read alone.
    kept = num_tokens - 1 if num_tokens < 32 else last_kept(num_tokens, step)
    assert again.last.cached_tokens == kept
    assert_equal(again, plain(limited, prompt, **options))


@pytest.mark.parametrize("stored", all_but([31, 32], [10, 30, 31, 32, 33, 40]))
@pytest.mark.parametrize("num_tokens", all_but([34, 100], [34, 40, 50, 100]))
def test_limited_cache_resumes_only_where_it_makes_no_difference(
    limited: CachedGenerator, stored: int, num_tokens: int
) -> None:
    build(limited, PROMPT[:stored], max_kv_size=32)

    warm = run(limited, PROMPT[:num_tokens], max_kv_size=32)

    expected = cold(limited, PROMPT[:num_tokens], max_kv_size=32)
    assert warm.last.cached_tokens == (stored - 1 if stored < 32 else 0)
    assert warm.tokens == expected.tokens
    assert largest_difference(warm.logprobs, expected.logprobs) < 1e-4


@pytest.mark.parametrize("name", all_but(FEW, CONVERSATIONS))
def test_limited_cache_resumes_at_whole_pieces(
    limited: CachedGenerator, store: PrefixStore, name: str
) -> None:
    options: dict[str, Any] = {"max_kv_size": 48, "prefill_step_size": 64}
    for num_tokens in CONVERSATIONS[name]:
        prompt = LONG[:num_tokens]
        expected = cold(limited, prompt, **options)

        warm = run(limited, prompt, save=True, **options)
        again = run(limited, prompt, **options)

        for found in (warm, again):
            assert found.tokens == expected.tokens
            assert largest_difference(found.logprobs, expected.logprobs) < 1e-4
        assert again.last.cached_tokens >= (num_tokens - 1) // 64 * 64
    forked = [*LONG[: num_tokens - 1], *OTHER]
    warm = run(limited, forked, **options)
    assert warm.last.cached_tokens >= (num_tokens - 1) // 64 * 64 - 64
    assert warm.tokens == cold(limited, forked, **options).tokens
    assert store.verify().is_sound


@pytest.mark.parametrize("num_tokens", all_but([20, 33], [20, 32, 33, 64, 100, 128]))
@pytest.mark.parametrize("step", [64, 2048])
def test_build_tells_how_much_a_limited_cache_leaves_to_reuse(
    limited: CachedGenerator, num_tokens: int, step: int
) -> None:
    options: dict[str, Any] = {"max_kv_size": 32, "prefill_step_size": step}
    messages = build(limited, LONG[:num_tokens], **options)

    found = run(limited, LONG, max_tokens=1, **options).last.cached_tokens
    if num_tokens < 32:
        assert (found, messages) == (num_tokens - 1, [])
    else:
        assert found == last_kept(num_tokens, step)
        [message] = messages
        assert message.startswith(
            f"other prompts can reuse {found} of these {num_tokens} tokens: what is "
            "dropped beyond max_kv_size"
        )


def test_limits_do_not_share(limited: CachedGenerator) -> None:
    build(limited, PROMPT[:30], max_kv_size=32)

    found = {
        limit: limited.match(PROMPT, max_kv_size=limit).cached_tokens
        for limit in (None, 32, 33)
    }

    assert found == {None: 0, 32: 29, 33: 0}


def test_answer_beyond_the_limit_is_not_saved(
    limited: CachedGenerator, store: PrefixStore
) -> None:
    run(limited, PROMPT[:20], save=True, max_tokens=40, max_kv_size=32)

    warm = run(limited, [*PROMPT[:20], *OTHER[:9]], max_kv_size=32)

    expected = cold(limited, [*PROMPT[:20], *OTHER[:9]], max_kv_size=32)
    assert warm.last.cached_tokens == 19
    assert warm.tokens == expected.tokens


# What cannot be quantized


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("gemma3_text", {}, "RotatingKVCache Quantization NYI"),
        ("mamba", {}, "mlx-lm has no way to quantize ArraysCache"),
        ("qwen3", {"max_kv_size": 128}, "RotatingKVCache"),
        ("llama", {"kv_group_size": 64}, "64"),
    ],
)
@pytest.mark.parametrize("how", ["built", "answered"])
@pytest.mark.parametrize("step", all_but([32], [32, 2048]))
def test_cache_that_cannot_be_quantized_is_told_before_any_prefill(
    make_generator: Callable[[str], CachedGenerator],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: dict[str, Any],
    reason: str,
    how: str,
    step: int,
) -> None:
    generator = make_generator(name)
    quantized = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    options = {**quantized, "prefill_step_size": step, **options}
    num_read = note_calls(generator.model, monkeypatch)

    with pytest.raises(UsageError, match="cannot be quantized") as error:
        if how == "built":
            generator.build(PROMPT, **options)
        else:
            run(generator, PROMPT, save=True, **options)

    assert reason in str(error.value)
    assert "leave kv_bits out" in str(error.value)
    assert sum(num_read) <= 2
    assert generator.store is not None
    assert generator.store.prefixes() == []


def note_calls(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many tokens a model reads with each call."""
    noted: list[int] = []
    call = type(model).__call__

    def noting(model: Any, inputs: mx.array, *args: Any, **kwargs: Any) -> Any:
        noted.append(inputs.size)
        return call(model, inputs, *args, **kwargs)

    monkeypatch.setattr(type(model), "__call__", noting)
    return noted


def test_prompt_that_ends_before_the_quantization_needs_none(
    make_generator: Callable[[str], CachedGenerator],
) -> None:
    generator = make_generator("gemma3_text")

    found = run(generator, PROMPT, save=True, kv_bits=8, max_tokens=5)

    assert found.tokens == plain(generator, PROMPT, max_tokens=5).tokens
