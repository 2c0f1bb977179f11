"""`promptcache parity`, and the exact mode that it checks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

from promptcache import CachedGenerator, PrefixStore, UsageError
from promptcache.kvcache import restore
from promptcache.parity import ParityReport, check_parity
from promptcache.prompts.render import RenderedPrompt
from tests.helpers.commands import assert_fails, invoke, ok

STEP_SIZE = 32
PROMPT = RenderedPrompt([(7 * i) % 480 + 5 for i in range(150)], (50, 140))
KINDS = [
    (32, "end of a piece"),
    (50, "boundary"),
    (95, "in between"),
    (128, "end of a piece"),
    (140, "boundary"),
    (150, "full prompt"),
]


def parity(generator: CachedGenerator, **options: Any) -> ParityReport:
    options = {"max_tokens": 8, "prefill_step_size": STEP_SIZE, **options}
    return check_parity(generator, PROMPT, **options)


def cached(report: ParityReport) -> list[int]:
    return [cut.cached_tokens for cut in report.cuts]


def test_every_kind_of_cut_is_tried(generator: CachedGenerator) -> None:
    report = parity(generator)

    kinds = [(cut.position, cut.kind) for cut in report.cuts]
    assert [kind for kind in kinds if kind[1] != "in between"] == [
        kind for kind in KINDS if kind[1] != "in between"
    ]
    assert len(kinds) == len(KINDS)


def test_tight_mode_reuses_every_stored_token(generator: CachedGenerator) -> None:
    report = parity(generator)

    # The last token of the prompt itself has to be read.
    assert cached(report)[:-1] == [cut.position for cut in report.cuts][:-1]
    assert cached(report)[-1] == 149
    assert report.same_tokens


def test_exact_mode_reuses_ends_of_pieces(
    generator: CachedGenerator,
) -> None:
    report = parity(generator, exact=True)

    reused = {cut.position: cut.cached_tokens for cut in report.cuts}
    assert all(
        tokens == position // STEP_SIZE * STEP_SIZE
        for position, tokens in reused.items()
    )
    assert report.verdict == "warm equals cold to the bit after every cut"


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_exact_mode_repeats_plain_mlx_lm_to_the_bit(
    make_model: Callable[[str], Path], store: PrefixStore, architecture: str
) -> None:
    generator = CachedGenerator.load(make_model(architecture), store=store)
    options = {"max_tokens": 12, "prefill_step_size": STEP_SIZE}
    plain = list(
        mlx_lm.stream_generate(
            generator.model, generator.tokenizer, PROMPT.token_ids, **options
        )
    )
    other = RenderedPrompt([*PROMPT.token_ids[:100], *range(5, 60)], (50, 100))
    list(generator.stream_generate(other, exact=True, save=True, **options))

    warm = list(generator.stream_generate(PROMPT, exact=True, **options))

    assert warm[-1].cached_tokens == 96
    assert [r.token for r in warm] == [r.token for r in plain]
    pairs = zip(warm, plain, strict=True)
    assert all(mx.array_equal(a.logprobs, b.logprobs) for a, b in pairs)


def test_what_tight_mode_stored_is_not_reused_in_exact_mode(
    generator: CachedGenerator,
) -> None:
    generator.build(PROMPT, prefill_step_size=STEP_SIZE)

    responses = list(
        generator.stream_generate(
            PROMPT, max_tokens=2, exact=True, prefill_step_size=STEP_SIZE
        )
    )

    assert responses[-1].cached_tokens == 0


def test_tokens_that_differ_are_seen(
    generator: CachedGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = restore.filled_in_place

    def shuffled(part: Any, arrays: list[mx.array], position: int) -> Any:
        return filled(part, [mx.roll(a, 1, axis=-2) * 3 for a in arrays], position)

    monkeypatch.setattr(restore, "filled_in_place", shuffled)

    report = parity(generator, exact=True)

    assert not report.same_tokens
    broken = [cut for cut in report.cuts if cut.first_difference is not None]
    assert all(cut.cached_tokens for cut in broken)
    assert all(cut.top1_agreement < 1 for cut in broken)
    assert report.verdict.startswith(f"the tokens differ after {len(broken)} of ")


def test_store_of_the_generator_is_not_touched(
    generator: CachedGenerator, store: PrefixStore
) -> None:
    parity(generator)

    assert store.prefixes() == []


def test_settings_are_passed_on(generator: CachedGenerator) -> None:
    report = parity(
        generator, kv_bits=8, kv_group_size=32, quantized_kv_start=0, max_tokens=4
    )

    assert report.answer_tokens == 4
    with pytest.raises(UsageError, match="kv_bits"):
        parity(generator, kv_bits=7)


# The command


@pytest.fixture
def model(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTCACHE_MODEL", str(model_dir))


@pytest.mark.usefixtures("model")
def test_command_prints_a_table_and_a_verdict() -> None:
    result = ok("parity", "-s", "You are a lamp.", "Shine!", "--max-tokens", "4")

    lines = result.stdout.splitlines()
    assert lines[0].split() == [
        "AT",
        "REUSED",
        "TOKENS",
        "TOP-1",
        "DIFFERENCE",
        "KL",
        "CUT",
    ]
    assert "full prompt" in lines[-3]
    assert lines[-1].startswith(("the same tokens", "warm equals cold"))


@pytest.mark.usefixtures("model")
def test_json_tells_every_cut() -> None:
    result = ok("parity", "Shine!", "--exact", "--max-tokens", "3", "--json")

    value = json.loads(result.stdout)
    assert value["exact"] is True
    assert value["same_tokens"] is True
    assert value["answer_tokens"] == 3
    assert value["cuts"][-1] == {
        "kind": "full prompt",
        "position": value["prompt_tokens"],
        "cached_tokens": 0,
        "first_difference": None,
        "top1_agreement": 1.0,
        "largest_difference": 0.0,
        "kl_divergence": 0.0,
    }


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(("mode", "code"), [("--exact", 1), ("--tight", 0)])
def test_exit_code_is_1_if_tokens_differ_in_exact_mode(
    mode: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = restore.filled_in_place
    monkeypatch.setattr(
        restore,
        "filled_in_place",
        lambda part, arrays, position: filled(part, [a * -9 for a in arrays], position),
    )
    prompt = "Shine over the sea, over the hills and over the town. " * 3

    result = invoke("parity", prompt, mode, "--prefill-step-size", "16")

    assert result.exit_code == code
    assert "the tokens differ after" in result.stdout


@pytest.mark.usefixtures("model")
def test_without_a_prompt_it_is_a_usage_error() -> None:
    assert_fails(invoke("parity"), 2, "there is no prompt")
