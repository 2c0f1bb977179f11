"""Overhead: a cold answer that is also saved, against plain mlx-lm; and decoding.

    python -m benchmarks.overhead --trials 3

All in one process after a round that does not count: plain mlx-lm, promptcache with an
empty store, and promptcache again with what it has saved. All answers have to be equal.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm

from benchmarks.harness import (
    Measurement,
    Unit,
    check_close,
    check_equal,
    median_ratio,
    narrate,
    options_parser,
    report,
)
from benchmarks.ttft import random_words
from promptcache import CachedGenerator
from promptcache.models import load
from promptcache.models.default.download import ensure_default_model

MAX_TOKENS = 32
PLAIN, SAVING, HIT = "mlx-lm, cold", "promptcache, cold, saves", "promptcache, hit"


@dataclass(frozen=True, slots=True)
class Run:
    """How long one answer took.

    Attributes:
        first: From the call to the first token.
        total: To the end of the answer, what is saved after it included.
        tokens_per_second: After the second token, up to the one before the last.
        token_ids: The answer.
        logprobs: The log-probability of each token.
    """

    first: float
    total: float
    tokens_per_second: float
    token_ids: list[int]
    logprobs: list[float]


def timed(answer: Callable[[], Iterable[Any]]) -> Run:
    """Run a generation to its end, from memory that no run before has used."""
    gc.collect()
    mx.clear_cache()
    times, responses = [], []
    started = time.perf_counter()
    for response in answer():
        times.append(time.perf_counter())
        responses.append(response)
    ended = time.perf_counter()
    return Run(
        times[0] - started,
        ended - started,
        # From the second token on, when mlx-lm and promptcache have both begun the next
        # one, to the one before the last, which waits for the save.
        (len(times) - 3) / (times[-2] - times[1]),
        [response.token for response in responses],
        [response.logprobs[response.token].item() for response in responses],
    )


class Rounds:
    """One model in memory, and the ways to answer a prompt with it."""

    def __init__(self, num_tokens: int, folder: Path) -> None:
        """Load the default model."""
        self._model, self._tokenizer, self._identity = load.load()
        self._token_ids = random_words(ensure_default_model(), num_tokens)
        self._folder = folder

    def run(self, number: int) -> dict[str, Run]:
        """Answer once in every way. Raises AssertionError if answers differ."""
        if number % 2:
            runs = self._stored(number)
            runs[PLAIN] = timed(self._plain)
        else:
            runs = {PLAIN: timed(self._plain)}
            runs |= self._stored(number)
        for name, run in runs.items():
            check_equal(f"{name}: answer", run.token_ids, runs[PLAIN].token_ids)
            check_close(f"{name}: logprobs", run.logprobs, runs[PLAIN].logprobs)
        return runs

    def _plain(self) -> Iterable[Any]:
        responses: Iterable[Any] = mlx_lm.stream_generate(
            self._model, self._tokenizer, self._token_ids, max_tokens=MAX_TOKENS
        )
        return responses

    def _stored(self, number: int) -> dict[str, Run]:
        """Answer from nothing and save, then answer with what was saved."""
        with CachedGenerator(
            self._model,
            self._tokenizer,
            store=self._folder / str(number),
            identity=self._identity,
        ) as generator:
            saving = timed(lambda: self._cached(generator, 0))
            hit = timed(lambda: self._cached(generator, len(self._token_ids) - 1))
        return {SAVING: saving, HIT: hit}

    def _cached(self, generator: CachedGenerator, cached_tokens: int) -> Iterator[Any]:
        for response in generator.stream_generate(
            self._token_ids, max_tokens=MAX_TOKENS, save=True
        ):
            check_equal("cached tokens", response.cached_tokens, cached_tokens)
            yield response


def measurements(rounds: list[dict[str, Run]]) -> Iterator[Measurement]:
    """Yield a line for each way to answer and each thing that was timed."""
    units: dict[str, tuple[str, Unit]] = {
        "to first token": ("first", "s"),
        f"{MAX_TOKENS} tokens, to the end": ("total", "s"),
        "decoding": ("tokens_per_second", "tokens/s"),
    }
    for what, (attribute, unit) in units.items():
        plain = [getattr(runs[PLAIN], attribute) for runs in rounds]
        for name in (PLAIN, SAVING, HIT):
            values = [getattr(runs[name], attribute) for runs in rounds]
            ratios = {} if name == PLAIN else {PLAIN: median_ratio(values, plain)}
            yield Measurement({"what": what, "run": name}, unit, values, ratios)


def run(options: argparse.Namespace) -> list[Measurement]:
    """Measure rounds, after one that does not count."""
    with tempfile.TemporaryDirectory() as folder:
        rounds = Rounds(options.length, Path(folder))
        runs = []
        for number in range(options.trials + 1):
            narrate(f"overhead: round {number} of {options.trials}")
            runs.append(rounds.run(number))
    return list(measurements(runs[1:]))


def main() -> None:
    """Measure and print a table."""
    parser = options_parser(__doc__, trials=3)
    parser.add_argument("--length", type=int, default=1_000)
    options = parser.parse_args()
    report("overhead", run(options), file=options.json)


if __name__ == "__main__":
    main()
