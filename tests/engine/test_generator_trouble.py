"""Trouble with the store is one warning and the right tokens, nothing else."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

from promptcache import CachedGenerator, PrefixStore, PromptCacheWarning, StoreError
from promptcache.tiers import prompt_saver
from tests.helpers.marks import all_but

PROMPT: list[int] = mx.random.randint(0, 256, (100,), key=mx.random.key(3)).tolist()
# Segments end at 32, 64 and here.
BUILT = 90


def generated(generator: CachedGenerator, prompt: list[int], **options: Any) -> Any:
    """Return the tokens and the last response."""
    responses = list(generator.stream_generate(prompt, 16, **options))
    return [response.token for response in responses], responses[-1]


def plain(generator: CachedGenerator, prompt: list[int]) -> list[int]:
    responses = mlx_lm.stream_generate(generator.model, generator.tokenizer, prompt, 16)
    return [response.token for response in responses]


def only_warning(record: pytest.WarningsRecorder) -> str:
    """Return the text of the one warning of promptcache there is."""
    found = [w for w in record if issubclass(w.category, PromptCacheWarning)]
    assert len(found) == 1, [str(w.message) for w in found]
    return str(found[0].message)


@pytest.fixture
def built_store(model_dir: Path, tmp_path: Path) -> Path:
    """A closed store with a prefix of three segments."""
    path = tmp_path / "built"
    with CachedGenerator.load(model_dir, store=path) as generator:
        generator.build(PROMPT[:BUILT], prefill_step_size=32)
    return path


# Damaged blobs


def blob_of_segment(store: Path, number: int) -> Path:
    """Return the path of the first, second or third segment's blob."""
    with PrefixStore(store) as opened:
        report = opened.report(opened.prefixes()[0].key)
    key = report.segments[number].key
    return store / "blobs" / key[:2] / f"{key}.safetensors"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def shrink_header_length(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[:8] = (2**63).to_bytes(8, "little")
    path.write_bytes(data)


BLOB_DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped bit at the end of the data": lambda path: flip(path, -1),
    "flipped bit in the middle": lambda path: flip(path, path.stat().st_size // 2),
    "flipped bit in the header": lambda path: flip(path, 40),
    "flipped bit in the header's length": lambda path: flip(path, 0),
    "header of a monstrous length": shrink_header_length,
    "truncated by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "truncated in the header": lambda path: os.truncate(path, 20),
    "empty": lambda path: os.truncate(path, 0),
    "deleted": lambda path: path.unlink(),
    "garbage": lambda path: path.write_bytes(b"garbage" * 1000),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
EVERYWHERE = [(damage, number) for damage in BLOB_DAMAGE for number in range(3)]
# Each kind of damage once, and each place.
FEW = [(damage, i % 3) for i, damage in enumerate(BLOB_DAMAGE)]


@pytest.mark.parametrize(("damage", "number"), all_but(FEW, EVERYWHERE))
def test_damaged_blob_ends_the_match_with_one_warning_and_heals(
    model_dir: Path, built_store: Path, damage: str, number: int
) -> None:
    BLOB_DAMAGE[damage](blob_of_segment(built_store, number))

    with CachedGenerator.load(model_dir, store=built_store) as generator:
        with pytest.warns(PromptCacheWarning) as record:
            tokens, last = generated(generator, PROMPT, save=True)
        healed_tokens, healed = generated(generator, PROMPT)

        assert "read again" in only_warning(record)
        assert last.cached_tokens == 32 * number
        assert healed.cached_tokens == 99
        assert tokens == healed_tokens == plain(generator, PROMPT)
        assert generator.store is not None
        assert generator.store.verify().is_sound


@pytest.mark.parametrize("damage", ["flipped bit in the middle", "deleted"])
def test_damaged_blob_is_read_again_without_saving(
    model_dir: Path, built_store: Path, damage: str
) -> None:
    BLOB_DAMAGE[damage](blob_of_segment(built_store, 1))

    with CachedGenerator.load(model_dir, store=built_store) as generator:
        with pytest.warns(PromptCacheWarning) as record:
            tokens, last = generated(generator, PROMPT, save=False)
        again, _ = generated(generator, PROMPT, save=False)

        assert only_warning(record)
        assert last.cached_tokens == 32
        assert tokens == again == plain(generator, PROMPT)


def test_blob_of_another_segment_is_no_hit(model_dir: Path, built_store: Path) -> None:
    shutil.copy(blob_of_segment(built_store, 0), blob_of_segment(built_store, 1))

    with CachedGenerator.load(model_dir, store=built_store) as generator:
        with pytest.warns(PromptCacheWarning) as record:
            tokens, last = generated(generator, PROMPT)

        assert "another segment" in only_warning(record)
        assert last.cached_tokens == 32
        assert tokens == plain(generator, PROMPT)


def test_build_computes_a_damaged_segment_again(
    model_dir: Path, built_store: Path
) -> None:
    blob_of_segment(built_store, 1).unlink()

    with CachedGenerator.load(model_dir, store=built_store) as generator:
        with pytest.warns(PromptCacheWarning) as record:
            built = generator.build(PROMPT)

        assert only_warning(record)
        assert (built.num_tokens, built.cached_tokens) == (100, 32)
        tokens, last = generated(generator, PROMPT)
        assert last.cached_tokens == 99
        assert tokens == plain(generator, PROMPT)


# Damaged index


def set_version(path: Path, number: int) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version={number}")
    connection.commit()
    connection.close()


def replace_by_file(store: Path) -> None:
    shutil.rmtree(store)
    store.write_text("no folder")


def drop_table(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE blocks")
    connection.commit()
    connection.close()


REBUILT_DAMAGE: dict[str, Callable[[Path], object]] = {
    "deleted index": lambda store: (store / "index.db").unlink(),
    "garbage index": lambda store: (store / "index.db").write_bytes(b"x" * 9999),
    "truncated index": lambda store: os.truncate(store / "index.db", 5000),
    "empty index": lambda store: os.truncate(store / "index.db", 0),
    "index without a table": lambda store: drop_table(store / "index.db"),
}
LOST_DAMAGE: dict[str, Callable[[Path], object]] = {
    "a file in place of the store": replace_by_file,
    "store of a newer version": lambda store: set_version(store / "index.db", 99),
}


@pytest.mark.parametrize("damage", REBUILT_DAMAGE)
def test_lost_index_is_rebuilt_with_one_warning(
    model_dir: Path, built_store: Path, damage: str
) -> None:
    REBUILT_DAMAGE[damage](built_store)

    with (
        pytest.warns(PromptCacheWarning) as record,
        CachedGenerator.load(model_dir, store=built_store) as generator,
    ):
        tokens, last = generated(generator, PROMPT, save=True)
        expected = plain(generator, PROMPT)

    assert "rebuilt from 3 blobs" in only_warning(record)
    assert last.cached_tokens == BUILT
    assert tokens == expected


@pytest.mark.parametrize("damage", LOST_DAMAGE)
def test_store_that_cannot_be_used_is_one_warning_and_a_cold_run(
    model_dir: Path, built_store: Path, damage: str
) -> None:
    LOST_DAMAGE[damage](built_store)

    with (
        pytest.warns(PromptCacheWarning) as record,
        CachedGenerator.load(model_dir, store=built_store) as generator,
    ):
        tokens, last = generated(generator, PROMPT, save=True)
        expected = plain(generator, PROMPT)

    assert only_warning(record)
    assert last.cached_tokens == 0
    assert tokens == expected


@pytest.mark.parametrize("damage", ["a file in place of the store"])
def test_build_raises_where_the_store_cannot_be_used(
    model_dir: Path, built_store: Path, damage: str
) -> None:
    LOST_DAMAGE[damage](built_store)
    with (
        pytest.warns(PromptCacheWarning),
        CachedGenerator.load(model_dir, store=built_store) as generator,
    ):
        with pytest.raises(StoreError):
            generator.build(PROMPT)
        with pytest.raises(StoreError):
            generator.match(PROMPT)


def test_newer_store_is_left_as_it_is(model_dir: Path, built_store: Path) -> None:
    set_version(built_store / "index.db", 99)
    blobs = sorted((built_store / "blobs").rglob("*.safetensors"))

    with (
        pytest.warns(PromptCacheWarning, match="upgrade"),
        CachedGenerator.load(model_dir, store=built_store) as generator,
    ):
        generated(generator, PROMPT, save=True)

    assert sorted((built_store / "blobs").rglob("*.safetensors")) == blobs
    set_version(built_store / "index.db", 1)
    with PrefixStore(built_store) as store:
        assert store.verify().is_sound


def test_index_that_breaks_while_it_is_open_is_one_warning(
    model_dir: Path, built_store: Path
) -> None:
    generator = CachedGenerator.load(model_dir, store=built_store)
    drop_table(built_store / "index.db")

    with pytest.warns(PromptCacheWarning) as record:
        tokens, last = generated(generator, PROMPT, save=True)

    assert only_warning(record)
    assert last.cached_tokens == 0
    assert tokens == plain(generator, PROMPT)


def test_store_deleted_while_it_is_open_is_created_again(
    model_dir: Path, built_store: Path
) -> None:
    generator = CachedGenerator.load(model_dir, store=built_store)
    shutil.rmtree(built_store)

    tokens, last = generated(generator, PROMPT, save=True)
    again, found = generated(generator, PROMPT)

    assert tokens == again == plain(generator, PROMPT)
    assert (last.cached_tokens, found.cached_tokens) == (0, 99)


# Limits, full and read-only disks


def test_prompt_over_the_size_limit_is_one_warning(
    model_dir: Path, tmp_path: Path
) -> None:
    store = PrefixStore(tmp_path / "small", max_nbytes=200_000)
    generator = CachedGenerator.load(model_dir, store=store)

    with pytest.warns(PromptCacheWarning) as record:
        tokens, _ = generated(generator, PROMPT * 3, save=True)

    assert "limit" in only_warning(record)
    assert tokens == plain(generator, PROMPT * 3)
    assert store.total_nbytes() <= 200_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def test_full_disk_is_one_warning_and_a_warm_run(
    model_dir: Path, small_disk: Path
) -> None:
    with CachedGenerator.load(model_dir, store=small_disk / "store") as generator:
        generator.build(PROMPT[:50])
        fill(small_disk)

        with pytest.warns(PromptCacheWarning) as record:
            tokens, last = generated(generator, PROMPT, save=True)

        assert "not saved" in only_warning(record)
        assert last.cached_tokens == 50
        assert tokens == plain(generator, PROMPT)
        with pytest.raises(StoreError):
            generator.build(PROMPT)
        assert list((small_disk / "store" / "tmp").glob("*.safetensors*")) == []
        (small_disk / "filler").unlink()
        assert generator.build(PROMPT).cached_tokens == 50
        assert generator.store is not None
        assert generator.store.verify().is_sound


def test_disk_that_fills_while_a_long_prompt_is_saved_is_one_warning(
    model_dir: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_saver, "SAVE_SECONDS", 0.0)
    long = PROMPT * 30
    with CachedGenerator.load(model_dir, store=small_disk / "store") as generator:
        with pytest.warns(PromptCacheWarning) as record:
            tokens, _ = generated(generator, long, save=True, prefill_step_size=512)

        assert "not saved" in only_warning(record)
        assert (
            tokens
            == generated(
                generator, long, save=False, reuse=False, prefill_step_size=512
            )[0]
        )
        _, warm = generated(generator, long, save=False)
        assert warm.cached_tokens >= 512


def test_store_that_cannot_be_created_on_a_full_disk_is_one_warning(
    model_dir: Path, small_disk: Path
) -> None:
    fill(small_disk)

    with (
        pytest.warns(PromptCacheWarning) as record,
        CachedGenerator.load(model_dir, store=small_disk / "store") as generator,
    ):
        tokens, last = generated(generator, PROMPT, save=True)
        expected = plain(generator, PROMPT)

    assert only_warning(record)
    assert (tokens, last.cached_tokens) == (expected, 0)


def test_read_only_store_is_used_and_saving_is_one_warning(
    model_dir: Path, small_disk: Path
) -> None:
    path = small_disk / "store"
    with CachedGenerator.load(model_dir, store=path) as generator:
        generator.build(PROMPT[:50])
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)

    with CachedGenerator.load(model_dir, store=path) as generator:
        reused, _ = generated(generator, PROMPT, save=False)
        with pytest.warns(PromptCacheWarning) as record:
            tokens, last = generated(generator, PROMPT, save=True)

        assert "read-only" in only_warning(record)
        assert last.cached_tokens == 50
        assert tokens == reused == plain(generator, PROMPT)
        with pytest.raises(StoreError, match="read-only"):
            generator.build(PROMPT)


# Processes

BUILD = """
import json, sys, time
from promptcache import CachedGenerator

model, store, prompt, step, pause = json.loads(sys.argv[1])
generator = CachedGenerator.load(model, store=store)
print("ready", flush=True)
sys.stdin.readline()

def tell(done, total):
    print(done, flush=True)
    time.sleep(pause)

built = generator.build(
    prompt, prefill_step_size=step, prompt_progress_callback=tell
)
print(json.dumps([built.cached_tokens, built.num_tokens, built.key]), flush=True)
"""


def start_build(
    model: Path, store: Path, prompt: list[int], *, step: int, pause: float
) -> "subprocess.Popen[str]":
    """Start a process that loads the model, says so and waits for a line."""
    argument = json.dumps([str(model), str(store), prompt, step, pause])
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, argument],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def next_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_build_that_was_killed_resumes(model_dir: Path, tmp_path: Path) -> None:
    store = tmp_path / "killed"
    process = start_build(model_dir, store, PROMPT, step=8, pause=0.1)
    assert next_line(process) == "ready"
    go(process)
    while int(next_line(process)) < 32:
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    told: list[int] = []

    with CachedGenerator.load(model_dir, store=store) as generator:
        built = generator.build(
            PROMPT,
            prefill_step_size=8,
            prompt_progress_callback=lambda done, _: told.append(done),
        )

        assert 32 <= built.cached_tokens < len(PROMPT)
        assert built.cached_tokens % 8 == 0
        rest = range(built.cached_tokens, len(PROMPT), 8)
        assert told == [*rest, len(PROMPT)]
        tokens, last = generated(generator, PROMPT)
        assert (tokens, last.cached_tokens) == (plain(generator, PROMPT), 99)
        assert generator.store is not None
        assert generator.store.verify().is_sound
