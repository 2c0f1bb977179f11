"""What is stored in fewer bits is found by who asks for it, and by nobody else."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map

from promptcache import (
    CachedGenerator,
    Conversation,
    PrefixStore,
    PromptCacheWarning,
    UsageError,
)
from promptcache.kvcache.layout import describe
from promptcache.models.settings import Settings
from promptcache.parity import check_parity
from tests.helpers import segments, tiny
from tests.helpers.commands import assert_fails, invoke, ok
from tests.helpers.runs import OTHER, PROMPT, cold, ids, largest_difference, run

LONGER = [*PROMPT, *OTHER]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    configs = {
        "llama": tiny.LLAMA,
        "gemma3": tiny.GEMMA3,
        "qwen3_next": tiny.QWEN3_NEXT,
        "odd": {**tiny.LLAMA, "head_dim": 24},
        "head_dim 64": {**tiny.LLAMA, "head_dim": 64},
    }
    root = tmp_path_factory.mktemp("models")
    return {
        name: tiny.save_model(root / name, config) for name, config in configs.items()
    }


FAMILIES = ["llama", "gemma3", "qwen3_next"]


@pytest.fixture
def make(folders: dict[str, Path], store: PrefixStore) -> Callable[[str], Any]:
    return lambda name: CachedGenerator.load(folders[name], store=store)


def layers(store: PrefixStore, key: str) -> set[str]:
    return {describe(segment.layers) for segment in store.report(key).segments}


# What is found


def test_default_run_never_sees_what_is_stored_in_fewer_bits(
    generator: CachedGenerator,
) -> None:
    generator.build(LONGER, store_bits=8)

    assert run(generator, LONGER).last.cached_tokens == 0
    assert generator.match(LONGER).cached_tokens == 0
    assert run(generator, LONGER, store_bits=4).last.cached_tokens == 0
    assert run(generator, LONGER, store_bits=8).last.cached_tokens == 199


def test_exact_rows_are_taken_where_they_reach_as_far(
    generator: CachedGenerator, store: PrefixStore
) -> None:
    small = generator.build(PROMPT, store_bits=8).key
    exact = generator.build(PROMPT).key
    assert small != exact

    prompt = [*PROMPT, 7, 8, 9]
    warm = run(generator, prompt, store_bits=8)

    assert generator.match(prompt, store_bits=8).key == exact
    assert warm.last.cached_tokens == 100
    default = run(generator, prompt)
    assert largest_difference(warm.logprobs, default.logprobs) == 0
    assert {p.key: p.hits for p in store.prefixes()} == {exact: 2, small: 0}


def test_rows_in_fewer_bits_are_taken_where_they_reach_further(
    generator: CachedGenerator,
) -> None:
    generator.build(PROMPT)
    small = generator.build(LONGER, store_bits=8)

    warm = run(generator, [*LONGER, 7], store_bits=8)

    assert small.cached_tokens == 100
    assert generator.match([*LONGER, 7], store_bits=8).key == small.key
    assert warm.last.cached_tokens == 200
    assert run(generator, [*LONGER, 7]).last.cached_tokens == 100


def test_exact_rows_are_taken_where_they_reach_further(
    generator: CachedGenerator,
) -> None:
    generator.build(PROMPT, store_bits=8)
    exact = generator.build(LONGER)

    assert exact.cached_tokens == 0
    assert generator.match(LONGER, store_bits=8).key == exact.key


@pytest.mark.parametrize("fork", [1, 31, 32, 57, 150])
@pytest.mark.parametrize("name", FAMILIES[:2])
def test_match_ends_inside_a_segment(
    make: Callable[[str], Any], name: str, fork: int
) -> None:
    generator = make(name)
    generator.build(LONGER, store_bits=8)
    prompt = [*LONGER[:fork], *ids(20, seed=3)]

    warm = run(generator, prompt, store_bits=8, max_tokens=1)

    expected = cold(generator, prompt, max_tokens=1)
    assert warm.last.cached_tokens == fork
    # Random models have opinions; other rows than these would be off by several.
    assert 0 < largest_difference(warm.logprobs, expected.logprobs) < 1


def test_damaged_blob_falls_back_on_what_else_there_is(
    generator: CachedGenerator, store: PrefixStore
) -> None:
    exact = generator.build(PROMPT).key
    small = generator.build(LONGER, store_bits=8).key
    for segment in store.report(small).segments:
        segments.flip(
            store.path / "blobs" / segment.key[:2] / f"{segment.key}.safetensors"
        )

    with pytest.warns(PromptCacheWarning, match="cannot be used and is read again"):
        warm = run(generator, LONGER, store_bits=8)

    assert warm.last.cached_tokens == 100
    assert generator.match(LONGER, store_bits=8).key == exact
    assert warm.tokens == run(generator, LONGER).tokens


# What is saved


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_is_saved_in_fewer_bits_and_resumed(
    make: Callable[[str], Any], store: PrefixStore, name: str, bits: int
) -> None:
    generator = make(name)

    first = run(generator, PROMPT, save=True, store_bits=bits)
    warm = run(generator, PROMPT, store_bits=bits, max_tokens=1)

    assert warm.last.cached_tokens >= 99
    # What is only stored in fewer bits has not changed the run that stored it.
    assert first.tokens == cold(generator, PROMPT).tokens
    assert any(
        f"stored in {bits} bits" in told for told in layers(store, first.last.key)
    )
    assert store.verify().is_sound


@pytest.mark.parametrize("how", ["generated", "built"])
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_that_were_resumed_from_exact_ones_are_saved_too(
    make: Callable[[str], Any], store: PrefixStore, name: str, how: str
) -> None:
    generator = make(name)
    exact = generator.build(PROMPT[:70], prefill_step_size=40)
    if how == "built":
        key = generator.build(PROMPT, store_bits=8).key
    else:
        key = run(generator, PROMPT, save=True, store_bits=8).last.key
    store.remove(exact.key)
    generator.build(PROMPT, store_bits=4)

    warm = run(generator, [*PROMPT, 7, 8], store_bits=8, max_tokens=1)

    expected = cold(generator, [*PROMPT, 7, 8], max_tokens=1)
    # The state of a recurrent model is taken before the last token.
    end = 100 - (name == "qwen3_next")
    assert warm.last.cached_tokens == end
    assert 0 < largest_difference(warm.logprobs, expected.logprobs) < 1
    assert store.report(key).prefix.num_tokens == end


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_stored_exactly_is_built_in_fewer_bits_without_reading_it(
    make: Callable[[str], Any], store: PrefixStore, name: str
) -> None:
    generator = make(name)
    exact = generator.build(PROMPT)

    small = generator.build(PROMPT, store_bits=8)

    end = 100 - (name == "qwen3_next")
    assert small.cached_tokens == end
    assert small.nbytes < exact.nbytes
    store.remove(exact.key)
    assert generator.build(PROMPT, store_bits=8).cached_tokens == end
    warm = run(generator, [*PROMPT[:90], 7], store_bits=8)
    # Only states cannot be cut.
    assert warm.last.cached_tokens == (0 if name == "qwen3_next" else 90)
    assert run(generator, PROMPT, store_bits=8).last.cached_tokens >= 99


@pytest.mark.parametrize("name", FAMILIES)
def test_longer_prompts_go_on_from_what_is_stored_in_fewer_bits(
    make: Callable[[str], Any], store: PrefixStore, name: str
) -> None:
    generator = make(name)
    generator.build(PROMPT, store_bits=8)
    key = run(generator, LONGER, save=True, store_bits=8).last.key

    again = run(generator, LONGER, store_bits=8, max_tokens=1)

    assert again.last.cached_tokens >= 199
    spans = [(s.start, s.end) for s in store.report(key).segments if s.start < s.end]
    assert spans[0][0] == 0
    lost = int(name == "qwen3_next")
    assert spans[-1] == (100 - lost, 200 - lost)


def test_states_are_stored_exactly(make: Callable[[str], Any]) -> None:
    generator = make("qwen3_next")
    first = run(generator, PROMPT, save=True, store_bits=4)

    warm = run(generator, PROMPT, store_bits=4)

    assert warm.last.cached_tokens == 99
    # Only the rows are not: they are what the last token is read after.
    assert largest_difference(first.logprobs[:1], warm.logprobs[:1]) < 1


def test_head_dim_that_no_group_divides_is_stored_exactly(
    make: Callable[[str], Any], store: PrefixStore
) -> None:
    generator = make("odd")

    built = generator.build(PROMPT, store_bits=8)

    assert layers(store, built.key) == {"2 × KVCache"}
    warm = run(generator, [*PROMPT, 7], store_bits=8)
    assert warm.last.cached_tokens == 100
    assert warm.tokens == cold(generator, [*PROMPT, 7]).tokens
    # All but a word in the header.
    assert abs(built.nbytes - generator.build(PROMPT).nbytes) < 100


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "most"), [(8, 0.6), (4, 0.35)])
def test_files_are_smaller(
    make: Callable[[str], Any], bits: int, most: float, dtype: mx.Dtype
) -> None:
    generator = make("head_dim 64")
    parameters = generator.model.parameters()
    generator.model.update(tree_map(lambda array: array.astype(dtype), parameters))
    prompt = ids(1000)

    exact, small = generator.build(prompt), generator.build(prompt, store_bits=bits)

    assert small.nbytes < most * exact.nbytes
    warm = run(generator, [*prompt, 7], store_bits=bits)
    assert warm.last.cached_tokens == 1000


def test_conversation_is_stored_in_fewer_bits(
    generator: CachedGenerator, store: PrefixStore
) -> None:
    options = {"store_bits": 8, "max_tokens": 8, "save": True}
    with Conversation(generator, system="You are a lamp.") as conversation:
        first = list(conversation.say("Shine!", **options))[-1]
        second = list(conversation.say("Go out!", **options))[-1]

    assert second.cached_tokens >= first.prompt_tokens
    told = [layers(store, prefix.key) for prefix in store.prefixes()]
    assert told
    assert all(layout == {"2 × KVCache (stored in 8 bits)"} for layout in told)


# What makes no sense


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"store_bits": 3}, r"store_bits must be one of \(8, 4\), not 3"),
        ({"store_bits": 0}, r"store_bits must be one of \(8, 4\), not 0"),
        ({"store_bits": 8, "kv_bits": 8}, "quantized already is stored as it is"),
        ({"store_bits": 8, "exact": True}, "use just one of exact and store_bits"),
    ],
    ids=str,
)
def test_settings_that_contradict_themselves_are_refused(
    generator: CachedGenerator, options: dict[str, Any], told: str
) -> None:
    for call in (
        generator.build,
        generator.generate,
        generator.match,
        generator.explain,
        lambda prompt, **settings: check_parity(generator, prompt, **settings),
    ):
        with pytest.raises(UsageError, match=told):
            call(PROMPT, **options)


# Identity


def test_fingerprints_without_it_stay_the_same(generator: CachedGenerator) -> None:
    exact, small = (generator.fingerprint(Settings.of(store_bits=b)) for b in (None, 8))

    assert "store_bits" not in exact.parts
    assert dict(small.parts) == {**exact.parts, "store_bits": "8"}
    assert small.exact == exact
    assert exact.exact is None


# Why it hits or misses


def test_explanation_looks_at_both(generator: CachedGenerator) -> None:
    generator.build(PROMPT)
    generator.build(LONGER, store_bits=8)

    found = generator.explain([*LONGER, 7], store_bits=8)
    assert (found.cached_tokens, found.divergence, found.is_miss) == (200, None, False)
    found = generator.explain([*PROMPT, 7], store_bits=8)
    assert (found.cached_tokens, found.divergence, found.is_miss) == (100, None, False)


def test_explanation_never_blames_what_is_reused_as_well(
    make: Callable[[str], Any],
) -> None:
    generator = make("qwen3_next")
    # More of its rows are stored, but no state to take over with.
    generator.build(LONGER, store_bits=8)
    generator.build(PROMPT)

    found = generator.explain([*LONGER[:150], 7], store_bits=8)

    assert (found.cached_tokens, found.divergence) == (99, None)


def test_explanation_names_other_bits(generator: CachedGenerator) -> None:
    generator.build(PROMPT, store_bits=8)

    missed = generator.explain([*PROMPT, 7]).divergence
    other = generator.explain([*PROMPT, 7], store_bits=4).divergence

    assert missed is not None and other is not None
    assert missed.culprit == "other bits at rest: 8 became none"
    assert other.culprit == "other bits at rest: 8 became 4"


def test_explanation_tells_what_was_evicted_of_either(
    generator: CachedGenerator, store: PrefixStore
) -> None:
    generator.build(PROMPT, store_bits=8)
    key = generator.build(LONGER).key
    store.remove(key)

    divergence = generator.explain(LONGER, store_bits=8).divergence

    assert divergence is not None
    assert divergence.kind == "evicted"


# Parity


def test_parity_measures_the_loss(generator: CachedGenerator) -> None:
    reports = {
        bits: check_parity(generator, PROMPT, store_bits=bits, max_tokens=8)
        for bits in (None, 8, 4)
    }
    loss = {
        bits: sum(cut.kl_divergence for cut in report.cuts)
        for bits, report in reports.items()
    }

    assert 0 <= loss[None] < loss[8] < loss[4]
    assert reports[8].store_bits == 8
    assert reports[4].verdict.startswith("stored in 4 bits: KL divergence ")
    assert reports[4].verdict.count(f"of {8 * len(reports[4].cuts)} positions") == 1


def test_parity_with_other_tokens_is_no_failure(generator: CachedGenerator) -> None:
    report = check_parity(generator, PROMPT, store_bits=4, max_tokens=64)

    assert not report.same_tokens
    assert not report.is_failure
    # As for models whose values depend on the length of what is read.
    assert not replace(report, exact=True).is_failure
    assert replace(report, exact=True, store_bits=None).is_failure


# Commands


@pytest.fixture
def model(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTCACHE_MODEL", str(model_dir))


@pytest.mark.usefixtures("model")
def test_commands_take_it() -> None:
    key = ok("build", "-s", "You are a lamp.", "--store-bits", "8", "-q").stdout.strip()

    asked = ("-s", "You are a lamp.", "Shine!")
    answer = ok("generate", *asked, "--store-bits", "8", "-u", "--max-tokens", "2")
    assert " 0 cached" not in answer.stderr
    plain = ok("generate", *asked, "-u", "--max-tokens", "2")
    assert " 0 cached" in plain.stderr
    assert plain.stderr.endswith("other bits at rest: 8 became none\n")
    assert "KVCache (stored in 8 bits)" in ok("show", key).stdout
    assert key[:12] in ok("ls").stdout
    assert ok("explain", *asked, "--store-bits", "8").stdout.startswith("a partial hit")
    told = ok("parity", *asked, "--store-bits", "4", "--max-tokens", "2").stdout
    assert "stored in 4 bits: KL divergence" in told
    chat = ok("chat", "--store-bits", "8", "-q", "--max-tokens", "2", stdin="Hi\n")
    assert chat.stderr == ""


@pytest.mark.usefixtures("model", "store")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--store-bits", "3"], "--store-bits"),
        (["--store-bits", "8", "--kv-bits", "4"], "kv_bits"),
        (["--store-bits", "8", "--exact"], "exact"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["build", "generate", "explain", "parity"])
def test_commands_refuse_what_makes_no_sense(
    command: str, options: list[str], told: str
) -> None:
    assert_fails(invoke(command, "Shine!", *options), 2, told)


@pytest.mark.usefixtures("model")
def test_manifest_takes_it(tmp_path: Path) -> None:
    manifest = tmp_path / "promptcache.toml"
    manifest.write_text('[prompts.lamp]\nsystem = "You are a lamp."\nstore_bits = 8\n')

    ok("sync", manifest)

    assert "stored in 8 bits" in ok("show", "lamp").stdout
    ok("sync", manifest, "--check")
    manifest.write_text('[prompts.lamp]\nsystem = "You are a lamp."\nstore_bits = 5\n')
    assert_fails(invoke("sync", manifest), 2, "store_bits", "(8, 4)")
