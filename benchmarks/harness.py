"""What the benchmarks share: options, trials in processes, caches, tables, files."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import xxhash
from mlx_lm.models.cache import KVCache

import promptcache
from promptcache.kvcache import snapshot
from promptcache.kvcache.encode import encode_rows
from promptcache.segments.fingerprint import Fingerprint
from promptcache.store import PrefixStore

NARRATOR = Path(__file__).parents[1] / "docs" / "examples" / "narrator.txt"

# In float32, as on the CPU, the sums of a long and a short read differ by 1e-5, and
# with one row of one layer in the place of another by 6e-4 (SmolLM2, 500 tokens).
CPU_TOLERANCE = 1e-4
# In half precision, as on a GPU, rounding hides such a row.
GPU_TOLERANCE = 1e-1

# SmolLM2-135M's, in float32.
NUM_LAYERS, KV_HEADS, HEAD_DIM = 30, 3, 64
NBYTES_PER_TOKEN = NUM_LAYERS * 2 * KV_HEADS * HEAD_DIM * 4

# The argument with which a benchmark runs one trial.
WORKER = "--worker"

Unit = Literal["s", "B", "B/s", "tokens/s", "×"]


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured of one thing.

    Attributes:
        labels: What it is, a cell for each column; the same columns for all of a
            benchmark.
        unit: What the values count.
        values: One for each trial, none where it cannot be measured here.
        ratios: How often it is another measurement of the same rounds, by its name.
    """

    labels: Mapping[str, str | int]
    unit: Unit
    values: Sequence[float]
    ratios: Mapping[str, float] = field(default_factory=dict)

    def row(self) -> list[object]:
        """Return the cells of its line."""
        if not self.values:
            return [*self.labels.values(), 0, "not measured", "", ""]
        values = (statistics.median(self.values), min(self.values), max(self.values))
        median, low, high = (in_unit(value, self.unit) for value in values)
        ratios = ", ".join(f"{r:.3g} × {name}" for name, r in self.ratios.items())
        spread = f"{low} to {high}"
        return [*self.labels.values(), len(self.values), median, spread, ratios]

    def to_json(self) -> dict[str, Any]:
        """Return it for a JSON file, values in the unit itself."""
        spread = {}
        if self.values:
            spread = {
                "median": statistics.median(self.values),
                "min": min(self.values),
                "max": max(self.values),
            }
        return {
            "labels": dict(self.labels),
            "unit": self.unit,
            "num_trials": len(self.values),
            **spread,
            "values": list(self.values),
            "ratios": dict(self.ratios),
        }


def in_unit(value: float, unit: Unit) -> str:
    """Return a value for people."""
    if unit == "s":
        return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.2f} ms"
    if unit == "B":
        return f"{value / 1e6:.1f} MB"
    if unit == "B/s":
        return f"{value / 1e9:.2f} GB/s"
    return f"{value:.3g} ×" if unit == "×" else f"{value:.1f} {unit}"


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Return the median of the rounds' ratios.

    Trials of one round ran one after the other, so what else the machine did hit both.
    """
    return statistics.median(a / b for a, b in zip(values, others, strict=False))


def options_parser(doc: str | None, *, trials: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=trials)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write them there")
    return parser


def report(
    benchmark: str,
    measurements: Sequence[Measurement],
    *,
    file: Path | None,
) -> None:
    """Print measurements as a table, and write them to a file if there is one.

    Args:
        benchmark: Its name.
        measurements: A line each.
        file: Where to write them as JSON.
    """
    print(f"{machine()}\n")
    headers = [*measurements[0].labels, "trials", "median", "min to max", "against"]
    print_table(headers, [measurement.row() for measurement in measurements])
    if file is not None:
        write_json(benchmark, measurements, file)


def write_json(benchmark: str, measurements: Sequence[Measurement], file: Path) -> None:
    """Write measurements with the machine and the versions they are of."""
    content = {
        "benchmark": benchmark,
        "machine": machine(),
        "measurements": [measurement.to_json() for measurement in measurements],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def run_worker(module: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run one trial in a process of its own: the benchmark itself with `WORKER`.

    Raises:
        RuntimeError: It failed; the message has what it wrote to stderr.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, WORKER],
        input=json.dumps(request),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"a trial of {module} failed\n{done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def check_equal(what: str, value: object, expected: object) -> None:
    """Raise AssertionError if a trial came to another result than another one.

    It is no `assert`, so that `python -O` checks, too.
    """
    if value != expected:
        raise AssertionError(f"{what}: {value!r} is not {expected!r}")


def check_close(what: str, values: Sequence[float], expected: Sequence[float]) -> None:
    """Raise AssertionError if log-probabilities differ by more than rounding."""
    is_cpu = mx.default_device() == mx.Device(mx.cpu)
    worst = max(abs(a - b) for a, b in zip(values, expected, strict=True))
    # Not the other way around: it may be no number.
    if not worst <= (CPU_TOLERANCE if is_cpu else GPU_TOLERANCE):
        raise AssertionError(f"{what} differ by {worst}")


def narrate(text: str) -> None:
    """Say on stderr what is being measured."""
    print(text, file=sys.stderr, flush=True)


def machine() -> str:
    """Return one line about the machine and the versions that were measured."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm"))
    versions = f"promptcache {promptcache.__version__}, {versions}"
    blas = " with OpenBLAS" if "openblas" in os.environ.get("LD_PRELOAD", "") else ""
    cores = f"{os.cpu_count()} cores"
    return f"{platform.platform()}, {cores}, {mx.default_device()}{blas}, {versions}"


def table(headers: Sequence[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    for row in (headers, ["---"] * len(headers), *rows):
        yield "| " + " | ".join(str(cell) for cell in row) + " |"


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    print("\n".join(table(headers, rows)), flush=True)


# Caches without a model


def random_cache(num_tokens: int, seed: int) -> list[KVCache]:
    """Return a cache of SmolLM2's shape that holds random keys and values."""
    mx.random.seed(seed)
    shape = (1, KV_HEADS, num_tokens, HEAD_DIM)
    cache = [KVCache() for _ in range(NUM_LAYERS)]
    for part in cache:
        part.update_and_fetch(mx.random.normal(shape), mx.random.normal(shape))
    mx.eval([part.state for part in cache])
    return cache


def fresh_cache() -> list[KVCache]:
    """Return an empty cache of SmolLM2's shape."""
    return [KVCache() for _ in range(NUM_LAYERS)]


def evaluate(cache: Sequence[Any]) -> None:
    """Compute all keys and values of a cache."""
    mx.eval([[part.keys, part.values] for part in cache if part.keys is not None])


def shrink(cache: Sequence[Any], num_tokens: int) -> None:
    """Leave a cache the rows that it has after reading these tokens and no others.

    mlx-lm saves all rows, also those that it has only made room for.
    """
    for part in cache:
        part.trim(part.offset - num_tokens)
        capacity = -(-num_tokens // part.step) * part.step
        part.keys = mx.contiguous(part.keys[..., :capacity, :])
        part.values = mx.contiguous(part.values[..., :capacity, :])
    evaluate(cache)


def checksum(cache: Sequence[Any], num_tokens: int) -> str:
    """Return a hash over the first rows of a cache, layer by layer."""
    hash_ = xxhash.xxh3_128()
    for part in cache if num_tokens else ():
        for array in (part.keys, part.values):
            hash_.update(memoryview(mx.contiguous(array[..., :num_tokens, :])))
    return hash_.hexdigest()


def save_cache(
    store: PrefixStore,
    fingerprint: Fingerprint,
    token_ids: Sequence[int],
    cache: Sequence[Any],
    *,
    cut_at: Collection[int] = (),
) -> None:
    """Save what a cache holds of these tokens, in segments that end at `cut_at`."""
    taken = snapshot.capture(cache, 0, len(token_ids))

    def encode(start: int, end: int) -> Any:
        return encode_rows(cache, [taken], token_ids, start, end)

    store.segments.save(token_ids, fingerprint, encode, cut_at=cut_at)


def blobs_of(store: Path) -> list[Path]:
    """Return the blobs of a store."""
    return sorted(store.glob("blobs/*/*.safetensors"))


def nbytes_of(files: Sequence[Path]) -> int:
    """Return the size of files."""
    return sum(file.stat().st_size for file in files)
