"""The index: one SQLite file that many processes share."""

import hashlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from promptcache.errors import DamagedIndexError, StoreError, StoreFormatError
from promptcache.segments.chain import Chain
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import AT_ANY_TOKEN, Priority, ResumeRules, SegmentInfo
from promptcache.store import PrefixStore
from promptcache.store.index import ROOT_ID, SCHEMA_VERSION, Index
from promptcache.store.index.rows import CheckpointRow
from tests.helpers import workers
from tests.helpers.invariants import query
from tests.helpers.segments import (
    NEEDS_CHECKPOINT,
    TINY,
    cached_tokens,
    expected_key,
    fingerprint,
    save,
    tokens,
    tree_hash,
)

OTHER = fingerprint("other")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index.db"


@pytest.fixture
def index(path: Path) -> Iterator[Index]:
    index = Index(path)
    yield index
    index.database.close()


def add(
    index: Index,
    token_ids: list[int],
    *,
    start: int = 0,
    model: Fingerprint = TINY,
    is_prefix: bool = True,
    now: float = 1.0,
    resumption: ResumeRules = AT_ANY_TOKEN,
    parent_key: str | None = None,
) -> str:
    """Add the row of a segment `[start, len(token_ids))`; return its key."""
    chain = Chain(model.digest, token_ids)
    key = chain.key_at(len(chain))
    hash_ = chain.key_at(start)
    info = SegmentInfo(key, hash_, model, start, len(chain), is_prefix, now, resumption)
    parent = parent_key or (hash_ if start else None)
    index.add_segment(info, chain, parent_key=parent, nbytes=10, created_at=now)
    return key


def add_checkpoint(
    index: Index,
    token_ids: list[int],
    parent_key: str,
    *,
    resumption: ResumeRules = NEEDS_CHECKPOINT,
    is_prefix: bool = False,
    priority: Priority = Priority.STEP,
) -> str:
    """Add the row of a checkpoint after token ids; return its key."""
    chain = Chain(TINY.digest, token_ids)
    key = expected_key(TINY.digest, token_ids, "checkpoint")
    position = len(chain)
    info = SegmentInfo(
        key=key,
        start_hash=chain.key_at(position),
        fingerprint=TINY,
        start=position,
        end=position,
        is_prefix=is_prefix,
        created_at=1.0,
        resumption=resumption,
        priority=priority,
    )
    index.add_segment(info, chain, parent_key=parent_key, nbytes=7, created_at=1.0)
    return key


def test_one_of_many_processes_creates_the_index(tmp_path: Path) -> None:
    outputs = workers.finish([workers.start("open_index", tmp_path) for _ in range(8)])

    assert sorted(outputs) == ["False\n"] * 7 + ["True\n"]
    assert query(tmp_path, "PRAGMA journal_mode") == [("wal",)]
    assert query(tmp_path, "PRAGMA user_version") == [(SCHEMA_VERSION,)]


def test_writers_wait_for_each_other(tmp_path: Path) -> None:
    workers.finish([workers.start("add_rows", tmp_path, i) for i in range(4)])

    assert query(tmp_path, "SELECT count(*) FROM segments") == [(4 * 30,)]
    assert query(tmp_path, "SELECT count(*) FROM blocks") == [(4 * 30,)]
    assert query(tmp_path, "PRAGMA integrity_check") == [("ok",)]


def test_reader_does_not_wait_for_a_writer(index: Index, path: Path) -> None:
    key = add(index, tokens(40))
    reader = Index(path)

    with index.database.writing():
        add(index, tokens(41, first=1))
        found = reader.segment_keys()

    assert found == {key}
    assert len(reader.segment_keys()) == 2
    reader.database.close()


def test_opening_does_not_wait_for_a_writer(tmp_path: Path) -> None:
    PrefixStore(tmp_path / "store").close()
    writer = workers.start("hold_write", tmp_path / "store")
    assert writer.stdout
    assert writer.stdout.readline() == "ready\n"
    opened: list[PrefixStore] = []
    thread = threading.Thread(
        target=lambda: opened.append(PrefixStore(tmp_path / "store"))
    )

    thread.start()
    thread.join(timeout=2)
    waited = thread.is_alive()
    writer.communicate("")
    thread.join()

    assert not waited
    assert not opened[0].is_read_only
    opened[0].close()


def test_opening_writes_nothing(tmp_path: Path) -> None:
    PrefixStore(tmp_path / "store").close()
    before = tree_hash(tmp_path / "store")

    with PrefixStore(tmp_path / "store") as store:
        store.prefixes()
        during = tree_hash(tmp_path / "store")

    assert during == before


@pytest.mark.parametrize("journal_mode", ["wal", "delete"])
def test_newer_index_is_refused_and_not_touched(path: Path, journal_mode: str) -> None:
    Index(path).database.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
        connection.execute(f"PRAGMA journal_mode={journal_mode}")
    before = path.read_bytes()

    with pytest.raises(
        StoreFormatError,
        match=rf"format {SCHEMA_VERSION + 1} .* reads up to {SCHEMA_VERSION}",
    ):
        Index(path)

    assert path.read_bytes() == before


def test_newer_store_is_refused_and_not_touched(tmp_path: Path) -> None:
    with PrefixStore(tmp_path / "store") as store:
        save(store, tokens(40))
        store.pin(store.prefixes()[0].key, "name")
    with closing(sqlite3.connect(store.path / "index.db")) as connection:
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    before = tree_hash(store.path)

    with pytest.raises(StoreFormatError):
        PrefixStore(store.path)

    assert tree_hash(store.path) == before


def test_older_index_has_to_be_rebuilt(path: Path) -> None:
    Index(path).database.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION - 1}")

    with pytest.raises(DamagedIndexError, match=f"older format {SCHEMA_VERSION - 1}"):
        Index(path)


@pytest.mark.parametrize("nbytes", [15, 16, 100, 4096, 100_000])
def test_file_that_is_no_database_is_a_damaged_index(path: Path, nbytes: int) -> None:
    path.write_bytes(os.urandom(nbytes - 1) + b"x")

    with pytest.raises(DamagedIndexError, match=r"damaged .* run `promptcache verify`"):
        Index(path)


def test_damage_inside_the_file_is_a_damaged_index(path: Path) -> None:
    index = Index(path)
    for i in range(50):
        add(index, tokens(100, first=i))
    index.database.close()
    data = bytearray(path.read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    path.write_bytes(data)

    broken = Index(path)

    assert not broken.database.is_sound()
    with pytest.raises(DamagedIndexError):
        broken.segment_keys()
    broken.database.close()


def test_sound_index_is_sound(index: Index) -> None:
    add(index, tokens(40))

    assert index.database.is_sound()


@pytest.mark.parametrize("content", [b"", b"x"])
def test_empty_file_becomes_an_index(path: Path, content: bytes) -> None:
    path.write_bytes(content)

    created: list[Index] = []
    index = Index(path, populate=created.append)

    assert created == [index]
    index.database.close()


@pytest.mark.parametrize("name", ["a b", "50%", "a?b", "a#b", "é", "a&mode=ro"])
def test_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()

    Index(tmp_path / name / "index.db").database.close()

    assert (tmp_path / name / "index.db").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_index_in_a_folder_that_is_missing_cannot_be_created(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be created"):
        Index(tmp_path / "missing" / "index.db")


def test_read_only_store_is_read(
    tmp_path: Path, mount_read_only: Callable[[Path], Path]
) -> None:
    with PrefixStore(tmp_path / "store") as store:
        save(store, tokens(100))
    folder = mount_read_only(store.path)

    with PrefixStore(folder) as store:
        assert store.is_read_only
        assert cached_tokens(store, tokens(100)) == 100
        assert [prefix.num_tokens for prefix in store.prefixes()] == [100]
        assert store.verify().is_sound


def test_read_only_store_is_read_while_another_process_writes_to_it(
    tmp_path: Path, mount_read_only: Callable[[Path], Path]
) -> None:
    with PrefixStore(tmp_path / "store") as writer:
        save(writer, tokens(100))
        assert (writer.path / "index.db-wal").stat().st_size
        folder = mount_read_only(writer.path)

        with PrefixStore(folder) as reader:
            assert reader.is_read_only
            assert cached_tokens(reader, tokens(100)) == 100


def test_read_only_store_of_a_killed_process_is_read(
    tmp_path: Path, mount_read_only: Callable[[Path], Path]
) -> None:
    process = workers.start("save_forever", tmp_path / "store")
    assert process.stdout
    saved = [int(process.stdout.readline()) for _ in range(3)]
    process.kill()
    process.communicate()
    folder = mount_read_only(tmp_path / "store")

    with PrefixStore(folder) as store:
        for seed in saved:
            prompt = workers.prompt_of(seed)
            assert cached_tokens(store, prompt) == len(prompt)


def test_writing_to_a_read_only_store_says_so(
    tmp_path: Path, mount_read_only: Callable[[Path], Path]
) -> None:
    with PrefixStore(tmp_path / "store") as store:
        key = save(store, tokens(100))
    folder = mount_read_only(store.path)

    with PrefixStore(folder) as store:
        operations: list[Callable[[], object]] = [
            lambda: save(store, tokens(100)),
            lambda: store.pin(key, "name"),
            lambda: store.remove(key),
            lambda: store.usage_log.touch(store.lookup(tokens(100), TINY)),
            lambda: store.segments.give_up(key),
            lambda: store.segments.building(key, lambda: None).__enter__(),
        ]
        for operation in operations:
            with pytest.raises(StoreError):
                operation()


def test_store_cannot_be_created_where_nothing_can_be_written(
    tmp_path: Path, mount_read_only: Callable[[Path], Path]
) -> None:
    (tmp_path / "empty").mkdir()
    folder = mount_read_only(tmp_path / "empty")

    with pytest.raises(StoreError, match=r"cannot be created \(Read-only file system"):
        PrefixStore(folder / "store")


def test_failed_transaction_changes_nothing(index: Index) -> None:
    with pytest.raises(KeyboardInterrupt), index.database.writing():
        add(index, tokens(40))
        raise KeyboardInterrupt

    assert index.segment_keys() == set()


def test_path_leads_from_the_root_to_the_segment(index: Index) -> None:
    keys = [
        add(index, tokens(40)),
        add(index, tokens(80), start=40),
        add(index, tokens(81), start=80),
    ]
    segment_id = index.segment_id(keys[-1])
    assert segment_id is not None

    path = index.path_to(segment_id)

    assert [row.key for row in path] == keys
    assert [(row.start, row.end) for row in path] == [(0, 40), (40, 80), (80, 81)]


def test_blocks_are_known_by_the_segment_that_ends_on_them(index: Index) -> None:
    chain = Chain(TINY.digest, tokens(100))
    first = index.segment_id(add(index, tokens(64)))
    second = index.segment_id(add(index, tokens(100), start=64))

    def found(fingerprint: str) -> list[list[int]]:
        hashes = [chain.block_hash(i) for i in (1, 2, 3)]
        return [index.segments_at_block(h, fingerprint) for h in hashes]

    assert found(TINY.digest) == [[first], [first], [second]]
    assert found(OTHER.digest) == [[], [], []]
    assert index.has_block(chain.block_hash(3))
    assert not index.has_block(chain.block_hash(0))


def test_children_are_found_by_start_token_and_fingerprint(index: Index) -> None:
    other = fingerprint("other")
    key = add(index, tokens(40))
    add(index, tokens(40), model=other)
    add(index, [7, *tokens(40)])

    found = index.children(ROOT_ID, TINY.digest, {0: 0, 1: 7})

    assert [row.key for row in found] == [key]


def test_flags_of_a_segment_come_back(index: Index) -> None:
    whole = ResumeRules(sliceable=False, needs_checkpoint=True)
    first = add(index, tokens(40))
    second = add(index, tokens(80), start=40, resumption=whole)
    segment_id = index.segment_id(second)
    assert segment_id is not None

    path = index.path_to(segment_id)

    assert [row.key for row in path] == [first, second]
    flags = [(row.sliceable, row.needs_checkpoint) for row in path]
    assert flags == [(True, False), (False, True)]


def test_checkpoints_are_found_by_the_segments_they_hang_on(index: Index) -> None:
    first = add(index, tokens(40))
    second = add(index, tokens(80), start=40, is_prefix=False)
    inside = add_checkpoint(index, tokens(20), first, priority=Priority.BOUNDARY)
    end = add_checkpoint(index, tokens(80), second, is_prefix=True)
    ids = [index.segment_id(key) for key in (first, second)]
    assert ids[0] is not None
    assert ids[1] is not None

    by_parent = [index.checkpoints([id_]) for id_ in ids if id_ is not None]

    assert by_parent == [
        [CheckpointRow(inside, ids[0], 20, Priority.BOUNDARY, False)],
        [CheckpointRow(end, ids[1], 80, Priority.STEP, True)],
    ]
    assert index.checkpoints([]) == []


def test_checkpoint_is_no_child_that_continues_a_prompt(index: Index) -> None:
    parent = add(index, tokens(40))
    add_checkpoint(index, tokens(30), parent)
    forked = [*tokens(30), *tokens(9, first=500)]
    child = add(index, forked, start=30, parent_key=parent)
    parent_id = index.segment_id(parent)
    assert parent_id is not None

    found = index.children(parent_id, TINY.digest, {29: 29, 30: 500})

    assert [row.key for row in found] == [child]
    assert index.num_children(parent_id) == 2


def test_segment_with_a_checkpoint_stays(index: Index) -> None:
    parent = add(index, tokens(40))
    checkpoint = add_checkpoint(index, tokens(30), parent)

    removed = [index.remove_leaf(key) for key in (parent, checkpoint, parent)]

    assert removed == [False, True, True]


def test_checkpoint_goes_with_the_segment_it_hangs_on(index: Index) -> None:
    parent = add(index, tokens(40))
    checkpoint = add_checkpoint(index, tokens(30), parent)

    assert set(index.remove_subtree(parent)) == {parent, checkpoint}
    assert index.segment_keys() == set()


def test_leaves_tell_checkpoints_from_rows(index: Index) -> None:
    parent = add(index, tokens(40))
    checkpoint = add_checkpoint(index, tokens(30), parent)

    leaves = {leaf.key: leaf for leaf in index.leaves()}

    assert [leaves[key].is_checkpoint for key in (parent, checkpoint)] == [False, True]
    assert leaves[checkpoint].parent_id == leaves[parent].id


@pytest.mark.parametrize(
    ("checkpoints", "listed"),
    [
        ({}, {100}),
        ({40: False}, {100}),
        ({40: False, 100: False}, {100}),
        ({40: True}, {40}),
        ({100: True}, {100}),
        ({40: True, 100: True}, {40, 100}),
    ],
    ids=str,
)
def test_rows_are_listed_unless_a_prefix_needs_them(
    index: Index, checkpoints: dict[int, bool], listed: set[int]
) -> None:
    rows = add(index, tokens(100), is_prefix=False)
    for position, is_prefix in checkpoints.items():
        add_checkpoint(index, tokens(position), rows, is_prefix=is_prefix)

    found = [prefix for prefix, _ in index.prefixes.all()]

    assert {prefix.num_tokens for prefix in found} == listed
    assert len(found) == len(listed)
    assert {prefix.key for prefix in found} == {
        expected_key(TINY.digest, tokens(num_tokens)) for num_tokens in listed
    }


def test_segment_with_children_stays(index: Index) -> None:
    parent = add(index, tokens(40))
    child = add(index, tokens(80), start=40)

    removed = [index.remove_leaf(key) for key in (parent, child, parent, parent)]

    assert removed == [False, True, True, False]


def test_pinned_segment_stays(index: Index) -> None:
    key = add(index, tokens(40))
    index.prefixes.set_name(key, "name")

    removed = index.remove_leaf(key)

    assert not removed
    assert index.segment_keys() == {key}


def test_subtree_goes_with_all_that_hangs_on_it(index: Index, path: Path) -> None:
    root = add(index, tokens(40))
    keys = {
        add(index, tokens(80), start=40),
        add(index, [*tokens(80), 1], start=80),
        add(index, [*tokens(80), 2], start=80),
    }

    removed = index.remove_subtree(add(index, [*tokens(40), 99], start=40))
    subtree = index.remove_subtree(next(k for k in keys if index.segment_id(k) == 2))

    assert len(removed) == 1
    assert set(subtree) == keys
    assert index.segment_keys() == {root}
    assert query(path.parent, "SELECT count(*) FROM blocks") == [(1,)]
    assert query(path.parent, "SELECT key FROM prefixes") == [(root,)]


def test_name_moves_to_the_prefix_that_got_it_last(index: Index) -> None:
    first, second = add(index, tokens(40)), add(index, [9, *tokens(40)])

    index.prefixes.set_name(first, "name")
    index.prefixes.set_name(second, "name")

    assert [(pin.name, pin.key) for pin in index.prefixes.pins()] == [("name", second)]


@pytest.mark.parametrize(
    ("cached_tokens", "num_tokens"), [(100, 80), (80, 80), (79, 40), (40, 40), (9, 40)]
)
def test_hit_counts_for_the_prefix_that_was_reused(
    index: Index, cached_tokens: int, num_tokens: int
) -> None:
    keys = [add(index, tokens(40)), add(index, tokens(80), start=40)]

    index.touch(keys, cached_tokens, now=5.0)

    hits = {prefix.num_tokens: prefix.hits for prefix, _ in index.prefixes.all()}
    assert hits == {40: 0, 80: 0} | {num_tokens: 1}
    assert {segment.used_at for segment in index.leaves()} == {5.0}


def test_checkpoints_that_were_passed_count_as_used(index: Index) -> None:
    """What was built, what is listed, and the first boundary; nothing off the way."""
    root = add(index, tokens(100), is_prefix=False)
    child = add(index, [*tokens(80), *tokens(80, first=500)], start=80, parent_key=root)
    worths = [Priority.STEP, Priority.BOUNDARY, Priority.BOUNDARY, Priority.BUILT]
    passed = [
        add_checkpoint(index, tokens(position), root, priority=priority)
        for position, priority in zip((10, 20, 30, 40), worths, strict=True)
    ]
    listed = add_checkpoint(index, tokens(50), root, is_prefix=True)
    add_checkpoint(index, tokens(90), root, priority=Priority.BUILT)

    index.touch_passed([(root, 80), (child, 120)], now=5.0)

    used = {segment.key for segment in index.leaves() if segment.used_at == 5.0}
    assert used == {passed[1], passed[3], listed}


def test_prefixes_are_listed_last_used_first(index: Index) -> None:
    keys = [add(index, [i, *tokens(40)], now=float(i)) for i in range(3)]
    index.touch([keys[0]], 41, now=9.0)

    listed = [prefix.key for prefix, _ in index.prefixes.all()]

    assert listed == [keys[0], keys[2], keys[1]]


def test_leaf_of_an_interrupted_build_counts_as_a_prefix(index: Index) -> None:
    add(index, tokens(40), is_prefix=False)
    key = add(index, tokens(80), start=40, is_prefix=False)

    assert [prefix.key for prefix, _ in index.prefixes.all()] == [key]


def test_model_name_is_the_last_one_it_had(index: Index) -> None:
    renamed = Fingerprint(TINY.digest, "new", "else/where", TINY.parts)
    key = add(index, tokens(40))
    add(index, tokens(80), start=40, model=renamed)
    segment_id = index.segment_id(key)
    assert segment_id is not None

    assert index.fingerprints.of_segment(segment_id) == renamed


def test_room_of_deleted_rows_is_given_back(index: Index, path: Path) -> None:
    keys = [add(index, tokens(500, first=i)) for i in range(100)]
    index.database.shrink()
    before = path.stat().st_size

    for key in keys:
        index.remove_leaf(key)
    index.database.shrink()

    assert path.stat().st_size < before / 2
    assert not path.with_name("index.db-wal").stat().st_size


def test_tables_change_with_their_version_only(tmp_path: Path) -> None:
    Index(tmp_path / "index.db").database.close()
    sql = query(tmp_path, "SELECT sql FROM sqlite_master ORDER BY name")

    found = hashlib.sha256(repr(sql).encode()).hexdigest()[:16]

    # Raise SCHEMA_VERSION with it: an index of another version is built anew.
    assert (SCHEMA_VERSION, found) == (9, "66a1717c1f6552fb")
