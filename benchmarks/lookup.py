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

from benchmarks.harness import machine, print_table
from promptcache.chain import BLOCK_SIZE, Chain
from promptcache.index import Index
from promptcache.matching import longest_match
from promptcache.types import Fingerprint, SegmentInfo

FINGERPRINT = Fingerprint("0" * 32, "model")
VOCABULARY = 50_000
BLOCKS_PER_PREFIX = 40
PROMPT_TOKENS = (1_000, 8_000, 32_000, 128_000)
NUM_TRIALS = 200


def random_ids(random_: random.Random, num_tokens: int) -> list[int]:
    """Return random token ids."""
    return [random_.randrange(VOCABULARY) for _ in range(num_tokens)]


def add(index: Index, token_ids: list[int]) -> None:
    """Add a prefix of one segment."""
    chain = Chain(FINGERPRINT.digest, token_ids)
    info = SegmentInfo(
        key=chain.key_at(len(chain)),
        parent_key=None,
        fingerprint=FINGERPRINT,
        start=0,
        end=len(chain),
        is_prefix=True,
        created_at=0.0,
    )
    index.add_segment(info, chain, nbytes=0)


def measure(index: Index, token_ids: list[int], stored: int) -> list[float]:
    """Return how long each lookup of a prompt took, from its token ids on."""
    seconds = []
    for _ in range(NUM_TRIALS):
        started = time.perf_counter()
        chain = Chain(FINGERPRINT.digest, token_ids)
        match = longest_match(index, chain, generating=True)
        seconds.append(time.perf_counter() - started)
        assert match.cached_tokens == stored
    return seconds


def main() -> None:
    """Fill an index step by step, and look prompts up at each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefixes", type=int, nargs="+", default=[100, 10_000])
    options = parser.parse_args()
    random_ = random.Random(1)
    prompts = [random_ids(random_, n) for n in PROMPT_TOKENS]
    print(f"{machine()}\n")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        index = Index(Path(folder) / "index.db")
        with index.writing():
            for prompt in prompts:
                add(index, prompt[: len(prompt) // 2])
        num_prefixes = len(prompts)
        for wanted in sorted(options.prefixes):
            with index.writing():
                for _ in range(wanted - num_prefixes):
                    add(index, random_ids(random_, BLOCKS_PER_PREFIX * BLOCK_SIZE))
            num_prefixes = max(num_prefixes, wanted)
            for prompt in prompts:
                seconds = measure(index, prompt, len(prompt) // 2)
                rows.append(
                    [
                        num_prefixes,
                        num_prefixes * BLOCKS_PER_PREFIX,
                        len(prompt),
                        f"{statistics.median(seconds) * 1e3:.2f} ms",
                        f"{statistics.quantiles(seconds, n=20)[-1] * 1e3:.2f} ms",
                    ]
                )
        index.close()
    print_table(["prefixes", "blocks, about", "prompt tokens", "p50", "p95"], rows)


if __name__ == "__main__":
    main()
