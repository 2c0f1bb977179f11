"""Parity: a prompt read cold against the same prompt resumed at every kind of cut."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import mlx.core as mx

from promptcache.errors import UsageError
from promptcache.generator import CachedGenerator
from promptcache.models.loaded import LoadedModel
from promptcache.models.settings import ReadOptions, Settings
from promptcache.prompts.render import Prompt, RenderedPrompt


@dataclass(frozen=True, slots=True)
class CutReport:
    """The result of resuming at one cut.

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
        cuts: The result of each cut.
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
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Unpack[ReadOptions],
) -> ParityReport:
    """Answer a prompt from nothing, and resumed at every kind of cut; compare.

    Each cut gets a store of its own in a temporary folder, so that every byte of the
    warm run went through a file.

    Args:
        generator: The model and its tokenizer; its store is not touched.
        prompt: Text, token ids or chat messages.
        tools: Tools for the chat template.
        max_tokens: How many tokens of the answer to compare.
        on_progress: Called with the number of runs that are done, and their total.
        options: See `ReadOptions`.

    Raises:
        UsageError: The arguments contradict each other.
        StoreError: The temporary store cannot be written.
    """
    rendered = generator.render(prompt, tools)
    settings = Settings.of(**options)
    cuts = dict(_cuts(rendered, settings.step_size))
    on_progress(0, len(cuts) + 1)
    cold = _answer(generator, rendered, max_tokens, reuse=False, save=False, **options)
    reports = []
    for done, (position, kind) in enumerate(sorted(cuts.items()), start=1):
        on_progress(done, len(cuts) + 1)
        with _on_empty_store(generator) as warmed:
            _store(warmed, rendered, position, options)
            sampler = _forced(cold.tokens)
            warm = _answer(
                warmed, rendered, max_tokens, save=False, sampler=sampler, **options
            )
        reports.append(_compared(kind, position, cold, warm))
    on_progress(len(cuts) + 1, len(cuts) + 1)
    return ParityReport(
        model=generator.identity.name,
        prompt_tokens=len(rendered.token_ids),
        answer_tokens=len(cold.tokens),
        exact=LoadedModel(generator.model).exact_after(settings) is not None,
        cuts=tuple(reports),
        store_bits=settings.store_bits,
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


@contextlib.contextmanager
def _on_empty_store(generator: CachedGenerator) -> Iterator[CachedGenerator]:
    with (
        tempfile.TemporaryDirectory() as folder,
        CachedGenerator(
            generator.model,
            generator.tokenizer,
            store=folder,
            # A prompt of any length, and nothing is evicted.
            max_nbytes=1 << 62,
            identity=generator.identity,
        ) as other,
    ):
        yield other


def _store(
    generator: CachedGenerator,
    rendered: RenderedPrompt,
    position: int,
    options: ReadOptions,
) -> None:
    """Store the first tokens of a prompt as a different prompt would have."""
    if position == len(rendered.token_ids):
        _answer(generator, rendered, 1, save=True, **options)
        return
    boundaries = tuple(b for b in rendered.boundaries if b < position)
    token_ids = rendered.token_ids[:position]
    # Too short for a mode that reuses whole pieces only.
    with contextlib.suppress(UsageError):
        generator.build(
            RenderedPrompt(token_ids, boundaries, is_prefix=True), **options
        )


def _answer(
    generator: CachedGenerator, prompt: Prompt, max_tokens: int, **options: Any
) -> _Answer:
    responses = list(generator.stream_generate(prompt, max_tokens, **options))
    return _Answer(
        [response.token for response in responses],
        [response.logprobs for response in responses],
        responses[-1].cached_tokens,
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
