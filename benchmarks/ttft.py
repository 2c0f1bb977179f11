"""Time to first token: cold, and with what promptcache or mlx-lm kept of a prefix.

    python -m benchmarks.ttft --models smollm2 --lengths 1000 4000 --trials 5

The prompt is a prefix of random words and a suffix of four tokens. Every trial is a
process of its own, its model loaded and run once; the pages of the file it reads are in
memory or have been dropped. All answers, 16 tokens each, have to equal the cold one.
"""

import argparse
import json
import math
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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

from benchmarks import page_cache
from benchmarks.harness import (
    NARRATOR,
    WORKER,
    Measurement,
    blobs_of,
    check_close,
    check_equal,
    evaluate,
    median_ratio,
    narrate,
    nbytes_of,
    options_parser,
    report,
    run_worker,
    save_cache,
    shrink,
)
from benchmarks.random_llama import LLAMA_1B, LLAMA_8B, make_random_llama
from promptcache import CachedGenerator
from promptcache.engine.decode import Step
from promptcache.models.default.download import ensure_default_model
from promptcache.models.load import load as load_model
from promptcache.models.load import load_tokenizer

MAX_TOKENS = 16
# The models with random weights. The largest is for a GPU.
RANDOM = {"llama-1b": (LLAMA_1B, mx.float32), "llama-8b": (LLAMA_8B, mx.bfloat16)}
WARM_UP = [11, 12, 13, 14]
# Calls in a process that has answered before, each way in turn.
NUM_HOT = 3
SUFFIX_TOKENS = 4
# How much bigger mlx-lm's file may be: it has up to 255 rows of padding.
MAX_PADDING = 256


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to the first token.

    Attributes:
        way: What `Trial` calls it.
        store: Which store it reads.
        is_cold: Whether the file's pages are dropped before.
        missing: How many tokens of the prompt are not cached.
    """

    way: str
    store: str = "store"
    is_cold: bool = False
    missing: int = SUFFIX_TOKENS


COLD, HOT, SUFFIX = "cold", "promptcache, hot", "the suffix alone, hot"
PROMPTCACHE, MLX_LM = "promptcache", "mlx-lm's file"
WHOLE = "promptcache, whole prompt stored"
BARE = "mlx-lm's file, the model alone"
VARIANTS = {
    COLD: Variant("cold"),
    PROMPTCACHE: Variant("promptcache"),
    MLX_LM: Variant("mlx-lm"),
    BARE: Variant("bare"),
    # The model has to read one token to have logits.
    WHOLE: Variant("promptcache", "whole", missing=1),
    HOT: Variant("hot"),
    f"{PROMPTCACHE}, cold pages": Variant("promptcache", is_cold=True),
    f"{MLX_LM}, cold pages": Variant("mlx-lm", is_cold=True),
    f"{BARE}, cold pages": Variant("bare", is_cold=True),
}
BASELINES = {
    PROMPTCACHE: (MLX_LM, BARE),
    WHOLE: (MLX_LM, BARE),
    HOT: (SUFFIX,),
    f"{PROMPTCACHE}, cold pages": (f"{MLX_LM}, cold pages", f"{BARE}, cold pages"),
}


@dataclass(slots=True)
class Prompt:
    """A prompt to measure with one model, and what was measured.

    Attributes:
        model: The model's name.
        folder: The model's folder.
        token_ids: All of its tokens.
        files: Where things are saved.
        memory: Further arguments of the generator.
        seconds: Times to the first token, by variant.
        cold: The cold answer, which all others have to equal.
        nbytes: Sizes of what was read, by variant.
    """

    model: str
    folder: Path
    token_ids: list[int]
    files: dict[str, str]
    memory: Mapping[str, int]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cold: dict[str, Any] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)

    @property
    def num_prefix(self) -> int:
        """Return how many tokens the prefix has."""
        return len(self.token_ids) - SUFFIX_TOKENS

    def run(self, name: str) -> None:
        """Run one trial of a variant. Raises AssertionError if its answer is wrong."""
        variant = VARIANTS[name]
        request = {
            "way": variant.way,
            "model": str(self.folder),
            "token_ids": self.token_ids,
            "num_prefix": self.num_prefix,
            "files": self.files | {"store": self.files[variant.store]},
            "is_cold": variant.is_cold,
            "memory": self.memory if variant.way == "hot" else {},
        }
        answer = run_worker("benchmarks.ttft", request)
        if variant.way == "hot":
            for each in answer["hot"]:
                self._take(HOT, each, variant.missing)
            for each in answer["suffix"]:
                self._take(SUFFIX, each, variant.missing)
            return
        if "nbytes" in answer:
            self._check_pages(name, answer)
            self.nbytes[name] = answer["nbytes"]
        missing = len(self.token_ids) if name == COLD else variant.missing
        self._take(name, answer, missing)

    def _check_pages(self, name: str, answer: dict[str, Any]) -> None:
        if answer["resident"] is not None:
            wanted = 0.0 if VARIANTS[name].is_cold else 1.0
            check_equal(f"{name}: share in memory", answer["resident"], wanted)

    def _take(self, name: str, answer: dict[str, Any], missing: int) -> None:
        """Compare an answer with the cold one, and note how long it took."""
        self.cold = self.cold or answer
        cached_tokens = len(self.token_ids) - missing
        check_equal(f"{name}: cached tokens", answer["cached_tokens"], cached_tokens)
        check_equal(f"{name}: answer", answer["token_ids"], self.cold["token_ids"])
        check_close(f"{name}: logprobs", answer["logprobs"], self.cold["logprobs"])
        self.seconds.setdefault(name, []).append(answer["seconds"])

    def check_nbytes(self) -> None:
        """Raise AssertionError if promptcache reads other rows than mlx-lm does."""
        own, others = self.nbytes[PROMPTCACHE], self.nbytes[MLX_LM]
        padded = math.ceil(self.num_prefix / MAX_PADDING) * MAX_PADDING
        ratio = others / own / (padded / self.num_prefix)
        check_equal("same bytes in both files", round(ratio, 2), 1.0)

    def measurements(self) -> Iterator[Measurement]:
        """Yield a line for each variant."""
        names = [*VARIANTS]
        names.insert(names.index(HOT) + 1, SUFFIX)
        for name in names:
            seconds = self.seconds.get(name, [])
            yield Measurement(
                {"model": self.model, "prefix": self.num_prefix, "run": name},
                "s",
                seconds,
                self._ratios(name) if seconds else {},
            )

    def _ratios(self, name: str) -> dict[str, float]:
        seconds, cold = self.seconds[name], self.seconds[COLD]
        speedup = statistics.median(cold) / statistics.median(seconds)
        ratios = {} if name == COLD else {"faster than cold": speedup}
        for other in BASELINES.get(name, ()):
            ratios[other] = median_ratio(seconds, self.seconds[other])
        return ratios


def random_words(folder: Path, num_tokens: int) -> list[int]:
    """Return token ids of random words."""
    random_ = random.Random(num_tokens)
    words = NARRATOR.read_text().split()
    text = " ".join(random_.choices(words, k=num_tokens))
    token_ids: list[int] = load_tokenizer(str(folder)).encode(text)[:num_tokens]
    check_equal("length of the prompt", len(token_ids), num_tokens)
    return token_ids


def measure(prompt: Prompt, trials: int, cold_trials: int) -> None:
    """Run rounds of all variants, each round in another order."""
    prompt.run(COLD)
    names = [name for name in VARIANTS if name != COLD]
    if not page_cache.can_drop():
        names = [name for name in names if not VARIANTS[name].is_cold]
    for trial in range(trials):
        if 0 < trial < cold_trials:
            prompt.run(COLD)
        for name in names[trial % len(names) :] + names[: trial % len(names)]:
            prompt.run(name)
    prompt.check_nbytes()


def model_folder(name: str, folder: Path) -> Path:
    """Return the folder of a model, which is made if it is a random one."""
    if name == "smollm2":
        return ensure_default_model()
    made = folder / name
    return made if made.exists() else make_random_llama(made, *RANDOM[name])


def run(options: argparse.Namespace) -> list[Measurement]:
    """Measure every model with every length."""
    found: list[Measurement] = []
    memory = (
        {} if options.memory_limit is None else {"memory_limit": options.memory_limit}
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        for name in options.models:
            folder = model_folder(name, Path(options.folder or place))
            for length in options.lengths:
                narrate(f"ttft: {name}, {length} tokens")
                token_ids = random_words(folder, length + SUFFIX_TOKENS)
                files = {
                    kind: f"{place}/{name}-{length}.{kind}"
                    for kind in ("store", "whole")
                }
                files["mlx-lm"] = f"{place}/{name}-{length}.safetensors"
                prompt = Prompt(name, folder, token_ids, files, memory)
                measure(prompt, options.trials, options.cold_trials)
                found += prompt.measurements()
    return found


def main() -> None:
    """Measure, check that all answers are equal, and print a table."""
    parser = options_parser(__doc__, trials=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1_000, 4_000])
    parser.add_argument(
        "--models", nargs="+", choices=["smollm2", *RANDOM], default=["smollm2"]
    )
    parser.add_argument("--cold-trials", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for files, and to keep the model")
    parser.add_argument("--memory-limit", type=int, metavar="BYTES")
    options = parser.parse_args()
    report("ttft", run(options), file=options.json)


# One trial, in a process of its own


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
        nbytes = nbytes_of(files)
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
        pages = self.set_pages(blobs_of(self.files["store"]))
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
        evaluate(cache)
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
        shrink(cache, self.num_prefix)
        save_prompt_cache(str(self.files["mlx-lm"]), cache)
        store, fingerprint = self.generator.store, self.generator.fingerprint()
        assert store is not None
        prefix = self.token_ids[: self.num_prefix]
        save_cache(store, fingerprint, prefix, cache)
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


def work() -> None:
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
    work() if WORKER in sys.argv else main()
