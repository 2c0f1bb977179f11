"""Smaller files: what storing keys and values in 8 and 4 bits costs on real text.

A prefix of a text is stored; the tokens after it are then read after the prefix as it
was computed and as it is restored, and their log-probabilities compared.
`python -m benchmarks.store_bits`
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from benchmarks.harness import in_unit, machine, print_table
from promptcache import CachedGenerator
from promptcache.models.prefill_plan import PrefillPlan
from promptcache.models.settings import Settings
from promptcache.tiers.disk_tier import restore_prefix

TEXT = Path(__file__).parents[1] / "docs" / "how-it-works.md"


class Read(NamedTuple):
    """What was read after a prefix: log-probabilities, shape `(tokens, vocabulary)`."""

    logprobs: mx.array
    seconds: list[float]


def main() -> None:
    """Print bytes, loss and the time to restore for each number of bits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--prefix", type=int, default=1000, help="tokens to store")
    parser.add_argument("--tokens", type=int, default=500, help="tokens to compare")
    parser.add_argument("--trials", type=int, default=7)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        generator = CachedGenerator.load(store=folder, save=False)
        print(machine(), flush=True)
        token_ids = generator.tokenizer.encode(options.text.read_text())
        prefix = token_ids[: options.prefix]
        rest = token_ids[options.prefix :][: options.tokens]
        exact = None
        for bits in (None, 8, 4):
            # Alone, so that exact rows are not preferred.
            nbytes = generator.build(prefix, store_bits=bits).nbytes
            found = read(generator, prefix, rest, bits, options.trials)
            exact = exact or found
            rows.append(
                [
                    "own" if bits is None else bits,
                    f"{nbytes / 1e6:.1f} MB",
                    *loss(exact.logprobs, found.logprobs),
                    in_unit(statistics.median(found.seconds), "s"),
                ]
            )
    headers = ["bits", "file", "KL", "top-1", "largest difference", "restored in"]
    print(f"{len(prefix)} tokens stored, {len(rest)} positions compared")
    print_table(headers, rows)


def read(
    generator: Any, prefix: list[int], rest: list[int], bits: int | None, trials: int
) -> Read:
    """Restore the prefix some times, and read the rest after the last."""
    settings = Settings.of(store_bits=bits)
    fingerprint = generator.fingerprint(settings).reusable[-1]
    seconds = []
    for _ in range(trials):
        cache = make_prompt_cache(generator.model)
        started = time.perf_counter()
        resumed = restore_prefix(
            generator.store,
            fingerprint,
            cache,
            prefix,
            plan=PrefillPlan(),
            kv=settings.kv,
            generating=False,
        )
        seconds.append(time.perf_counter() - started)
        assert resumed.match.cached_tokens == len(prefix)
    logits = generator.model(mx.array(rest)[None], cache=cache)[0].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(logprobs)
    return Read(logprobs, seconds)


def loss(exact: mx.array, found: mx.array) -> list[str]:
    """Return mean KL(exact‖found) in nats, top-1 agreement and largest difference."""
    divergence = mx.mean(mx.sum(mx.exp(exact) * (exact - found), axis=-1))
    same = mx.mean(mx.argmax(exact, axis=-1) == mx.argmax(found, axis=-1))
    largest = mx.max(mx.abs(exact - found))
    return [
        f"{abs(divergence.item()):.1e}",
        f"{same.item():.1%}",
        f"{largest.item():.1e}",
    ]


if __name__ == "__main__":
    main()
