"""Restore: bytes per second from a file in the page cache to a cache ready for use.

    python -m benchmarks.restore --trials 5

Random keys and values of SmolLM2's shape; every trial is a process of its own, with its
imports done and the file's pages in memory. What was restored is compared with what was
saved, byte for byte. promptcache's time has the search for the prefix in it.
"""

import argparse
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import xxhash
from mlx_lm.models.cache import save_prompt_cache

from benchmarks import caches
from benchmarks.harness import (
    Measurement,
    check_equal,
    median_ratio,
    narrate,
    options_parser,
    report,
    run_worker,
)
from promptcache.segments.fingerprint import Fingerprint
from promptcache.store import PrefixStore

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
        way: How, as `restore_worker` calls it.
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
            return caches.nbytes_of(self.files)
        return self.num_tokens * caches.NBYTES_PER_TOKEN

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
    cache = caches.random_cache(num_tokens, seed=num_tokens)
    checksum = caches.checksum(cache, num_tokens)
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
        Case(labels(num_tokens, "mx.load"), "mx.load", num_tokens, [plain], checksum),
        Case(labels(num_tokens, "mlx-lm"), "mlx-lm", num_tokens, [own], checksum),
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
        caches.save_cache(store, FINGERPRINT, token_ids, cache, cut_at=cut_at)
    files = caches.blobs_of(folder)
    return Case(
        labels(num_tokens, "promptcache", len(files)),
        "promptcache",
        num_tokens,
        files,
        caches.checksum(cache, num_tokens),
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
    cache = caches.random_cache(CHAIN_TOKENS, seed=0)
    step = CHAIN_TOKENS // CHAIN_SEGMENTS
    one = in_store(folder / "one", cache, CHAIN_TOKENS, [CHAIN_TOKENS])
    many = range(step, CHAIN_TOKENS, step)
    chain = in_store(folder / "chain", cache, CHAIN_TOKENS, many)
    part = replace(
        one,
        labels=labels(PART_TOKENS, f"promptcache, of {CHAIN_TOKENS}", 1),
        num_tokens=PART_TOKENS,
        checksum=caches.checksum(cache, PART_TOKENS),
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
    answer = run_worker("benchmarks.restore_worker", case.request())
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


if __name__ == "__main__":
    main()
