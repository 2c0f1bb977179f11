"""Time to first token with a model the size of Llama 3 8B, on MLX's GPU backend.

The model has random weights: what it says means nothing, but cold and warm runs have
to say the same. Everything runs in one process, with the page cache warm, kernels
compiled and MLX's own cache of buffers cleared before every run.

    python -m benchmarks.gpu --lengths 2048 8192 32768 100000 --trials 3 --json FILE
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models import llama
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

from benchmarks import caches, page_cache
from benchmarks.harness import (
    Measurement,
    check_equal,
    median_ratio,
    narrate,
    options_parser,
    report,
)
from promptcache import CachedGenerator
from promptcache.engine.prefill import prefill
from promptcache.models.identity.identity import ModelIdentity
from promptcache.prompts.render import RenderedPrompt
from tests.architectures.conformance import Tokenizer, wrapped

SUFFIX_TOKENS = 32
MLX_LM = "mlx-lm's file"
# Hashing 16 GB of random weights is not what is measured.
IDENTITY = ModelIdentity("random-llama-8b", None, {"weights": "random"})


def make_model(
    hidden: int = 4096,
    layers: int = 32,
    heads: int = 32,
    kv_heads: int = 8,
    ffn: int = 14336,
    vocab: int = 128256,
) -> Any:
    """Return a Llama with random weights in bfloat16, 128 KiB a token by default."""
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=ffn,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rms_norm_eps=1e-5,
            vocab_size=vocab,
            rope_theta=500000.0,
            tie_word_embeddings=False,
        )
    )
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


def random_ids(seed: int, count: int, vocab: int) -> list[int]:
    """Return token ids."""
    key = mx.random.key(seed)
    ids: list[int] = mx.random.randint(0, vocab, (count,), key=key).tolist()
    return ids


class Run(NamedTuple):
    """How long the first token took, which it was, and whether nothing was loaded."""

    seconds: float
    token: int
    is_declined: bool = False


class Bench:
    """Runs of one prefix length; each returns seconds and the first token."""

    def __init__(self, model: Any, folder: Path, prefix: list[int], vocab: int) -> None:
        """Take the prefix and where to keep it."""
        self._model = model
        self._folder = folder
        self._prefix = prefix
        self._vocab = vocab
        self._file = folder / "mlx-lm.safetensors"

    def _generator(self, **kwargs: Any) -> CachedGenerator:
        store = self._folder / "store"
        return CachedGenerator(
            self._model,
            wrapped(Tokenizer()),
            store=store,
            max_nbytes=1 << 40,
            identity=IDENTITY,
            **kwargs,
        )

    def _suffix(self, trial: int) -> list[int]:
        """Return tokens that no other trial has."""
        return random_ids(1000 + trial, SUFFIX_TOKENS, self._vocab)

    def _prompt(self, trial: int) -> RenderedPrompt:
        """Return the prefix with a suffix, cut between them also where it is cold.

        So all runs do the same arithmetic: logits of random weights lie close together.
        """
        token_ids = self._prefix + self._suffix(trial)
        return RenderedPrompt(token_ids, (len(self._prefix),))

    def save(self) -> None:
        """Save the prefix in both ways."""
        with self._generator(memory_limit=0) as generator:
            generator.build(self._prefix)
        mx.clear_cache()
        cache = make_prompt_cache(self._model)
        prefill(self._model, cache, self._prefix, start=0, end=len(self._prefix))
        save_prompt_cache(str(self._file), cache)
        mx.clear_cache()

    def blobs(self) -> list[Path]:
        """Return the files of the store."""
        return caches.blobs_of(self._folder / "store")

    def _ask(self, generator: CachedGenerator, trial: int) -> Run:
        prompt = self._prompt(trial)
        mx.clear_cache()
        started = time.perf_counter()
        answer = generator.stream_generate(prompt, max_tokens=1, save=False)
        first = next(answer)
        seconds = time.perf_counter() - started
        for _ in answer:
            pass
        return Run(seconds, first.token, first.declined is not None)

    def cold(self, trial: int) -> Run:
        """Read the whole prompt."""
        with self._generator(memory_limit=0, reuse=False, save=False) as generator:
            return self._ask(generator, trial)

    def warm(self, trial: int) -> Run:
        """Load the prefix from the store, and read the rest."""
        with self._generator(memory_limit=0) as generator:
            return self._ask(generator, trial)

    def hot(self, trial: int) -> Run:
        """Take the prefix from memory: the second prompt of a generator."""
        with self._generator() as generator:
            self._ask(generator, 10_000 + trial)
            return self._ask(generator, trial)

    def mlx_lm(self, trial: int) -> Run:
        """Load mlx-lm's file and read the rest, as `generate_step` does."""
        rest = mx.array(self._suffix(trial))
        mx.clear_cache()
        started = time.perf_counter()
        cache = load_prompt_cache(str(self._file))
        logits = self._model(rest[None], cache=cache)[:, -1, :]
        token = mx.argmax(logits, axis=-1).item()
        return Run(time.perf_counter() - started, token)


RUNS: dict[str, Callable[[Bench, int], Run]] = {
    "cold": Bench.cold,
    MLX_LM: Bench.mlx_lm,
    "promptcache, warm": Bench.warm,
    "promptcache, hot": Bench.hot,
}


def measure(bench: Bench, length: int, trials: int) -> list[Measurement]:
    """Return the seconds of all kinds of runs, in turn so that all age alike.

    Cold, warm and hot runs have to begin with the same token. mlx-lm's file gives a
    cache of another capacity, for which MLX may take another kernel: with random
    weights its rounding can change the likeliest of 128,256 tokens.
    """
    seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    # Trial -1 warms up: kernels of this length are compiled.
    for trial in range(-1, trials):
        tokens: dict[str, int] = {}
        for name, run in RUNS.items():
            found = run(bench, trial)
            tokens[name] = found.token
            if trial >= 0:
                seconds[name].append(found.seconds)
        theirs = tokens.pop(MLX_LM)
        check_equal("first tokens", len({*tokens.values()}), 1)
        if theirs != tokens["cold"]:
            narrate(f"{MLX_LM} begins with another token")
    return [
        Measurement(
            {"tokens": length, "run": name},
            "s",
            values,
            {} if name == "cold" else ratio(values, seconds["cold"]),
        )
        for name, values in seconds.items()
    ]


def measure_decision(bench: Bench, length: int) -> list[Measurement]:
    """Return what happens once the files are no longer in memory.

    The first run loads, because it knows no better; the next ones know how slow that
    is here.
    """
    found = []
    for number in range(3):
        page_cache.drop(bench.blobs())
        run = bench.warm(20_000 + number)
        deed = "prefilled again" if run.is_declined else "loaded"
        name = f"pages dropped, run {number + 1}: {deed}"
        found.append(Measurement({"tokens": length, "run": name}, "s", [run.seconds]))
    return found


def ratio(values: list[float], cold: list[float]) -> dict[str, float]:
    """Return how often a cold run some seconds are."""
    return {"cold": median_ratio(values, cold)}


def main() -> None:
    """Measure, check that all answers are equal, and print a table."""
    parser = options_parser(__doc__, trials=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--small", action="store_true", help="a tiny model, to test")
    options = parser.parse_args()
    size = {"hidden": 256, "layers": 3, "heads": 8, "kv_heads": 4, "ffn": 512}
    vocab = 1000 if options.small else 128256
    model = make_model(**(size if options.small else {}), vocab=vocab)
    prefix = random_ids(0, max(options.lengths), vocab)
    measurements = []
    for length in options.lengths:
        narrate(f"gpu: {length} tokens")
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(model, Path(folder), prefix[:length], vocab)
            bench.save()
            measurements += measure(bench, length, options.trials)
            measurements += measure_decision(bench, length)
    report("gpu", measurements, file=options.json)


if __name__ == "__main__":
    main()
