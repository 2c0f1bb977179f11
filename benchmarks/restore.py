"""Restore: bytes per second from a file in the page cache to a cache ready for use.

    python -m benchmarks.restore --trials 5

Random keys and values of SmolLM2's shape; every trial is a process of its own, with its
imports done and the file's pages in memory. What was restored is compared with what was
saved, byte for byte. promptcache's time has the search for the prefix in it.
"""

import argparse
import json
import mmap
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import xxhash
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from benchmarks import page_cache
from benchmarks.harness import (
    NBYTES_PER_TOKEN,
    WORKER,
    Measurement,
    blobs_of,
    check_equal,
    checksum,
    evaluate,
    fresh_cache,
    median_ratio,
    narrate,
    nbytes_of,
    options_parser,
    random_cache,
    report,
    run_worker,
    save_cache,
)
from promptcache.kvcache.kv_quantization import KVSettings
from promptcache.models.prefill_plan import PrefillPlan
from promptcache.segments.fingerprint import Fingerprint
from promptcache.store import PrefixStore
from promptcache.tiers.disk_tier import restore_prefix

# What Linux reads at most in one call.
MAX_READ = 0x7FFFF000
FINGERPRINT = Fingerprint("0" * 32, "model")
VOCABULARY = 49_152
# What a prompt goes on with after the prefix.
SUFFIX = [1, 2, 3, 4]
CHAIN_TOKENS, CHAIN_SEGMENTS = 2_000, 50
PART_TOKENS = 1_500
RAW = ("read, new memory", "read, used memory")


@dataclass(frozen=True, slots=True)
class Case:
    """What is restored in one way.

    Attributes:
        labels: What it is.
        way: How, as `work` calls it.
        num_tokens: How many tokens.
        files: Where they are.
        checksum: Of what is to come out.
        token_ids: The prompt, for a store.
        store: The folder of the store.
        fingerprint: Under which it is there.
    """

    labels: dict[str, str | int]
    way: str
    num_tokens: int
    files: Sequence[Path]
    checksum: str
    token_ids: Sequence[int] = ()
    store: Path = Path()
    fingerprint: Fingerprint = FINGERPRINT

    @property
    def name(self) -> str:
        """Return what ratios call it."""
        segments = self.labels["segments"]
        several = f", {segments} segments" if segments != "" else ""
        return f"{self.way}{several}"

    @property
    def nbytes(self) -> int:
        """Return how many bytes are wanted."""
        if self.way in RAW:
            return nbytes_of(self.files)
        return self.num_tokens * NBYTES_PER_TOKEN

    def request(self) -> dict[str, Any]:
        """Return what the worker is asked for."""
        return {
            "way": self.way,
            "files": [str(file) for file in self.files],
            "num_tokens": self.num_tokens,
            "store": str(self.store),
            "digest": self.fingerprint.digest,
            "token_ids": list(self.token_ids),
        }


def prepare(folder: Path, num_tokens: int) -> list[Case]:
    """Save random keys and values in every form, and return the ways to get them."""
    cache = random_cache(num_tokens, seed=num_tokens)
    saved = checksum(cache, num_tokens)
    plain, own = folder / "plain.safetensors", folder / "mlx-lm.safetensors"
    folder.mkdir()
    arrays = {}
    for i, part in enumerate(cache):
        arrays[f"{i}.keys"] = part.keys[..., :num_tokens, :]
        arrays[f"{i}.values"] = part.values[..., :num_tokens, :]
    mx.save_safetensors(str(plain), arrays)
    save_prompt_cache(str(own), cache)
    stored = in_store(folder / "store", cache, num_tokens, ())
    return [
        *raw_cases(stored),
        Case(labels(num_tokens, "mx.load"), "mx.load", num_tokens, [plain], saved),
        Case(labels(num_tokens, "mlx-lm"), "mlx-lm", num_tokens, [own], saved),
        stored,
    ]


def labels(num_tokens: int, way: str, segments: int | str = "") -> dict[str, str | int]:
    """Return the cells that name a case."""
    return {"tokens": num_tokens, "way": way, "segments": segments}


def in_store(
    folder: Path, cache: Sequence[Any], num_tokens: int, cut_at: Sequence[int]
) -> Case:
    """Save a cache in a store, in segments that end at `cut_at`."""
    token_ids = random_ids(num_tokens)
    with PrefixStore(folder) as store:
        save_cache(store, FINGERPRINT, token_ids, cache, cut_at=cut_at)
    files = blobs_of(folder)
    return Case(
        labels(num_tokens, "promptcache", len(files)),
        "promptcache",
        num_tokens,
        files,
        checksum(cache, num_tokens),
        [*token_ids, *SUFFIX],
        folder,
    )


def random_ids(num_tokens: int) -> list[int]:
    """Return random token ids."""
    random_ = random.Random(num_tokens)
    return [random_.randrange(VOCABULARY) for _ in range(num_tokens)]


def raw_cases(stored: Case) -> Iterator[Case]:
    """Return the ways to read a store's blobs into plain memory."""
    hash_ = xxhash.xxh3_128()
    for file in stored.files:
        hash_.update(file.read_bytes())
    for way in RAW:
        yield replace(
            stored,
            labels=stored.labels | {"way": way},
            way=way,
            checksum=hash_.hexdigest(),
        )


def prepare_chain(folder: Path) -> list[Case]:
    """Save one prefix in one segment and in many, and return the ways to get it."""
    folder.mkdir()
    cache = random_cache(CHAIN_TOKENS, seed=0)
    step = CHAIN_TOKENS // CHAIN_SEGMENTS
    one = in_store(folder / "one", cache, CHAIN_TOKENS, [CHAIN_TOKENS])
    many = range(step, CHAIN_TOKENS, step)
    chain = in_store(folder / "chain", cache, CHAIN_TOKENS, many)
    part = replace(
        one,
        labels=labels(PART_TOKENS, f"promptcache, of {CHAIN_TOKENS}", 1),
        num_tokens=PART_TOKENS,
        checksum=checksum(cache, PART_TOKENS),
        token_ids=[*one.token_ids[:PART_TOKENS], *SUFFIX],
    )
    return [one, chain, part]


def measure(cases: Sequence[Case], trials: int) -> list[list[float]]:
    """Return the bytes per second of each case, measured in turn."""
    values: list[list[float]] = [[] for _ in cases]
    for trial in range(trials):
        # The first of a round changes, so that none is always after the same other.
        for i in sorted(range(len(cases)), key=lambda i: (i + trial) % len(cases)):
            values[i].append(bytes_per_second(cases[i]))
    return values


def bytes_per_second(case: Case) -> float:
    """Run one trial. Raises AssertionError if what came out is not what was saved."""
    answer = run_worker("benchmarks.restore", case.request())
    if case.way not in RAW:
        check_equal(f"tokens by {case.way}", answer["num_tokens"], case.num_tokens)
    check_equal(f"rows by {case.way}", answer["checksum"], case.checksum)
    if answer["resident"] is not None:
        check_equal("share of the file in memory", answer["resident"], 1.0)
    seconds: float = answer["seconds"]
    return case.nbytes / seconds


def measurements(
    cases: Sequence[Case], trials: int, against: Sequence[int]
) -> list[Measurement]:
    """Measure cases, and compare the stored ones with those of some places."""
    values = measure(cases, trials)
    return [
        Measurement(
            case.labels,
            "B/s",
            own,
            {
                cases[other].name: median_ratio(own, values[other])
                for other in against
                if case.store != Path() and case.way not in RAW and cases[other] != case
            },
        )
        for case, own in zip(cases, values, strict=True)
    ]


def run(options: argparse.Namespace) -> list[Measurement]:
    """Measure all lengths, then chains."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for num_tokens in options.lengths:
            narrate(f"restore: {num_tokens} tokens")
            cases = prepare(Path(folder, str(num_tokens)), num_tokens)
            found += measurements(cases, options.trials, against=[2, 3])
        narrate(f"restore: a chain of {CHAIN_SEGMENTS} segments")
        cases = prepare_chain(Path(folder, "chains"))
        found += measurements(cases, options.trials, against=[0])
    return found


def main() -> None:
    """Measure and print a table."""
    parser = options_parser(__doc__, trials=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1_000, 4_000])
    options = parser.parse_args()
    report("restore", run(options), file=options.json)


# One trial, in a process of its own


class Restored(NamedTuple):
    """How long it took, what came of it, and a hash of that."""

    seconds: float
    num_tokens: int
    checksum: str


def read_raw(files: Sequence[Path], *, touched: bool) -> Restored:
    """Read files into memory whose pages are there already, or are not."""
    nbytes = nbytes_of(files)
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
    cache = fresh_cache()
    for i, part in enumerate(cache):
        part.keys, part.values = arrays[f"{i}.keys"], arrays[f"{i}.values"]
    return Restored(seconds, num_tokens, checksum(cache, num_tokens))


def load_mlx_lm(file: Path) -> Restored:
    """Load mlx-lm's own file."""
    started = time.perf_counter()
    cache = load_prompt_cache(str(file))
    evaluate(cache)
    seconds = time.perf_counter() - started
    num_tokens = cache[0].offset
    return Restored(seconds, num_tokens, checksum(cache, num_tokens))


def resume_promptcache(
    folder: Path, fingerprint: Fingerprint, token_ids: Sequence[int]
) -> Restored:
    """Resume from a store, beginning with the search for what it has."""
    with PrefixStore(folder) as store:
        cache = fresh_cache()
        started = time.perf_counter()
        resumed = restore_prefix(
            store,
            fingerprint,
            cache,
            token_ids,
            plan=PrefillPlan(),
            kv=KVSettings(),
        )
        evaluate(cache)
        seconds = time.perf_counter() - started
    num_tokens = resumed.match.cached_tokens
    return Restored(seconds, num_tokens, checksum(cache, num_tokens))


def work() -> None:
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
    work() if WORKER in sys.argv else main()
