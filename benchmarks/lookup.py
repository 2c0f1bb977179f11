"""Lookup: how long it takes to find a prompt's longest prefix among many.

    python -m benchmarks.lookup --prefixes 100 10000 100000

The index is a real one, with rows as `save` makes them and no blobs. Of each prompt a
part is stored, so that the search goes through all of its blocks.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.harness import (
    Measurement,
    check_equal,
    in_unit,
    machine,
    options_parser,
    print_table,
    write_json,
)
from promptcache.segments.chain import BLOCK_SIZE, Chain
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import SegmentInfo
from promptcache.store.index import Index
from promptcache.store.lookup import longest_match

FINGERPRINT = Fingerprint("0" * 32, "model")
VOCABULARY = 50_000
BLOCKS_PER_PREFIX = 40
PROMPT_TOKENS = (1_000, 8_000, 32_000, 128_000)


def random_ids(random_: random.Random, num_tokens: int) -> list[int]:
    """Return random token ids."""
    return [random_.randrange(VOCABULARY) for _ in range(num_tokens)]


def add(index: Index, token_ids: list[int]) -> None:
    """Add a prefix of one segment."""
    chain = Chain(FINGERPRINT.digest, token_ids)
    info = SegmentInfo(
        key=chain.key_at(len(chain)),
        start_hash=FINGERPRINT.digest,
        fingerprint=FINGERPRINT,
        start=0,
        end=len(chain),
        is_prefix=True,
        created_at=0.0,
    )
    index.add_segment(info, chain, parent_key=None, nbytes=0)


def measure(
    index: Index, token_ids: list[int], *, stored: int, trials: int
) -> list[float]:
    """Return how long each lookup of a prompt took, from its token ids on."""
    seconds = []
    for _ in range(trials):
        started = time.perf_counter()
        chain = Chain(FINGERPRINT.digest, token_ids)
        match = longest_match(index, chain)
        seconds.append(time.perf_counter() - started)
        check_equal("cached tokens", match.cached_tokens, stored)
    return seconds


def fill(index: Index, random_: random.Random, num_prefixes: int) -> None:
    """Add prefixes of random tokens."""
    with index.database.writing():
        for _ in range(num_prefixes):
            add(index, random_ids(random_, BLOCKS_PER_PREFIX * BLOCK_SIZE))


def run(options: argparse.Namespace) -> list[Measurement]:
    """Fill an index step by step, and look prompts up at each step."""
    random_ = random.Random(1)
    prompts = [random_ids(random_, n) for n in PROMPT_TOKENS]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        index = Index(Path(folder) / "index.db")
        with index.database.writing():
            for prompt in prompts:
                add(index, prompt[: len(prompt) // 2])
        num_prefixes = len(prompts)
        for wanted in sorted(options.prefixes):
            fill(index, random_, wanted - num_prefixes)
            num_prefixes = max(num_prefixes, wanted)
            for prompt in prompts:
                seconds = measure(
                    index, prompt, stored=len(prompt) // 2, trials=options.trials
                )
                labels = {
                    "prefixes": num_prefixes,
                    "blocks, about": num_prefixes * BLOCKS_PER_PREFIX,
                    "prompt tokens": len(prompt),
                }
                found.append(Measurement(labels, "s", seconds))
        index.database.close()
    return found


def cells(measurement: Measurement) -> list[object]:
    """Return a line with the median and the 95th percentile."""
    seconds = measurement.values
    percentile = statistics.quantiles(seconds, n=20)[-1]
    return [
        *measurement.labels.values(),
        len(seconds),
        in_unit(statistics.median(seconds), "s"),
        in_unit(percentile, "s"),
        f"{in_unit(min(seconds), 's')} to {in_unit(max(seconds), 's')}",
    ]


def main() -> None:
    """Measure and print a table."""
    parser = options_parser(__doc__, trials=200)
    parser.add_argument("--prefixes", type=int, nargs="+", default=[100, 10_000])
    options = parser.parse_args()
    print(f"{machine()}\n")
    found = run(options)
    headers = [*found[0].labels, "trials", "p50", "p95", "min to max"]
    print_table(headers, [cells(measurement) for measurement in found])
    if options.json is not None:
        write_json("lookup", found, options.json)


if __name__ == "__main__":
    main()
