"""A warm run equals a cold one, whatever the model, wherever a prompt parts."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx_lm
import pytest

from promptcache import CachedGenerator, PrefixStore
from tests.helpers.marks import all_but
from tests.helpers.runs import OTHER, PROMPT, cold, largest_difference, plain, run

# Not the width of a window, which is 32.
STEP = 40


def at_any_token(fork: int) -> int:
    return fork


def at_whole_pieces(fork: int) -> int:
    return fork // STEP * STEP


def at_checkpoints(fork: int) -> int:
    """Return where a model resumes that needs one, in pieces that keep all of them."""
    return fork // 64 * 64


def at_any_token_at_first(fork: int) -> int:
    """Return where a model resumes whose rope depends on the length beyond 64."""
    return fork if fork <= at_whole_pieces(64) else at_whole_pieces(fork)


class Setup(NamedTuple):
    """A model and its options.

    Attributes:
        model: Its name in `tiny.CONFIGS`.
        options: Of all generations and builds.
        resumed_at: Tells from where a prompt parts up to where it is reused.
        tolerance: How far log-probabilities may be from those of the reference.
        reference: How it is answered from nothing.
        draft: The name of a draft model.
    """

    model: str
    options: Mapping[str, Any]
    resumed_at: Callable[[int], int] = at_any_token
    tolerance: float = 1e-4
    reference: Callable[..., Any] = cold
    draft: str | None = None


EXACT = {"exact": True}
SETUPS = {
    "plain": Setup("llama", {}, reference=plain),
    **{
        f"{bits} bits from {start}": Setup(
            "llama",
            {"kv_bits": bits, "kv_group_size": 32, "quantized_kv_start": start},
            tolerance=1e-2,
        )
        for bits in (8, 4)
        for start in (0, 60)
    },
    "window": Setup("gemma3_text", {}),
    "hybrid": Setup("qwen3_next", {"prefill_step_size": 64}, at_checkpoints),
    "dynamic rope": Setup("dynamic", {}, at_any_token_at_first),
    "draft that is rarely right": Setup("llama", {}, draft="draft"),
    "draft that is always right": Setup("llama", {}, draft="llama"),
    "exact": Setup("llama", EXACT, at_whole_pieces, 0.0, plain),
    "exact window": Setup("gemma3_text", EXACT, at_whole_pieces, 0.0, plain),
    "exact draft": Setup("llama", EXACT, at_whole_pieces, 0.0, draft="draft"),
}
FORKS = (0, 1, 31, 32, 33, 39, 40, 41, 64, 65, 79, 80, 81, 99, 100)
PATHS = [(how, fork) for how in ("built", "answered") for fork in FORKS]
REPRESENTATIVES = [("built", 33), ("built", 100), ("answered", 64), ("answered", 81)]


@pytest.mark.filterwarnings("ignore:other prompts can reuse")
@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize(("how", "fork"), all_but(REPRESENTATIVES, PATHS))
def test_prompt_that_parts_from_a_stored_one_equals_a_cold_one(
    make_model: Callable[[str], Path],
    store: PrefixStore,
    name: str,
    how: str,
    fork: int,
) -> None:
    setup = SETUPS[name]
    generator = CachedGenerator.load(make_model(setup.model), store=store)
    options = {"prefill_step_size": STEP, **setup.options}
    if setup.draft:
        options["draft_model"] = mlx_lm.load(str(make_model(setup.draft)))[0]
    stored = [*PROMPT[:fork], *OTHER[:48]]
    if how == "built":
        generator.build(stored, **options)
    else:
        run(generator, stored, save=True, max_tokens=3, **options)

    warm = run(generator, PROMPT, max_tokens=8, **options)

    given = {k: v for k, v in options.items() if k != "exact"}
    expected = setup.reference(
        generator,
        PROMPT,
        max_tokens=8,
        **(given if setup.reference is plain else options),
    )
    assert warm.last.cached_tokens == setup.resumed_at(min(fork, len(PROMPT) - 1))
    assert warm.tokens == expected.tokens
    assert warm.text == expected.text
    assert largest_difference(warm.logprobs, expected.logprobs) <= setup.tolerance
