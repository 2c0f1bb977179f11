"""The table in docs/models.md, from the results of a conformance run."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from benchmarks.harness import machine, table
from tests.architectures import architectures

if TYPE_CHECKING:
    from tests.architectures.conformance import Result

MARK = "<!-- conformance -->\n"
HEADERS = ["model", "cache", "resumes", "bytes a token", "checkpoint", "warm = cold"]


def page(text: str, results: Sequence["Result"]) -> str:
    """Return the page with what stands below its mark written anew."""
    num_hits = sum(result.hits_at_end for result in results)
    modules = {result.name.partition("/")[0] for result in results}
    misses = [result.name for result in results if not result.hits_at_end]
    lines = [
        f"Tiny random models of {len(modules)} architectures in {len(results)} "
        "configurations. One process stores prefixes of 100, 300 and 700 tokens, with "
        "windows of 32; another one opens the store, goes on after each of them, "
        "asks the same prompts again and, where any token will do, parts from them "
        "at tokens 1, 31, 32, 33, 48, 63, 64, 65 and 99. Each answer of 16 tokens is "
        "compared with a cold run that is cut at the same places, and the tokens "
        "that go through the model are counted.\n",
        f"{num_hits} of {len(results)} resume at the very end of what was stored"
        f"{_list('; the others depend on the length: ', misses)}. "
        f"{_verdict(results)}\n",
        f"Measured on {machine()}.\n",
        *table(HEADERS, [_row(result) for result in results]),
        "",
        "Bytes are those of the tiny models, in float32. Not tried:\n",
        *(f"- `{name}`: {why}" for name, why in architectures.UNBUILDABLE.items()),
    ]
    return text.partition(MARK)[0] + MARK + "\n" + "\n".join(lines) + "\n"


def _list(introduction: str, names: Iterable[str]) -> str:
    found = ", ".join(f"`{name}`" for name in names)
    return f"{introduction}{found}" if found else ""


def _verdict(results: Sequence["Result"]) -> str:
    wrong = [result.name for result in results if not result.is_right]
    if wrong:
        return _list("Tokens or counts were wrong for ", wrong)
    equal = sum(result.difference == 0 for result in results)
    worst = max(result.difference for result in results)
    return (
        "All tokens were the same and no token was read that was stored; "
        f"{equal} gave a cold run's logits to the bit everywhere, the others differ by "
        f"up to {worst:.1e} where the last token was read alone."
    )


def _row(result: "Result") -> Iterator[str]:
    yield result.name
    yield ", ".join(f"{count} × {kind}" for kind, count in result.classes.items())
    yield _resumes(result)
    yield f"{result.row_nbytes:,}"
    yield f"{result.checkpoint_nbytes:,}" if result.checkpoint_nbytes else ""
    yield (
        "to the bit" if result.difference == 0 else f"tokens, ±{result.difference:.0e}"
    )


def _resumes(result: "Result") -> str:
    places = "checkpoints" if result.checkpoint_nbytes else "any token"
    return f"ends of pieces, {places}" if result.length_dependence else places
