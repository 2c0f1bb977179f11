"""Parity: a prompt read cold against the same prompt resumed at every kind of cut."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from promptcache.errors import UsageError
from promptcache.generator import CachedGenerator
from promptcache.models.loaded import LoadedModel
from promptcache.models.settings import Settings
from promptcache.prompts.render import Prompt, RenderedPrompt


@dataclass(frozen=True, slots=True)
class CutReport:
    """What came of resuming at one cut.

    Attributes:
        kind: What ends there: a piece, a boundary, nothing, or the prompt.
        position: How many tokens had been stored.
        cached_tokens: How many of them were reused.
        first_difference: Index of the first token of the answer that differs, or None.
        top1_agreement: Share of the tokens that are the likeliest both cold and warm,
            after the same text.
        largest_difference: Largest difference of a log-probability.
        kl_divergence: Mean over the tokens of the divergence of the warm probabilities
            from the cold ones, KL(cold‖warm), in nats.
    """

    kind: str
    position: int
    cached_tokens: int
    first_difference: int | None
    top1_agreement: float
    largest_difference: float
    kl_divergence: float


@dataclass(frozen=True, slots=True)
class ParityReport:
    """How warm runs of a prompt compare with a cold one.

    Attributes:
        model: The model's name.
        prompt_tokens: Length of the prompt.
        answer_tokens: How many tokens were compared after each cut.
        exact: Whether only ends of plain pieces were reused.
        cuts: What came of each cut.
        store_bits: In how many bits keys and values were stored, None for their own.
    """

    model: str
    prompt_tokens: int
    answer_tokens: int
    exact: bool
    cuts: tuple[CutReport, ...]
    store_bits: int | None = None

    @property
    def is_failure(self) -> bool:
        """Return whether tokens differ that never should.

        What is stored in fewer bits is measured, not judged.
        """
        return self.exact and self.store_bits is None and not self.same_tokens

    @property
    def same_tokens(self) -> bool:
        """Return whether the tokens were the same after every cut."""
        return all(cut.first_difference is None for cut in self.cuts)

    @property
    def verdict(self) -> str:
        """Return the result in words."""
        difference = max(cut.largest_difference for cut in self.cuts)
        resumed = [cut for cut in self.cuts if cut.cached_tokens]
        if not resumed:
            return "nothing could be reused, so there is nothing to compare"
        if self.store_bits is not None:
            return self._loss(resumed)
        if not self.same_tokens:
            differing = [c for c in self.cuts if c.first_difference is not None]
            hint = (
                "this should not happen, please report it"
                if self.exact
                else "--exact repeats a cold run's arithmetic"
            )
            return (
                f"the tokens differ after {len(differing)} of {len(self.cuts)} cuts, "
                f"log-probabilities by up to {difference:.1e}; {hint}"
            )
        if difference:
            return (
                f"the same tokens after every cut; log-probabilities differ by up to "
                f"{difference:.1e}, because the prompt was read in other pieces"
            )
        return "warm equals cold to the bit after every cut"

    def _loss(self, resumed: list[CutReport]) -> str:
        """Return in words what storing in fewer bits costs, over all positions."""
        divergence = sum(cut.kl_divergence for cut in resumed) / len(resumed)
        agreement = sum(cut.top1_agreement for cut in resumed) / len(resumed)
        difference = max(cut.largest_difference for cut in resumed)
        return (
            f"stored in {self.store_bits} bits: KL divergence {divergence:.1e} nats, "
            f"the same likeliest token at {agreement:.1%} of "
            f"{len(resumed) * self.answer_tokens} positions, log-probabilities differ "
            f"by up to {difference:.1e}"
        )


class _Answer(NamedTuple):
    tokens: list[int]
    logprobs: list[mx.array]
    cached_tokens: int


def check_parity(
    generator: CachedGenerator,
    prompt: Prompt,
    *,
    tools: Any = None,
    max_tokens: int = 32,
    exact: bool | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    **settings: Any,
) -> ParityReport:
    """Answer a prompt from nothing, and resumed at every kind of cut; compare.

    Each cut gets a store of its own in a temporary folder, so that every byte of the
    warm run went through a file.

    Args:
        generator: The model and its tokenizer; its store is not touched.
        prompt: Text, token ids or chat messages.
        tools: Tools for the chat template.
        max_tokens: How many tokens of the answer to compare.
        exact: See `CachedGenerator.stream_generate`.
        on_progress: Called with the number of runs that are done, and their total.
        settings: `kv_bits`, `store_bits` and so on, as `stream_generate` takes them.

    Raises:
        UsageError: The arguments make no sense.
        StoreError: The temporary store cannot be written.
    """
    rendered = generator.render(prompt, tools)
    of_run = Settings.of(exact=exact, **settings)
    options = {"max_tokens": max_tokens, "exact": exact, **settings}
    cuts = dict(_cuts(rendered, of_run.step_size))
    on_progress(0, len(cuts) + 1)
    cold = _answer(generator, rendered, reuse=False, save=False, **options)
    reports = []
    for done, (position, kind) in enumerate(sorted(cuts.items()), start=1):
        on_progress(done, len(cuts) + 1)
        with (
            tempfile.TemporaryDirectory() as folder,
            _on_store(generator, Path(folder)) as other,
        ):
            _store(other, rendered, position, {"exact": exact, **settings})
            warm = _answer(
                other, rendered, save=False, sampler=_forced(cold.tokens), **options
            )
        reports.append(_compared(kind, position, cold, warm))
    on_progress(len(cuts) + 1, len(cuts) + 1)
    return ParityReport(
        model=generator.identity.name,
        prompt_tokens=len(rendered.token_ids),
        answer_tokens=len(cold.tokens),
        exact=LoadedModel(generator.model).exact_after(of_run) is not None,
        cuts=tuple(reports),
        store_bits=of_run.store_bits,
    )


def _cuts(rendered: RenderedPrompt, step_size: int) -> Iterator[tuple[int, str]]:
    """Yield positions to cut at; a later kind of the same position wins."""
    num_tokens = len(rendered.token_ids)
    pieces = range(step_size, num_tokens, step_size)
    places = [0, *pieces, *rendered.boundaries, num_tokens]
    longest = max(zip(sorted(places)[1:], sorted(places), strict=False), key=_length)
    middle = sum(longest) // 2
    if middle:
        yield middle, "in between"
    for position in {*pieces[:1], *pieces[-1:]}:
        yield position, "end of a piece"
    for position in rendered.boundaries:
        yield position, "boundary"
    yield num_tokens, "full prompt"


def _length(span: tuple[int, int]) -> int:
    return span[0] - span[1]


def _on_store(generator: CachedGenerator, folder: Path) -> CachedGenerator:
    return CachedGenerator(
        generator.model,
        generator.tokenizer,
        store=folder,
        # A prompt of any length, and nothing is evicted.
        max_nbytes=1 << 62,
        identity=generator.identity,
    )


def _store(
    generator: CachedGenerator,
    rendered: RenderedPrompt,
    position: int,
    settings: dict[str, Any],
) -> None:
    """Store the first tokens of a prompt as another prompt would have."""
    if position == len(rendered.token_ids):
        _answer(generator, rendered, save=True, max_tokens=1, **settings)
        return
    boundaries = tuple(b for b in rendered.boundaries if b < position)
    token_ids = rendered.token_ids[:position]
    # Too short for a mode that reuses whole pieces only.
    with contextlib.suppress(UsageError):
        generator.build(RenderedPrompt(token_ids, boundaries, is_open=True), **settings)


def _answer(generator: CachedGenerator, prompt: Prompt, **options: Any) -> _Answer:
    with contextlib.closing(generator.stream_generate(prompt, **options)) as responses:
        taken = list(responses)
    return _Answer(
        [response.token for response in taken],
        [response.logprobs for response in taken],
        taken[-1].cached_tokens,
    )


def _forced(tokens: list[int]) -> Callable[[mx.array], mx.array]:
    """Return a sampler that gives these tokens whatever their probabilities."""
    upcoming = iter(tokens)
    return lambda logprobs: mx.array([next(upcoming, 0)])


def _compared(kind: str, position: int, cold: _Answer, warm: _Answer) -> CutReport:
    best = [int(mx.argmax(logprobs).item()) for logprobs in warm.logprobs]
    differing = [i for i, token in enumerate(cold.tokens) if best[i] != token]
    largest = max(
        # Where both are minus infinity, they are the same.
        float(mx.max(mx.where(left == right, 0, mx.abs(left - right))).item())
        for left, right in zip(cold.logprobs, warm.logprobs, strict=True)
    )
    return CutReport(
        kind=kind,
        position=position,
        cached_tokens=warm.cached_tokens,
        first_difference=differing[0] if differing else None,
        top1_agreement=1 - len(differing) / len(best),
        largest_difference=largest,
        kl_divergence=sum(map(_divergence, cold.logprobs, warm.logprobs)) / len(best),
    )


def _divergence(cold: mx.array, warm: mx.array) -> float:
    """Return KL(cold‖warm) of two arrays of log-probabilities, in nats."""
    left, right = cold.astype(mx.float32), warm.astype(mx.float32)
    # What was impossible adds nothing, whatever it is now.
    terms = mx.where(mx.isinf(left), 0, mx.exp(left) * (left - right))
    # Rounding can make a sum of nearly nothing negative.
    return max(float(mx.sum(terms).item()), 0.0)
