"""Splitting: what it takes to cut a segment where another prompt hangs on it.

It is compared, turn by turn, with reading a file of the same bytes and writing what is
kept of it, durably. `python -m benchmarks.split`
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.harness import in_unit, machine, print_table
from promptcache import PrefixStore
from promptcache.files import fsync_file
from promptcache.segments.chain import pack
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import EncodedSegment, Tensor
from promptcache.store import Encode

FINGERPRINT = Fingerprint("0" * 32, "SmolLM2")
# SmolLM2-135M's keys and values in float32: 46 KB a token.
NUM_LAYERS, NUM_HEADS, HEAD_DIM = 30, 3, 64
NUM_SHARED = (12, 500, 1000, 1900)


def main() -> None:
    """Print how long splits take, and reading and writing the same bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2000, help="in the segment")
    parser.add_argument("--trials", type=int, default=7)
    parser.add_argument("--folder", help="on the disk in question")
    options = parser.parse_args()
    print(machine(), flush=True)
    rows = []
    for num_shared in NUM_SHARED:
        pairs = [
            measured(options.tokens, num_shared, options.folder)
            for _ in range(options.trials)
        ]
        split, copied = (
            statistics.median(column) for column in zip(*pairs, strict=True)
        )
        row = [in_unit(split, "s"), in_unit(copied, "s"), f"{split / copied:.2f} ×"]
        rows.append([num_shared, *row])
    print(f"a segment of {options.tokens} tokens, {options.trials} trials, medians")
    print_table(["tokens that stay", "split", "read and written", "ratio"], rows)


def measured(
    num_tokens: int, num_shared: int, place: str | None
) -> tuple[float, float]:
    """Return the seconds of one split, and of reading and writing the same bytes."""
    with (
        tempfile.TemporaryDirectory(dir=place) as folder,
        PrefixStore(Path(folder) / "store") as store,
    ):
        secret = list(range(num_tokens))
        key = store.segments.save(secret, FINGERPRINT, encoded(secret))
        other = [*secret[:num_shared], 7, 7]
        store.segments.save(other, FINGERPRINT, encoded(other))
        path = next(store.path.glob(f"blobs/*/{key}.safetensors"))
        copied = copy(path, path.stat().st_size * num_shared // num_tokens)
        started = time.perf_counter()
        report = store.remove(key)
        seconds = time.perf_counter() - started
        assert report.freed_nbytes
        return seconds, copied


def encoded(token_ids: list[int]) -> Encode:
    """Return what encodes a range of tokens, as the codec lays them out."""

    def encode(start: int, end: int) -> EncodedSegment:
        shape = (1, NUM_HEADS, end - start, HEAD_DIM)
        nbytes = 4 * NUM_HEADS * (end - start) * HEAD_DIM
        rows = memoryview(os.urandom(nbytes))
        tensors = [
            Tensor(f"layers.{layer}.{name}", "F32", shape, rows)
            for layer in range(NUM_LAYERS)
            for name in ("keys", "values")
        ]
        ids = memoryview(pack(token_ids[start:end]))
        return EncodedSegment(
            "{}", [*tensors, Tensor("token_ids", "U32", (end - start,), ids)]
        )

    return encode


def copy(path: Path, nbytes: int) -> float:
    """Return the seconds to read a file, and to write some of its bytes durably."""
    started = time.perf_counter()
    data = path.read_bytes()
    with open(path.with_suffix(".copy"), "wb") as file:
        file.write(memoryview(data)[:nbytes])
        file.flush()
        fsync_file(file.fileno())
    seconds = time.perf_counter() - started
    path.with_suffix(".copy").unlink()
    return seconds


if __name__ == "__main__":
    main()
