"""Every architecture of mlx-lm resumes rightly, and the checks would see it if not."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest

from promptcache.kvcache import encode, restore
from promptcache.prompts.render import RenderedPrompt
from promptcache.segments.types import EncodedSegment, Match
from promptcache.tiers.disk_tier import restore_prefix
from tests.architectures import architectures, conformance
from tests.architectures.conformance import Result, Subject
from tests.helpers.marks import all_but

# Of the last bits, where the last token is read alone: see docs/models.md.
ROUNDING = 1e-4
FOUR_THOUSAND = 4000
SHORT_LENGTHS = conformance.LENGTHS[:2]
# Every cache class, every way of keeping it, and every way of resuming.
REPRESENTATIVES = (
    "llama",
    "llama4",
    "gemma3_text",
    "gemma3_text/dynamic",
    "qwen3_next",
    "mamba2",
    "recurrent_gemma",
    "falcon_h1/dynamic",
    "deepseek_v3",
    "deepseek_v41",
    "nemotron-nas",
    "phi3small",
)
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
NAMES = all_but(REPRESENTATIVES, architectures.CONFIGS)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[str, Result]:
    """Build configurations in some processes, and resume them in others.

    They are those of the tests that are to run, all if one is about all; the longest
    prefix is tried only then.
    """
    items = [i for i in request.session.items if "results" in i.fixturenames]
    selected = {
        getattr(i, "callspec", None) and i.callspec.params["name"] for i in items
    }
    names, lengths = architectures.CONFIGS.keys() & selected, SHORT_LENGTHS
    if None in selected:
        names, lengths = architectures.CONFIGS.keys(), conformance.LENGTHS
    found = conformance.run(sorted(names), lengths)
    return {result.name: result for result in found}


def kinds_of(names: Sequence[str]) -> set[tuple[str, str]]:
    """Return how the page says that parts of these are kept and resumed."""
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines()]
    table = {
        row[0].removeprefix("| "): row[1:3]
        for row in rows
        if len(row) > 2 and "×" in row[1]
    }
    return {
        (part.partition(" × ")[2], table[name][1])
        for name in names
        for part in table[name][0].split(", ")
    }


def test_representatives_are_of_every_kind() -> None:
    assert kinds_of(REPRESENTATIVES) == kinds_of([*architectures.CONFIGS])


def test_every_architecture_is_tried_or_excused() -> None:
    tried = {name.partition("/")[0] for name in architectures.CONFIGS}

    assert tried | architectures.UNBUILDABLE.keys() == {*architectures.architectures()}


@pytest.mark.parametrize("name", NAMES)
def test_warm_equals_cold(results: dict[str, Result], name: str) -> None:
    wrong = [trial for trial in results[name].trials if not trial.same_tokens]

    assert wrong == []
    assert results[name].difference < ROUNDING


@pytest.mark.parametrize("name", NAMES)
def test_nothing_stored_is_read_again(results: dict[str, Result], name: str) -> None:
    wrong = [trial for trial in results[name].trials if not trial.is_hit]

    assert wrong == []


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_equal_to_the_bit_where_those_of_mlx_lms_file_are(
    results: dict[str, Result], name: str
) -> None:
    ends = [trial for trial in results[name].trials if trial.kind == "end"]

    wrong = [t for t in ends if t.difference and t.mlx_lm_difference == 0]

    assert wrong == []


@pytest.mark.long
def test_nearly_all_resume_at_the_end_of_what_is_stored(
    results: dict[str, Result],
) -> None:
    misses = [r for r in results.values() if not r.hits_at_end]

    # The representatives, too, which are tried with short prefixes otherwise.
    assert all(r.is_right and r.difference < ROUNDING for r in results.values())
    assert all(result.length_dependence for result in misses)
    modules = {name.partition("/")[0] for name in results}
    missing = {r.name for r in misses if "/" not in r.name}
    assert len(missing) <= 0.05 * len(modules)


# A codec that loses something is seen.


def without_offset(part: Any, *args: Any) -> Any:
    """Fill a part and forget how many tokens it holds."""
    filled = FILLED_ROWS(part, *args)
    filled.offset = 0
    return filled


def with_arrays_only(part: Any, *args: Any) -> Any:
    """Fill a window with arrays and nothing else."""
    filled = FILLED_WINDOW(part, *args)
    filled.offset, filled._idx = part.offset, part._idx
    return filled


def with_arrays_only_of_state(part: Any, state: Any, arrays: Any) -> Any:
    """Put the arrays of a state back and leave its numbers."""
    filled = PUT_STATE(part, state, arrays)
    for name, value in vars(part).items():
        if isinstance(value, int):
            setattr(filled, name, value)
    return filled


def in_half_precision(
    layout: Any, arrays: dict[str, Any], *args: Any
) -> EncodedSegment:
    """Store float16 in place of float32."""
    rounded = {
        name: array.astype(mx.float16).astype(mx.float32)
        if array.dtype == mx.float32
        else array
        for name, array in arrays.items()
    }
    return ENCODED(layout, rounded, *args)


def by_trimming(name: str, part: Any, segments: Sequence[Any], room: int) -> Any:
    """Restore a window as if its last rows could be trimmed."""
    filled = RESTORE_WINDOW(name, part, segments, room)
    if filled.offset > part.max_size:
        filled.keys, filled.values = (
            mx.roll(array, 1, axis=-2) for array in (filled.keys, filled.values)
        )
    return filled


FILLED_ROWS = restore.filled_in_place
FILLED_WINDOW = restore.filled_window
PUT_STATE = restore.put_state
ENCODED = encode._encoded
RESTORE_WINDOW = restore._RESTORE[restore.LayerKind.WINDOW]

SABOTAGE: dict[str, tuple[ModuleType, str, Callable[..., Any]]] = {
    "llama": (restore, "filled_in_place", without_offset),
    "gemma3_text": (restore, "filled_window", with_arrays_only),
    "deepseek_v41": (restore, "put_state", with_arrays_only_of_state),
    "qwen3": (encode, "_encoded", in_half_precision),
    "mamba2": (encode, "_encoded", in_half_precision),
}


def result_of(name: str, folder: Path) -> Result:
    """Store and resume the shortest prefix of one configuration in this process."""
    subject = Subject(name, folder, conformance.LENGTHS[:1])
    subject.build()
    result = subject.check()
    subject.close()
    return result


@pytest.mark.parametrize("name", all_but(["llama", "gemma3_text", "mamba2"], SABOTAGE))
def test_a_codec_that_loses_something_is_seen(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = result_of(name, tmp_path / "sound")
    monkeypatch.setattr(*SABOTAGE[name])

    broken = result_of(name, tmp_path / "broken")

    assert sound.is_right
    assert sound.difference < ROUNDING
    assert not broken.is_right or broken.difference > ROUNDING


def test_a_codec_that_trims_a_wrapped_window_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(restore._RESTORE, restore.LayerKind.WINDOW, by_trimming)  # type: ignore[arg-type]

    broken = result_of("gemma3_text", tmp_path)

    assert not broken.is_right or broken.difference > ROUNDING


def test_a_hit_that_reads_everything_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "promptcache.tiers.prefix_cache.restore_prefix",
        lambda store, fingerprint, cache, token_ids, **options: restore_prefix(
            store, fingerprint, list(cache), token_ids, **options
        )._replace(match=Match(), cached_tokens=0),
    )

    broken = result_of("llama", tmp_path)

    assert not any(trial.is_hit for trial in broken.trials)


# Long prompts


def test_window_model_that_forks_in_the_middle_of_4000_tokens_reads_its_own_only(
    tmp_path: Path,
) -> None:
    subject = Subject("gemma3_text", tmp_path)
    stored = conformance.token_ids(FOUR_THOUSAND, 1)
    subject.generator.build(RenderedPrompt(stored, is_prefix=True))
    fork = 2500
    prompt = RenderedPrompt([*stored[:fork], *conformance.token_ids(50, 2)], (fork,))

    warm = subject.run(prompt, save=False)

    cold = subject.run(prompt, reuse=False, save=False)
    assert warm.cached_tokens == fork
    assert (warm.num_read, cold.num_read) == (50, fork + 50)
    assert warm.tokens == cold.tokens
    assert conformance.largest_difference(warm.logprobs, cold.logprobs) < ROUNDING
