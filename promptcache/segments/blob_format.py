"""The format of blobs: a header with a checksum of its own, then tensors.

The header is checked before anything is allocated by it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import xxhash
from safetensors import SafetensorError, safe_open

from promptcache.errors import DamagedBlobError, StoreFormatError
from promptcache.files import open_file
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import (
    Priority,
    ResumeRules,
    SegmentInfo,
    Tensor,
    TensorSpec,
)
from promptcache.units import MAX_SECONDS


@dataclass(frozen=True, slots=True)
class BlobHeader:
    """The verified header of a blob.

    Attributes:
        layout: The layers' layout, which only the codec understands.
        tensors: In the order of their bytes.
        data_checksum: See `combined_checksum`.
        data_start: Where the data begins in the file.
        versions: Of mlx and mlx-lm, which computed it.
    """

    info: SegmentInfo
    layout: str
    tensors: tuple[TensorSpec, ...]
    data_checksum: str
    data_start: int
    versions: Mapping[str, str] = field(default_factory=dict)


FORMAT_VERSION = 4
# More is not a number of tokens, nor one that SQLite can store.
MAX_TOKENS = 2**40
DIGEST_NBYTES = 16


def encode_header(
    info: SegmentInfo,
    layout: str,
    tensors: list[Tensor],
    *,
    whole: BlobHeader | None = None,
) -> bytes:
    """Return the header of a blob of these tensors.

    `whole` is the header of the blob that this one is the head of. The new header is as
    long, so that exactly the bytes of the tokens that go are freed.
    """
    specs = [TensorSpec(t.name, t.dtype, t.shape) for t in tensors]
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "key": info.key,
        "start_hash": info.start_hash,
        "fingerprint": info.fingerprint.digest,
        "fingerprint_parts": json.dumps(dict(info.fingerprint.parts), sort_keys=True),
        "model": info.fingerprint.model,
        "source": info.fingerprint.source or "",
        "start": str(info.start),
        "end": str(info.end),
        "is_prefix": str(int(info.is_prefix)),
        "created_at": repr(info.created_at),
        "resumption": json.dumps(info.resumption._asdict()),
        "priority": str(int(info.priority)),
        "layout": layout,
        **(_versions() if whole is None else whole.versions),
        "data_checksum": combined_checksum(digest([tensor.data]) for tensor in tensors),
    }
    metadata["checksum"] = _header_checksum(metadata, specs)
    return _safetensors_header(metadata, specs, whole.data_start if whole else 0)


def _versions() -> dict[str, str]:
    # Imported here because it takes 20 ms, which `ls` does not need.
    from importlib.metadata import version

    return {"mlx_version": version("mlx"), "mlx_lm_version": version("mlx-lm")}


def _safetensors_header(
    metadata: dict[str, str], specs: list[TensorSpec], min_nbytes: int = 0
) -> bytes:
    """Return the length and the JSON, as the safetensors format defines them."""
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": spec.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * max(-len(text) % 8, min_nbytes - 8 - len(text))
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path, key: str) -> BlobHeader:
    """Return the header of a blob, which must have this key.

    Raises:
        DamagedBlobError: It is not what was written.
        StoreFormatError: Another version of promptcache wrote it.
        OSError: It cannot be read.
    """
    try:
        return _decoded(path, key)
    except (
        SafetensorError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise DamagedBlobError(f"header cannot be read ({error})") from None


def _decoded(path: Path, key: str) -> BlobHeader:
    with open_file(path) as file:
        data_start = 8 + int.from_bytes(file.read(8), "little")
    with safe_open(path, framework="numpy") as file:
        metadata = dict(file.metadata() or {})
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
        specs = [
            TensorSpec(name, part.get_dtype(), tuple(part.get_shape()))
            for name, part in slices.items()
        ]
    if metadata.pop("checksum") != _header_checksum(metadata, specs):
        raise DamagedBlobError("checksum of the header does not match")
    _check_format(metadata)
    if metadata["key"] != key:
        raise DamagedBlobError(f"blob holds another segment, {metadata['key']}")
    return BlobHeader(
        info=_decode_info(metadata),
        layout=metadata["layout"],
        tensors=tuple(specs),
        data_checksum=metadata["data_checksum"],
        data_start=data_start,
        versions={name: metadata[name] for name in ("mlx_version", "mlx_lm_version")},
    )


def _check_format(metadata: dict[str, str]) -> None:
    written = int(metadata["format_version"])
    if written > FORMAT_VERSION:
        raise StoreFormatError(
            f"blob has format {written} and this promptcache reads up to "
            f"{FORMAT_VERSION}, upgrade promptcache"
        )
    if written < FORMAT_VERSION:
        raise StoreFormatError(
            f"blob has the older format {written}, `promptcache prune` removes it"
        )


def _decode_info(metadata: dict[str, str]) -> SegmentInfo:
    """Return the segment of a blob, if all values are of the expected kinds.

    The checksum reveals damage, not what others wrote on purpose.
    """
    start, end = int(metadata["start"]), int(metadata["end"])
    digests = [metadata["start_hash"], metadata["fingerprint"]]
    parts, flags = (
        json.loads(metadata[name]) for name in ("fingerprint_parts", "resumption")
    )
    created_at = float(metadata["created_at"])
    _expect(0 <= start <= end <= MAX_TOKENS, f"not a range of tokens: [{start}, {end})")
    _expect(all(len(bytes.fromhex(d)) == DIGEST_NBYTES for d in digests), "not a hash")
    _expect(all(isinstance(p, str) for p in parts.values()), "part is not a text")
    _expect(all(isinstance(f, bool) for f in flags.values()), "not resume rules")
    _expect(0 <= created_at < MAX_SECONDS, "not a time")
    return SegmentInfo(
        key=metadata["key"],
        start_hash=metadata["start_hash"],
        fingerprint=Fingerprint(
            digest=metadata["fingerprint"],
            model=metadata["model"],
            source=metadata["source"] or None,
            parts=parts,
        ),
        start=start,
        end=end,
        is_prefix=metadata["is_prefix"] == "1",
        created_at=created_at,
        resumption=ResumeRules(**flags),
        priority=Priority(int(metadata["priority"])),
    )


def _expect(is_right: bool, message: str) -> None:
    if not is_right:
        raise ValueError(message)


def _header_checksum(metadata: dict[str, str], specs: list[TensorSpec]) -> str:
    canonical = json.dumps(
        [metadata, sorted(specs)], sort_keys=True, separators=(",", ":")
    )
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def digest(buffers: Iterable[memoryview | bytes]) -> bytes:
    """Return the XXH3-128 of a tensor whose bytes are in some buffers."""
    hash_ = xxhash.xxh3_128()
    for buffer in buffers:
        hash_.update(buffer)
    return hash_.digest()


def combined_checksum(digests: Iterable[bytes]) -> str:
    """Return the checksum of a blob's data, in hex: over its tensors' digests."""
    return xxhash.xxh3_128_hexdigest(b"".join(digests))
