"""Segments that do not fit, or are damaged, restore nothing."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from promptcache import DamagedBlobError, StoreError
from promptcache.kvcache import restore
from promptcache.store.blobs.folder import BlobFolder
from tests.helpers.layers import encode, filled, forged
from tests.helpers.published import TOKEN_IDS, load, publish

UNREADABLE = [
    "",
    "{garbage",
    "[]",
    "5",
    "null",
    '{"0": 5}',
    '{"0": null}',
    '{"0": []}',
    '{"0": ["KVCache"]}',
    '{"0": ["KVCache", "os.system", null, null, null]}',
    '{"0": ["KVCache", "rows", null, null, null, null]}',
]


@pytest.mark.parametrize("layout", UNREADABLE)
def test_layout_that_cannot_be_read_is_damage(blobs: BlobFolder, layout: str) -> None:
    segment = encode([filled(KVCache(), 4)], 0, 4)
    published = publish(blobs, segment._replace(layout=layout), 0, 4)

    with pytest.raises(DamagedBlobError, match="layout cannot be read"):
        load(published)


MISFITS: dict[str, tuple[Any, ...]] = {
    "a quantized part without its tensors": ("QuantizedKVCache", "rows", 32, 8),
    "a window of rows": ("RotatingKVCache", "window", None, None),
    "rows of a window": ("KVCache", "window", None, None),
    "a state": ("KVCache", "checkpoint", None, None, None),
    "the state of another class": (
        "KVCache",
        "checkpoint",
        None,
        None,
        {"object": "ArraysCache", "attributes": {}},
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_layout_that_does_not_fit_the_cache_is_damage(
    blobs: BlobFolder, name: str
) -> None:
    segment = encode([filled(KVCache(), 10)], 0, 10)
    published = publish(blobs, forged(segment, *MISFITS[name]), 0, 10)

    with pytest.raises(DamagedBlobError):
        restore.restore([KVCache()], [load(published)], 10)


@pytest.mark.parametrize(
    ("group_size", "bits"), [(None, 8), (32, None), (None, None)], ids=str
)
def test_quantized_part_without_its_parameters_is_damage(
    blobs: BlobFolder, group_size: int | None, bits: int | None
) -> None:
    segment = encode([filled(QuantizedKVCache(32, 8), 10)], 0, 10)
    part = ("QuantizedKVCache", "rows", group_size, bits)
    published = publish(blobs, forged(segment, *part), 0, 10)

    with pytest.raises(DamagedBlobError):
        restore.restore([KVCache()], [load(published)], 10)


@pytest.mark.parametrize("names", [["1"], ["0", "1"], ["0.0"], []], ids=str)
def test_layout_of_other_parts_is_damage(blobs: BlobFolder, names: list[str]) -> None:
    segment = encode([filled(KVCache(), 10)], 0, 10)
    layout = json.dumps({name: ["KVCache", "rows", None, None] for name in names})
    published = publish(blobs, segment._replace(layout=layout), 0, 10)

    with pytest.raises(DamagedBlobError, match="number of layers"):
        restore.restore([KVCache()], [load(published)], 10)


def flip_byte(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def test_other_tokens_are_damage(blobs: BlobFolder) -> None:
    segment = encode([filled(KVCache(), 10)], 0, 10)
    published = publish(blobs, segment, 0, 10)

    others = [*TOKEN_IDS[:9], 7]

    with pytest.raises(DamagedBlobError, match="other tokens"):
        load(published, token_ids=others)


def test_other_tokens_behind_the_slice_do_not_matter(blobs: BlobFolder) -> None:
    segment = encode([filled(KVCache(), 10)], 0, 10)
    published = publish(blobs, segment, 0, 10)

    loaded = load(published, stop=9, token_ids=[*TOKEN_IDS[:9], 7])

    assert [rows.shape[-2] for rows in loaded.rows("0", 0, 10)] == [9, 9]


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_flipped_bit_of_the_data_is_damage(blobs: BlobFolder, where: str) -> None:
    segment = encode([filled(KVCache(), 64)], 0, 64)
    published = publish(blobs, segment, 0, 64)
    start, size = published.header.data_start, published.path.stat().st_size
    position = {"first": start, "middle": (start + size) // 2, "last": size - 1}

    flip_byte(published.path, position[where])

    with pytest.raises(DamagedBlobError, match="checksum"):
        load(published)


def test_damage_behind_the_slice_is_damage_too(blobs: BlobFolder) -> None:
    segment = encode([filled(KVCache(), 64)], 0, 64)
    published = publish(blobs, segment, 0, 64)

    flip_byte(published.path, published.path.stat().st_size - 1)

    with pytest.raises(DamagedBlobError):
        load(published, stop=3)


def test_truncated_blob_is_a_store_error(blobs: BlobFolder) -> None:
    segment = encode([filled(KVCache(), 64)], 0, 64)
    published = publish(blobs, segment, 0, 64)

    os.truncate(published.path, published.path.stat().st_size - 1)

    with pytest.raises(StoreError, match="cannot be read"):
        load(published)


def test_missing_blob_is_a_store_error(blobs: BlobFolder) -> None:
    segment = encode([filled(KVCache(), 4)], 0, 4)
    published = publish(blobs, segment, 0, 4)

    published.path.unlink()

    with pytest.raises(StoreError, match="cannot be read"):
        load(published)


def test_another_number_of_layers_is_damage(blobs: BlobFolder) -> None:
    segment = encode([filled(KVCache(), 4)], 0, 4)
    loaded = load(publish(blobs, segment, 0, 4))

    with pytest.raises(DamagedBlobError, match="number of layers"):
        restore.restore([KVCache(), KVCache()], [loaded], 4)


def test_checksum_of_the_header_decides_what_is_compared(blobs: BlobFolder) -> None:
    segment = encode([filled(KVCache(), 4)], 0, 4)
    published = publish(blobs, segment, 0, 4)
    other = published._replace(header=replace(published.header, data_checksum="0" * 32))

    with pytest.raises(DamagedBlobError, match="checksum"):
        load(other)
