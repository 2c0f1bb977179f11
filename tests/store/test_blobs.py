"""Blobs are complete, durable, private, and tell when they changed."""

import os
import signal
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from safetensors import safe_open

from promptcache.errors import DamagedBlobError, StoreFormatError
from promptcache.segments.types import EncodedSegment, SegmentInfo, Tensor
from promptcache.store.blobs.folder import BlobFolder
from tests.helpers import workers
from tests.helpers.blobs import write_blob
from tests.helpers.marks import all_but
from tests.helpers.metadata import make_newer, make_older
from tests.helpers.segments import TINY, expected_key, flip, publish, tokens, values


@pytest.fixture
def folder(tmp_path: Path) -> BlobFolder:
    folder = BlobFolder(tmp_path / "store")
    folder.files.create()
    return folder


@pytest.fixture
def umask() -> Iterator[None]:
    """Make everything readable for everybody, where nobody takes care."""
    before = os.umask(0)
    yield
    os.umask(before)


def mixed_segment(num_tokens: int) -> EncodedSegment:
    """Return a segment with tensors of 1, 2 and 4 bytes an item, the small ones first.

    safetensors wants data to be aligned, mlx reads it in place.
    """
    lengths = {"U8": 3, "BF16": 5, "U32": 1, "F32": 2}
    sizes = {"U8": 1, "BF16": 2, "U32": 4, "F32": 4}
    names = {"U32": "token_ids"}
    tensors = [
        Tensor(
            names.get(dtype, f"layer.{dtype}"),
            dtype,
            (num_tokens, length) if length > 1 else (num_tokens,),
            memoryview(bytes(range(1, 255)) * 9)[: num_tokens * length * sizes[dtype]],
        )
        for dtype, length in lengths.items()
    ]
    return EncodedSegment('{"layers": "ä"}', tensors)


def mixed_info(num_tokens: int = 3, *, key: str = "ab" * 16) -> SegmentInfo:
    return SegmentInfo(key, "cd" * 16, TINY, 7, 7 + num_tokens, False, 1.25)


def test_safetensors_reads_a_blob(folder: BlobFolder) -> None:
    key = publish(folder, tokens(5))

    with safe_open(folder.path(key), framework="numpy") as blob:
        metadata = blob.metadata()
        token_ids = blob.get_tensor("token_ids").tolist()
        rows = blob.get_tensor("rows")

    assert token_ids == tokens(5)
    assert rows.shape == (5, 1)
    assert array("f", rows.flatten()) == values(tokens(5), 0, 5)
    assert metadata["key"] == key
    assert metadata["format_version"] == "4"
    assert (metadata["start"], metadata["end"]) == ("0", "5")


def test_the_format_page_names_what_a_header_has(folder: BlobFolder) -> None:
    page = (Path(__file__).parents[2] / "docs/store-format.md").read_text()
    key = publish(folder, tokens(5))

    with safe_open(folder.path(key), framework="numpy") as blob:
        unnamed = {name for name in blob.metadata() if f"`{name}`" not in page}

    assert unnamed == set()


def test_mlx_reads_a_blob(folder: BlobFolder) -> None:
    write_blob(folder, mixed_info(), mixed_segment(3))

    arrays = mx.load(str(folder.path("ab" * 16)))

    assert {name: (a.dtype, a.shape) for name, a in arrays.items()} == {
        "token_ids": (mx.uint32, (3,)),
        "layer.F32": (mx.float32, (3, 2)),
        "layer.BF16": (mx.bfloat16, (3, 5)),
        "layer.U8": (mx.uint8, (3, 3)),
    }
    assert bytes(arrays["layer.U8"].reshape(-1).tolist()) == bytes(range(1, 10))


def test_header_tells_what_was_published(folder: BlobFolder) -> None:
    write_blob(folder, mixed_info(), mixed_segment(3))

    header = folder.check("ab" * 16)

    assert header.info == mixed_info()
    assert header.layout == '{"layers": "ä"}'
    # Data that is read in place has to be aligned.
    assert header.data_start % 8 == 0
    assert [spec.dtype for spec in header.tensors] == ["U32", "F32", "BF16", "U8"]
    shapes = {(spec.name, spec.dtype, spec.shape) for spec in header.tensors}
    assert shapes == {
        ("token_ids", "U32", (3,)),
        ("layer.F32", "F32", (3, 2)),
        ("layer.BF16", "BF16", (3, 5)),
        ("layer.U8", "U8", (3, 3)),
    }


def test_token_ids_are_read_without_the_rest(folder: BlobFolder) -> None:
    key = publish(folder, tokens(50))

    found = folder.read_token_ids(folder.read_header(key))

    assert array("I", found).tolist() == tokens(50)


def test_publish_returns_the_size_of_the_file(folder: BlobFolder) -> None:
    nbytes = write_blob(folder, mixed_info(), mixed_segment(3))

    assert nbytes == folder.path("ab" * 16).stat().st_size == folder.nbytes("ab" * 16)


@pytest.mark.parametrize("bit", all_but([5], range(8)))
def test_every_flipped_bit_that_matters_is_detected(
    folder: BlobFolder, bit: int
) -> None:
    write_blob(folder, mixed_info(), mixed_segment(3))
    path = folder.path("ab" * 16)
    sound = path.read_bytes()

    undetected = []
    for position in range(len(sound)):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            folder.check("ab" * 16)
            undetected.append(position)
        except DamagedBlobError:
            pass

    # JSON spells this ä of the layout in two ways.
    same = [sound.index(rb"\u00e4") + len(r"\u00")] if bit == 5 else []
    assert undetected == same


def test_only_other_white_space_in_the_padding_does_no_harm(folder: BlobFolder) -> None:
    # The header is padded to a multiple of 8 bytes; not each length needs a space.
    keys = [publish(folder, tokens(number)) for number in (5, 10, 100)]
    key = next(k for k in keys if b"}  " in folder.path(k).read_bytes())
    path = folder.path(key)
    sound = path.read_bytes()
    data_start = folder.read_header(key).data_start
    num_spaces = data_start - len(sound[:data_start].rstrip(b" "))
    assert num_spaces

    harmless = []
    for value in range(256):
        path.write_bytes(sound[: data_start - 1] + bytes([value]) + sound[data_start:])
        try:
            folder.check(key)
            harmless.append(value)
        except DamagedBlobError:
            pass

    assert bytes(harmless) == b"\t\n\r "


@pytest.mark.parametrize("missing", [1, 2, 3, 4, 8, 100])
def test_blob_cut_at_the_end_is_detected(folder: BlobFolder, missing: int) -> None:
    key = publish(folder, tokens(50))
    path = folder.path(key)
    path.write_bytes(path.read_bytes()[:-missing])

    with pytest.raises(DamagedBlobError):
        folder.read_header(key)


def test_blob_cut_anywhere_is_detected(folder: BlobFolder) -> None:
    key = publish(folder, tokens(5))
    path = folder.path(key)
    sound = path.read_bytes()

    for length in range(len(sound)):
        path.write_bytes(sound[:length])
        with pytest.raises(DamagedBlobError):
            folder.check(key)


@pytest.mark.parametrize("more", [b"\0", b"\0" * 8, b"{}"])
def test_blob_that_grew_is_detected(folder: BlobFolder, more: bytes) -> None:
    key = publish(folder, tokens(5))
    with open(folder.path(key), "ab") as file:
        file.write(more)

    with pytest.raises(DamagedBlobError):
        folder.check(key)


def test_missing_blob_is_damaged(folder: BlobFolder) -> None:
    with pytest.raises(DamagedBlobError, match=r"^blob is missing$"):
        folder.check("ab" * 16)


def test_folder_in_the_place_of_a_blob_is_damage(folder: BlobFolder) -> None:
    folder.path("ab" * 16).mkdir(parents=True)

    with pytest.raises(DamagedBlobError):
        folder.check("ab" * 16)


def test_blob_under_the_name_of_another_is_damaged(folder: BlobFolder) -> None:
    key = publish(folder, tokens(5))
    other = publish(folder, tokens(6))
    folder.path(key).replace(folder.path(other))

    with pytest.raises(DamagedBlobError, match=f"another segment, {key}"):
        folder.check(other)


def test_blob_of_a_newer_format_is_refused_as_such(folder: BlobFolder) -> None:
    key = publish(folder, tokens(5))
    make_newer(folder.path(key))

    with pytest.raises(StoreFormatError, match=r"blob has format 5 .* up to 4, upgr"):
        folder.check(key)


def test_blob_of_an_older_format_is_refused_as_such(folder: BlobFolder) -> None:
    key = publish(folder, tokens(5))
    make_older(folder.path(key))

    with pytest.raises(StoreFormatError, match=r"older format 1, .* prune` removes it"):
        folder.check(key)


def test_publishing_again_gives_the_same_blob(folder: BlobFolder) -> None:
    key = publish(folder, tokens(5))
    first = folder.path(key).read_bytes()

    publish(folder, tokens(5))

    assert folder.path(key).read_bytes() == first
    assert [key for key, _ in folder.stored()] == [key]


def test_publishing_again_repairs_a_damaged_blob(folder: BlobFolder) -> None:
    key = publish(folder, tokens(5))
    flip(folder.path(key))

    publish(folder, tokens(5))

    assert folder.check(key).info.key == key


def test_open_blob_stays_readable_when_it_is_replaced_or_removed(
    folder: BlobFolder,
) -> None:
    key = publish(folder, tokens(5))
    sound = folder.path(key).read_bytes()

    with open(folder.path(key), "rb") as file:
        publish(folder, tokens(5))
        folder.remove(key)
        found = file.read()

    assert found == sound


def test_failed_write_leaves_nothing(folder: BlobFolder) -> None:
    info = mixed_info()
    folder.path(info.key).mkdir(parents=True)

    with pytest.raises(OSError, match="directory"):
        write_blob(folder, info, mixed_segment(3))

    assert list((folder.root / "tmp").iterdir()) == []


def test_killed_writer_leaves_garbage_only_and_a_live_one_none(
    folder: BlobFolder,
) -> None:
    writer = workers.start("publish_much", folder.root, 200_000_000)
    unfinished: list[Path] = []
    while not any(path.stat().st_size for path in unfinished):
        assert writer.poll() is None
        unfinished = list((folder.root / "tmp").iterdir())
    writer.send_signal(signal.SIGSTOP)
    time.sleep(0.05)
    assert unfinished[0].exists(), "the writer was faster than this test"

    while_alive = folder.files.garbage()
    writer.kill()
    writer.communicate()
    after = folder.files.garbage()
    swept = [folder.files.sweep(garbage) for garbage in after]

    assert while_alive == []
    assert [g.path for g in after] == [f"tmp/{unfinished[0].name}"]
    assert swept == [after[0].nbytes]
    assert list((folder.root / "tmp").iterdir()) == []
    assert list(folder.stored()) == []


@pytest.mark.usefixtures("umask")
def test_folders_and_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    folder = BlobFolder(tmp_path / "store")
    folder.files.create()
    publish(folder, tokens(5))
    folder.files.write_file("pins.json", b"{}")

    paths = [folder.root, *folder.root.rglob("*")]

    folders = {path for path in paths if path.is_dir()}
    assert {p.stat().st_mode & 0o777 for p in folders} == {0o700}
    assert {p.stat().st_mode & 0o777 for p in set(paths) - folders} == {0o600}
    assert len(folders) == 5
    assert len(set(paths) - folders) == 4


def test_backups_skip_the_store(folder: BlobFolder) -> None:
    tag = (folder.root / "CACHEDIR.TAG").read_text()

    # The specification asks for these very bytes, bford.info/cachedir.
    assert tag.startswith("Signature: 8a477f597d28d172789f06886806bc55\n")


def test_blobs_are_listed_with_their_sizes(folder: BlobFolder) -> None:
    keys = {publish(folder, tokens(n)) for n in (1, 2, 3)}

    assert dict(folder.stored()) == {key: folder.nbytes(key) for key in keys}


def test_all_files_count(folder: BlobFolder) -> None:
    key = publish(folder, tokens(5))
    (folder.root / "tmp" / "left").write_bytes(b"12345")
    (folder.root / "quarantine" / "bad").write_bytes(b"1234567")

    signs = ("CACHEDIR.TAG", ".gitignore")

    nbytes = sum((folder.root / sign).stat().st_size for sign in signs)
    assert folder.files.total_nbytes() == folder.nbytes(key) + nbytes + 12


def test_removed_blob_is_gone_and_removing_it_again_no_error(
    folder: BlobFolder,
) -> None:
    key = publish(folder, tokens(5))
    nbytes = folder.nbytes(key)

    freed = [folder.remove(key), folder.remove(key)]

    assert freed == [nbytes, 0]
    assert not folder.exists(key)
    assert folder.nbytes(key) == 0


def test_damaged_blob_is_set_aside_until_it_is_swept(folder: BlobFolder) -> None:
    key = publish(folder, tokens(5))
    path = folder.path(key)

    folder.files.quarantine_file(path)
    folder.files.quarantine_file(path)

    assert list(folder.quarantined()) == [key]
    assert list(folder.stored()) == []
    assert [g.path for g in folder.files.garbage()] == [f"quarantine/{key}.safetensors"]


def test_tensors_need_not_be_contiguous_in_one_piece(folder: BlobFolder) -> None:
    key = expected_key(TINY.digest, [1, 2])
    data = memoryview(bytes(range(16)))
    segment = EncodedSegment(
        "[]",
        [
            Tensor("token_ids", "U32", (2,), data[:8]),
            Tensor("empty", "F32", (0, 4), data[:0]),
        ],
    )

    write_blob(folder, SegmentInfo(key, TINY.digest, TINY, 0, 2, True, 1.0), segment)

    assert {t.name for t in folder.check(key).tensors} == {"token_ids", "empty"}
