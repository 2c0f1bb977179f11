"""One trial of `benchmarks.ttft`: answer a prompt, and say when the answer began.

All trials load the model and its tokenizer in the same way, run the model once on some
other tokens, and bring the file's pages into the wanted state, before time starts.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import (
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)

from benchmarks import caches, page_cache
from promptcache import CachedGenerator
from promptcache.engine.decode import Step
from promptcache.models.load import load as load_model

MAX_TOKENS = 16
WARM_UP = [11, 12, 13, 14]
# Calls in a process that has answered before, each way in turn.
NUM_HOT = 3


@dataclass(frozen=True, slots=True)
class Answer:
    """The first tokens of an answer.

    Attributes:
        seconds: From the call to the first token.
        token_ids: All tokens.
        logprobs: The log-probability of each.
        cached_tokens: How much of the prompt was cached.
    """

    seconds: float
    token_ids: list[int]
    logprobs: list[float]
    cached_tokens: int

    def to_json(self) -> dict[str, Any]:
        """Return it as the orchestrator wants it."""
        return {name: getattr(self, name) for name in self.__slots__}


class Trial:
    """One process with a model, a prompt and the places of what was saved of it."""

    def __init__(self, request: dict[str, Any]) -> None:
        """Load the model, open the store and run the model once."""
        self.token_ids: list[int] = request["token_ids"]
        self.num_prefix: int = request["num_prefix"]
        self.suffix = self.token_ids[self.num_prefix :]
        self.files = {name: Path(path) for name, path in request["files"].items()}
        self.is_cold: bool = request["is_cold"]
        self._memory: dict[str, int] = request["memory"]
        self.model, self.tokenizer, self._identity = load_model(request["model"])
        self.generator = self._generator()
        self._warm_up()

    def _generator(self) -> CachedGenerator:
        return CachedGenerator(
            self.model,
            self.tokenizer,
            store=self.files["store"],
            save=False,
            identity=self._identity,
            **self._memory,
        )

    def _warm_up(self) -> None:
        """Read some tokens and one more, as the end of every prompt is read."""
        with mx.stream(generation_stream):
            cache = make_prompt_cache(self.model)
            mx.eval(self.model(mx.array([WARM_UP]), cache=cache))
            mx.eval(mx.argmax(self.model(mx.array([WARM_UP[:1]]), cache=cache)))

    def set_pages(self, files: Sequence[Path]) -> dict[str, Any]:
        """Bring the files' pages into memory, or out of it; tell which are there."""
        page_cache.warm(files)
        if self.is_cold:
            page_cache.drop(files)
        nbytes = caches.nbytes_of(files)
        return {"resident": page_cache.resident_share(files), "nbytes": nbytes}

    # Ways to answer

    def cold(self) -> dict[str, Any]:
        """Answer with mlx-lm alone, from nothing; keep the cache where none is."""
        cache = make_prompt_cache(self.model)
        answer = self._plain(self.token_ids, lambda: cache)
        if not self.files["mlx-lm"].exists():
            self._keep(cache)
        return answer.to_json()

    def promptcache(self) -> dict[str, Any]:
        """Answer with what a store has of the prompt."""
        pages = self.set_pages(caches.blobs_of(self.files["store"]))
        return self._cached(self.token_ids).to_json() | pages

    def mlx_lm(self) -> dict[str, Any]:
        """Answer with mlx-lm's own file."""
        pages = self.set_pages([self.files["mlx-lm"]])
        return self._plain(self.suffix, self._load, self.num_prefix).to_json() | pages

    def bare(self) -> dict[str, Any]:
        """Load mlx-lm's own file, and read the suffix in the fastest way there is."""
        pages = self.set_pages([self.files["mlx-lm"]])
        return self._bare(self._load).to_json() | pages

    def hot(self) -> dict[str, Any]:
        """Answer again and again in one process, and let the model do only its part."""
        other = [*self.token_ids[: self.num_prefix], *WARM_UP]
        hot, suffix = [], []
        for _ in range(NUM_HOT):
            # A new one each time, which does not know the suffix yet.
            with self._generator() as self.generator:
                self._cached(other)
                hot.append(self._cached(self.token_ids))
            suffix.append(self._suffix_only())
        return {
            "hot": [answer.to_json() for answer in hot],
            "suffix": [answer.to_json() for answer in suffix],
        }

    def _cached(self, token_ids: list[int]) -> Answer:
        started = time.perf_counter()
        responses = self.generator.stream_generate(token_ids, max_tokens=MAX_TOKENS)
        return _answer(responses, started)

    def _load(self) -> list[Any]:
        cache: list[Any] = load_prompt_cache(str(self.files["mlx-lm"]))
        return cache

    def _suffix_only(self) -> Answer:
        """Read the suffix into a cache that is in memory before time starts."""
        cache = self._load()
        caches.evaluate(cache)
        return self._bare(lambda: cache)

    def _bare(self, load: Callable[[], list[Any]]) -> Answer:
        """Load a cache and answer with the model alone, each token when it is wanted.

        mlx-lm reads the last token by itself, and begins the second token before it
        hands out the first.
        """
        started = time.perf_counter()
        return _answer(self._greedy(load()), started, self.num_prefix)

    def _greedy(self, cache: list[Any]) -> Iterator[Step]:
        token_ids = self.suffix
        for _ in range(MAX_TOKENS):
            with mx.stream(generation_stream):
                logits = self.model(mx.array([token_ids]), cache=cache)[0, -1]
                logprobs = logits - mx.logsumexp(logits)
                token_ids = [mx.argmax(logprobs).item()]
            yield Step(token_ids[0], logprobs)

    def _plain(
        self,
        token_ids: list[int],
        load: Callable[[], list[Any]],
        cached_tokens: int = 0,
    ) -> Answer:
        started = time.perf_counter()
        responses = mlx_lm.stream_generate(
            self.model,
            self.tokenizer,
            token_ids,
            max_tokens=MAX_TOKENS,
            prompt_cache=load(),
        )
        return _answer(responses, started, cached_tokens)

    # Saving

    def _keep(self, cache: list[Any]) -> None:
        """Save the prefix's part of a cache in mlx-lm's way and in the store's."""
        caches.shrink(cache, self.num_prefix)
        save_prompt_cache(str(self.files["mlx-lm"]), cache)
        store, fingerprint = self.generator.store, self.generator.fingerprint()
        assert store is not None
        prefix = self.token_ids[: self.num_prefix]
        caches.save_cache(store, fingerprint, prefix, cache)
        self.generator.close()
        self._keep_whole()

    def _keep_whole(self) -> None:
        """Save the whole prompt in another store, as a generation does it."""
        shutil.copytree(self.files["store"], self.files["whole"])
        identity = self.generator.identity
        with CachedGenerator(
            self.model, self.tokenizer, store=self.files["whole"], identity=identity
        ) as generator:
            for _ in generator.stream_generate(self.token_ids, 1, save=True):
                pass


def _answer(responses: Iterable[Any], started: float, cached_tokens: int = 0) -> Answer:
    """Take an answer; nothing but the first token's arrival is timed."""
    seconds, found = 0.0, []
    for response in responses:
        seconds = seconds or time.perf_counter() - started
        found.append(response)
    return Answer(
        seconds,
        [response.token for response in found],
        [response.logprobs[response.token].item() for response in found],
        getattr(found[0], "cached_tokens", cached_tokens),
    )


def main() -> None:
    """Read a request from stdin, do it and print JSON."""
    request = json.load(sys.stdin)
    trial = Trial(request)
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "cold": trial.cold,
        "promptcache": trial.promptcache,
        "mlx-lm": trial.mlx_lm,
        "bare": trial.bare,
        "hot": trial.hot,
    }
    print(json.dumps(ways[request["way"]]()))


if __name__ == "__main__":
    main()
