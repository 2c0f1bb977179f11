"""Blobs whose metadata is changed afterwards."""

import json
from pathlib import Path

from promptcache.segments.blob_format import FORMAT_VERSION


def make_newer(path: Path) -> None:
    """Write a blob again as a newer promptcache would, with the same checksum rule."""
    change_metadata(path, format_version=str(FORMAT_VERSION + 1))


def make_older(path: Path) -> None:
    """Write a blob again as the first promptcache did, which knew no checkpoints."""
    change_metadata(path, format_version="1", resumption=None, priority=None)


def change_metadata(path: Path, **changes: str | None) -> None:
    """Write a blob again with other metadata; None leaves a key out."""
    from promptcache.segments.blob_format import _header_checksum, _safetensors_header
    from promptcache.segments.types import TensorSpec

    data = path.read_bytes()
    data_start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:data_start])
    changed = header.pop("__metadata__") | changes
    metadata = {key: value for key, value in changed.items() if value is not None}
    del metadata["checksum"]
    specs = [TensorSpec(n, s["dtype"], tuple(s["shape"])) for n, s in header.items()]
    metadata["checksum"] = _header_checksum(metadata, specs)
    path.write_bytes(_safetensors_header(metadata, specs) + data[data_start:])
