"""Segments of plain bytes, so that a store can be tested without a model.

Every value of a segment says which token at which position it belongs to.
"""

import hashlib
import math
import os
import struct
from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import xxhash

from promptcache.errors import DamagedBlobError
from promptcache.segments.blob_format import BlobHeader
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import (
    AT_ANY_TOKEN,
    EncodedSegment,
    Match,
    Priority,
    ResumeRules,
    SegmentInfo,
    Tensor,
)
from promptcache.store import Encode, PrefixStore
from promptcache.store.blobs.folder import BlobFolder
from tests.helpers.blobs import write_blob

NEEDS_CHECKPOINT = ResumeRules(needs_checkpoint=True)
# One for all segments, or a function that tells it from start and end.
ResumptionOf = ResumeRules | Callable[[int, int], ResumeRules]


def fingerprint(model: str = "tiny") -> Fingerprint:
    """Return a fingerprint that only depends on a model's name."""
    digest = xxhash.xxh3_128_hexdigest(model.encode())
    return Fingerprint(digest, model, f"some/{model}", {"weights": model})


TINY = fingerprint()


def tokens(num_tokens: int, *, first: int = 0) -> list[int]:
    """Return token ids that count up."""
    return list(range(first, first + num_tokens))


def values(token_ids: Sequence[int], start: int, end: int) -> "array[float]":
    """Return the values that stand for the KV rows `[start, end)`."""
    return array("f", (1000 * token_ids[i] + i for i in range(start, end)))


def encoder(
    token_ids: Sequence[int],
    *,
    width: int = 1,
    resumption: ResumptionOf = AT_ANY_TOKEN,
) -> Encode:
    """Return an `encode` for these token ids; each row has `width` floats."""

    def encode(start: int, end: int) -> EncodedSegment:
        ids = struct.pack(f"<{end - start}I", *token_ids[start:end])
        rows = array("f")
        for value in values(token_ids, start, end):
            rows.extend([value] * width)
        tensors = [
            Tensor("token_ids", "U32", (end - start,), memoryview(ids)),
            Tensor("rows", "F32", (end - start, width), memoryview(rows).cast("B")),
        ]
        allowed = (
            resumption
            if isinstance(resumption, ResumeRules)
            else resumption(start, end)
        )
        return EncodedSegment('[{"kind":"delta"}]', tensors, allowed)

    return encode


def state(token_ids: Sequence[int]) -> bytes:
    """Return the bytes that stand for the state after these token ids."""
    packed = struct.pack(f"<{len(token_ids)}I", *token_ids)
    return xxhash.xxh3_128_digest(packed)


def checkpoint(token_ids: Sequence[int], *, width: int = 1) -> EncodedSegment:
    """Return the checkpoint after these token ids, of `width` times 16 bytes."""
    data = memoryview(state(token_ids) * width)
    tensors = [
        Tensor("token_ids", "U32", (0,), memoryview(b"")),
        Tensor("state", "U32", (4 * width,), data),
    ]
    return EncodedSegment('[{"kind":"checkpoint"}]', tensors, NEEDS_CHECKPOINT)


def save(
    store: PrefixStore,
    token_ids: Sequence[int],
    model: Fingerprint = TINY,
    *,
    width: int = 1,
    is_prefix: bool = True,
    resumption: ResumptionOf = AT_ANY_TOKEN,
    cut_at: Collection[int] = (),
    state_nbytes: int = 0,
    next_turn: int | None = None,
) -> str:
    """Save a prefix with fake values and return its key."""
    encode = encoder(token_ids, width=width, resumption=resumption)
    return store.segments.save(
        token_ids,
        model,
        encode,
        is_prefix=is_prefix,
        cut_at=cut_at,
        state_nbytes=state_nbytes,
        next_turn=next_turn,
    )


def save_checkpoint(
    store: PrefixStore,
    token_ids: Sequence[int],
    model: Fingerprint = TINY,
    *,
    width: int = 1,
    is_prefix: bool = False,
    priority: Priority = Priority.STEP,
) -> str:
    """Save a fake checkpoint at the end of a prefix whose rows are stored."""
    segment = checkpoint(token_ids, width=width)
    return store.segments.save_checkpoint(
        token_ids, model, segment, is_prefix=is_prefix, priority=priority
    )


def save_with_checkpoints(
    store: PrefixStore,
    token_ids: Sequence[int],
    positions: Iterable[int] = (),
    model: Fingerprint = TINY,
    *,
    width: int = 1,
) -> str:
    """Save a prefix that only its checkpoints can be resumed at; return its key.

    The positions before its end are steps on the way.
    """
    save(
        store,
        token_ids,
        model,
        width=width,
        is_prefix=False,
        resumption=NEEDS_CHECKPOINT,
    )
    for position in sorted(positions):
        save_checkpoint(store, token_ids[:position], model, width=width)
    return save_checkpoint(store, token_ids, model, width=width, is_prefix=True)


def cached_tokens(
    store: PrefixStore, token_ids: Sequence[int], model: Fingerprint = TINY
) -> int:
    """Return the length of the longest cached prefix of token ids."""
    return store.lookup(token_ids, model).cached_tokens


def publish(folder: BlobFolder, token_ids: Sequence[int]) -> str:
    """Publish the blob of one root segment and return its key."""
    key = expected_key(TINY.digest, token_ids)
    info = SegmentInfo(key, TINY.digest, TINY, 0, len(token_ids), True, 1234.5)
    write_blob(folder, info, encoder(token_ids)(0, len(token_ids)))
    return key


def expected_digests(digest: str, token_ids: Sequence[int]) -> list[bytes]:
    """Return the chain hash at each block boundary, as the format defines it."""
    digests = [bytes.fromhex(digest)]
    for start in range(0, len(token_ids) - 31, 32):
        block = struct.pack("<32I", *token_ids[start : start + 32])
        digests.append(xxhash.xxh3_128_digest(digests[-1] + block))
    return digests


def expected_key(digest: str, token_ids: Sequence[int], tag: str = "") -> str:
    """Return the key of a prefix, as the format defines it.

    With a tag, that of a checkpoint or a tail, which is good for one prompt only.
    """
    last = expected_digests(digest, token_ids)[-1]
    rest = token_ids[len(token_ids) - len(token_ids) % 32 :]
    if rest:
        last = xxhash.xxh3_128_digest(last + struct.pack(f"<{len(rest)}I", *rest))
    if tag:
        last = xxhash.xxh3_128_digest(last + tag.encode())
    return last.hex()


def shared_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many leading token ids two sequences share, one by one."""
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length


def longest_shared(token_ids: Sequence[int], stored: Iterable[Sequence[int]]) -> int:
    """Return the longest prefix that token ids share with any of the stored."""
    return max((shared_length(token_ids, other) for other in stored), default=0)


def check_match(store: PrefixStore, match: Match, token_ids: Sequence[int]) -> None:
    """Assert that a match's blobs hold the values of these very token ids."""
    position = 0
    for i, part in enumerate(match.slices):
        assert part.start == position <= part.stop <= part.end
        path, header = store.segments.open_blob(part)
        if part.start == part.end:
            assert i == len(match.slices) - 1 > 0, "a checkpoint comes last, after rows"
            wanted = state(token_ids[: part.end])
            assert tensor_bytes(path, header, "state")[: len(wanted)] == wanted
        else:
            assert part.start < part.stop
            width = next(s.shape[1] for s in header.tensors if s.name == "rows")
            rows = array("f", tensor_bytes(path, header, "rows"))
            taken = rows[: (part.stop - part.start) * width : width]
            assert taken == values(token_ids, part.start, part.stop)
        position = part.stop
    assert position == match.cached_tokens


def tensor_bytes(path: Path, header: BlobHeader, name: str) -> bytes:
    """Return the bytes of a tensor whose values have four bytes each."""
    first = header.data_start
    for spec in header.tensors:
        nbytes = 4 * math.prod(spec.shape)
        if spec.name == name:
            return path.read_bytes()[first : first + nbytes]
        first += nbytes
    # As the codec says of a blob whose header was forged.
    raise DamagedBlobError(f"blob has no {name}")


def blob_nbytes(store: PrefixStore) -> int:
    """Return the size of all blobs on disk."""
    return sum(path.stat().st_size for path in blob_paths(store))


def blob_paths(store: PrefixStore) -> list[Path]:
    """Return the paths of all blobs on disk."""
    return sorted(store.path.glob("blobs/*/*.safetensors"))


def blob_path(store: PrefixStore, key: str) -> Path:
    """Return where the blob of a key has to be."""
    return store.path / "blobs" / key[:2] / f"{key}.safetensors"


def files_nbytes(folder: Path) -> int:
    """Return the size of all files below a folder."""
    return sum(p.lstat().st_size for p in folder.rglob("*") if not p.is_dir())


def tree_hash(folder: Path) -> str:
    """Return a hash of the names and contents of all files below a folder.

    SQLite's `-shm` holds the locks of readers, and a WAL comes with opening.
    """
    found = hashlib.sha256()
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if not (name.endswith("-shm") or (name.endswith("-wal") and empty(path))):
                found.update(str(path.relative_to(folder)).encode())
                found.update(path.read_bytes())
    return found.hexdigest()


def empty(path: Path) -> bool:
    """Return whether a file has no content."""
    return path.stat().st_size == 0


def flip(path: Path, position: int = -1) -> None:
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)
