"""Blob headers: what a blob says of itself, with a checksum of its own.

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
        info: The segment.
        layout: The layers' layout, which only the codec understands.
        tensors: The tensors in the order of their bytes.
        data_checksum: Of the data; see `combined_checksum`.
        data_start: Where the data begins in the file.
        versions: Of what computed it.
    """

    info: SegmentInfo
    layout: str
    tensors: tuple[TensorSpec, ...]
    data_checksum: str
    data_start: int
    versions: Mapping[str, str] = field(default_factory=dict)


FORMAT_VERSION = 4
# More is no number of tokens, nor one that SQLite can keep.
MAX_TOKENS = 2**40
DIGEST_NBYTES = 16


def encode_header(
    info: SegmentInfo,
    layout: str,
    tensors: list[Tensor],
    *,
    whole: BlobHeader | None = None,
) -> bytes:
    """Return how a blob of these tensors begins.

    `whole` is the header of the blob that it is the head of: it is as long, so that
    what is freed is the bytes of the tokens that go.
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
    # Imported here because it takes 20 ms, which `ls` can do without.
    from importlib.metadata import version

    return {"mlx_version": version("mlx"), "mlx_lm_version": version("mlx-lm")}


def _safetensors_header(
    metadata: dict[str, str], specs: list[TensorSpec], least_nbytes: int = 0
) -> bytes:
    """Return the length and the JSON, as the safetensors format asks for them."""
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
    text += b" " * max(-len(text) % 8, least_nbytes - 8 - len(text))
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path, key: str) -> BlobHeader:
    """Return the header of a blob that must be of this key.

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
    start, end = int(metadata["start"]), int(metadata["end"])
    if not 0 <= start <= end <= MAX_TOKENS:
        raise ValueError(f"no range of tokens: [{start}, {end})")
    return SegmentInfo(
        key=metadata["key"],
        start_hash=_digest(metadata["start_hash"]),
        fingerprint=Fingerprint(
            digest=_digest(metadata["fingerprint"]),
            model=metadata["model"],
            source=metadata["source"] or None,
            parts=_parts(json.loads(metadata["fingerprint_parts"])),
        ),
        start=start,
        end=end,
        is_prefix=metadata["is_prefix"] == "1",
        created_at=_time(float(metadata["created_at"])),
        resumption=_resumption(json.loads(metadata["resumption"])),
        priority=Priority(int(metadata["priority"])),
    )


# The checksum tells damage, not what others wrote on purpose: what comes from a file
# goes on only if it is of the kind that is expected.


def _digest(text: str) -> str:
    if len(bytes.fromhex(text)) != DIGEST_NBYTES:
        raise ValueError("no hash")
    return text


def _parts(parts: object) -> dict[str, str]:
    if not isinstance(parts, dict):
        raise TypeError("no parts of a fingerprint")
    if not all(isinstance(text, str) for text in parts.values()):
        raise TypeError("a part of the fingerprint is no text")
    return parts


def _time(seconds: float) -> float:
    if not 0 <= seconds < MAX_SECONDS:
        raise ValueError("no time")
    return seconds


def _resumption(flags: Mapping[str, object]) -> ResumeRules:
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise TypeError("no flags of a resumption")
    return ResumeRules(**{name: bool(flag) for name, flag in flags.items()})


def _header_checksum(metadata: dict[str, str], specs: list[TensorSpec]) -> str:
    canonical = json.dumps(
        [metadata, sorted(specs)], sort_keys=True, separators=(",", ":")
    )
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def digest(buffers: Iterable[memoryview | bytes]) -> bytes:
    """Return the XXH3-128 of a tensor whose bytes lie in some buffers."""
    hash_ = xxhash.xxh3_128()
    for buffer in buffers:
        hash_.update(buffer)
    return hash_.digest()


def combined_checksum(digests: Iterable[bytes]) -> str:
    """Return the checksum of a blob's data, in hex: of the digests of its tensors."""
    return xxhash.xxh3_128_hexdigest(b"".join(digests))
