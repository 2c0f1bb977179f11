"""One trial of `benchmarks.restore`: read rows, and say how long it took."""

import json
import mmap
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import xxhash
from mlx_lm.models.cache import load_prompt_cache

from benchmarks import caches, page_cache
from promptcache.kvcache.kv_quantization import KVSettings
from promptcache.models.prefill_plan import PrefillPlan
from promptcache.segments.fingerprint import Fingerprint
from promptcache.store import PrefixStore
from promptcache.tiers.disk_tier import restore_prefix

# What Linux reads at most in one call.
MAX_READ = 0x7FFFF000


class Restored(NamedTuple):
    """How long it took, what came of it, and a hash of that."""

    seconds: float
    num_tokens: int
    checksum: str


def read_raw(files: Sequence[Path], *, touched: bool) -> Restored:
    """Read files into memory whose pages are there already, or are not."""
    nbytes = caches.nbytes_of(files)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = memoryview(mmap.mmap(-1, nbytes, flags=flags))
    if touched:
        memory[:] = b"\1" * nbytes
    started = time.perf_counter()
    filled = 0
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while num_read := file.readinto(memory[filled : filled + MAX_READ]):
                filled += num_read
    seconds = time.perf_counter() - started
    return Restored(seconds, 0, xxhash.xxh3_128_hexdigest(memory[:filled]))


def load_arrays(file: Path, num_tokens: int) -> Restored:
    """Load one safetensors file with mlx, which returns its arrays by name."""
    started = time.perf_counter()
    arrays = mx.load(str(file))
    mx.eval(arrays)
    seconds = time.perf_counter() - started
    cache = caches.fresh_cache()
    for i, part in enumerate(cache):
        part.keys, part.values = arrays[f"{i}.keys"], arrays[f"{i}.values"]
    return Restored(seconds, num_tokens, caches.checksum(cache, num_tokens))


def load_mlx_lm(file: Path) -> Restored:
    """Load mlx-lm's own file."""
    started = time.perf_counter()
    cache = load_prompt_cache(str(file))
    caches.evaluate(cache)
    seconds = time.perf_counter() - started
    num_tokens = cache[0].offset
    return Restored(seconds, num_tokens, caches.checksum(cache, num_tokens))


def resume_promptcache(
    folder: Path, fingerprint: Fingerprint, token_ids: Sequence[int]
) -> Restored:
    """Resume from a store, beginning with the search for what it has."""
    with PrefixStore(folder) as store:
        cache = caches.fresh_cache()
        started = time.perf_counter()
        resumed = restore_prefix(
            store,
            fingerprint,
            cache,
            token_ids,
            plan=PrefillPlan(),
            kv=KVSettings(),
            generating=True,
        )
        caches.evaluate(cache)
        seconds = time.perf_counter() - started
    num_tokens = resumed.match.cached_tokens
    return Restored(seconds, num_tokens, caches.checksum(cache, num_tokens))


def main() -> None:
    """Read a request from stdin, do it and print JSON."""
    request: dict[str, Any] = json.load(sys.stdin)
    files = [Path(file) for file in request["files"]]
    mx.eval(mx.zeros(1) + 1)
    page_cache.warm(files)
    resident = page_cache.resident_share(files)
    ways: dict[str, Callable[[], Restored]] = {
        "read, new memory": lambda: read_raw(files, touched=False),
        "read, used memory": lambda: read_raw(files, touched=True),
        "mx.load": lambda: load_arrays(files[0], request["num_tokens"]),
        "mlx-lm": lambda: load_mlx_lm(files[0]),
        "promptcache": lambda: resume_promptcache(
            Path(request["store"]),
            Fingerprint(request["digest"], "model"),
            request["token_ids"],
        ),
    }
    restored = ways[request["way"]]()
    print(json.dumps({**restored._asdict(), "resident": resident}))


if __name__ == "__main__":
    main()
