"""Bytes that are not what was written are a miss or a clear error, never more.

`FUZZ` in the environment multiplies how many are tried.
"""

import json
import sqlite3
import warnings
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptcache import CachedGenerator, PrefixStore, PromptCacheError
from promptcache.errors import DamagedBlobError, DamagedIndexError, StoreError
from promptcache.segments.blob_format import _header_checksum, _safetensors_header
from promptcache.segments.types import Match, TensorSpec
from promptcache.store.index import SCHEMA_VERSION
from promptcache.store.reports import PrunePolicy
from promptcache.store.types import RequestUsage
from tests.helpers.forging import (
    ODD,
    ORIGIN,
    PROMPT,
    STATE,
    TABLES,
    copied,
    forge,
    fuzz,
    watched,
)
from tests.helpers.segments import (
    TINY,
    blob_paths,
    check_match,
    save,
    tokens,
    tree_hash,
)


def use(folder: Path, outside: Path) -> None:
    """Do to a store all that reads its files; only errors of ours may come of it."""
    before = tree_hash(outside)
    with watched():
        try:
            store = PrefixStore(folder)
        except StoreError:
            return
        with store:
            for prompt in (PROMPT, STATE):
                read(store, prompt)
            for act in (
                store.prefixes,
                store.usage,
                store.pins,
                lambda: [store.report(p.key) for p in store.prefixes()],
                lambda: store.segments.nearby([9, *PROMPT], TINY, ORIGIN),
                lambda: store.usage_log.estimate(TINY, 100),
                lambda: [store.listed_at(p.key) for p in store.prefixes()],
                lambda: store.usage_log.record(
                    RequestUsage(TINY, Match(), 0, 10, 0.1, 0.1)
                ),
                store.written,
                store.verify,
                lambda: store.verify(fix=True),
                lambda: save(store, [8, *tokens(40)]),
                lambda: store.execute(store.plan_prune(PrunePolicy(max_nbytes=0))),
            ):
                try:
                    act()
                except PromptCacheError:
                    continue
    assert tree_hash(outside) == before


def read(store: PrefixStore, prompt: list[int]) -> None:
    """Take what a store has of a prompt: the right values, or an error."""
    try:
        match = store.lookup(prompt, TINY)
        for part in match.slices:
            # As every load does, which then compares the checksum of the data.
            store.segments.open_blob(part)
            store._blobs.check(part.key)
        assert match.cached_tokens <= len(prompt)
        check_match(store, match, prompt)
        store.usage_log.touch(match)
    except StoreError:
        return


@fuzz(50)
@given(data=st.data())
def test_any_bytes_of_a_blob_may_change(filled: Path, data: st.DataObject) -> None:
    with copied(filled) as (folder, outside):
        path = data.draw(st.sampled_from(sorted(folder.glob("blobs/*/*.safetensors"))))
        damage(path, data)
        if data.draw(st.booleans()):
            # All that is known then comes from the blobs.
            (folder / "index.db").unlink()
        use(folder, outside)


def damage(path: Path, data: st.DataObject) -> None:
    """Change, cut, lengthen or replace some bytes of a file."""
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, max(len(content) - 1, 0)))
        new = data.draw(st.binary(min_size=1, max_size=16))
        kind = data.draw(st.sampled_from(["put", "insert", "cut", "delete"]))
        if kind == "put":
            content[position : position + len(new)] = new
        elif kind == "insert":
            content[position:position] = new
        elif kind == "cut":
            del content[position:]
        else:
            del content[position : position + len(new)]
    path.write_bytes(content)


FIELDS = (
    *("format_version", "key", "start_hash", "fingerprint", "fingerprint_parts"),
    *("model", "source", "start", "end", "is_prefix", "created_at", "resumption"),
    *("priority", "layout", "data_checksum"),
)


def seal(path: Path, changes: dict[str, str], specs: dict[int, TensorSpec]) -> None:
    """Change fields of a header and give it the checksum that goes with them."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    del metadata["checksum"]
    tensors = [TensorSpec(n, t["dtype"], tuple(t["shape"])) for n, t in header.items()]
    tensors = [specs.get(i, spec) for i, spec in enumerate(tensors)]
    metadata |= changes
    metadata["checksum"] = _header_checksum(metadata, tensors)
    path.write_bytes(_safetensors_header(metadata, tensors) + content[8 + length :])


@fuzz(50)
@given(data=st.data())
def test_any_field_of_a_header_may_be_forged(filled: Path, data: st.DataObject) -> None:
    with copied(filled) as (folder, outside):
        path = data.draw(st.sampled_from(sorted(folder.glob("blobs/*/*.safetensors"))))
        names = st.sampled_from(FIELDS)
        seal(path, data.draw(st.dictionaries(names, ODD, min_size=1, max_size=2)), {})
        if data.draw(st.booleans()):
            (folder / "index.db").unlink()
        use(folder, outside)


SPECS = st.builds(
    TensorSpec,
    st.sampled_from(["token_ids", "rows", "logits", "layers.0.keys", "../it"]),
    st.sampled_from(["F32", "U8", "BF16", "U32", "I64", "BOOL"]),
    st.lists(st.integers(0, 2**40), max_size=4).map(tuple),
)


@fuzz(25)
@given(data=st.data())
def test_any_shape_and_dtype_may_be_forged(filled: Path, data: st.DataObject) -> None:
    with copied(filled) as (folder, outside):
        path = data.draw(st.sampled_from(sorted(folder.glob("blobs/*/*.safetensors"))))
        seal(path, {}, data.draw(st.dictionaries(st.integers(0, 2), SPECS, min_size=1)))
        use(folder, outside)


@fuzz(50)
@given(data=st.data())
def test_any_bytes_of_the_index_may_change(filled: Path, data: st.DataObject) -> None:
    with copied(filled) as (folder, outside):
        damage(folder / "index.db", data)
        use(folder, outside)


@fuzz(50)
@given(data=st.data())
def test_any_value_in_the_index_may_change(filled: Path, data: st.DataObject) -> None:
    with copied(filled) as (folder, outside):
        with closing(sqlite3.connect(folder / "index.db")) as connection:
            for _ in range(data.draw(st.integers(1, 3))):
                forge(connection, data)
            connection.commit()
        use(folder, outside)


def test_circle_of_parents_does_not_hang(filled: Path) -> None:
    with copied(filled) as (folder, outside):
        with closing(sqlite3.connect(folder / "index.db")) as connection:
            connection.execute("UPDATE segments SET parent_id = id")
            connection.commit()
        use(folder, outside)


ENDLESS = "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n)"
STATEMENTS = (
    f"CREATE VIEW v AS {ENDLESS} SELECT * FROM n",
    "ALTER TABLE {table} RENAME TO t",
    f"ALTER TABLE {{table}} RENAME TO t; CREATE VIEW {{table}} AS {ENDLESS}"
    " SELECT t.* FROM t, n",
    f"CREATE TRIGGER a AFTER INSERT ON {{table}} BEGIN {ENDLESS}"
    " SELECT count(*) FROM n; END",
    f"CREATE TRIGGER b BEFORE UPDATE ON {{table}} BEGIN {ENDLESS}"
    " SELECT count(*) FROM n; END",
    "CREATE TRIGGER c AFTER DELETE ON {table} BEGIN DELETE FROM segments; END",
    "ALTER TABLE {table} ADD COLUMN g GENERATED ALWAYS AS (hex(zeroblob(1e9)))",
    "ALTER TABLE {table} ADD COLUMN h NOT NULL DEFAULT 1 CHECK (h < 2)",
    "CREATE INDEX e ON {table} (hex(zeroblob(9)))",
    "CREATE TABLE IF NOT EXISTS other (a)",
    "CREATE VIRTUAL TABLE s USING fts5(a)",
    "DROP TABLE {table}",
    "ANALYZE",
)


@fuzz(5)
@given(data=st.data())
def test_any_schema_may_be_forged(filled: Path, data: st.DataObject) -> None:
    with copied(filled) as (folder, outside):
        for _ in range(data.draw(st.integers(1, 2))):
            sql = data.draw(st.sampled_from(STATEMENTS))
            change_schema(folder, sql.format(table=data.draw(st.sampled_from(TABLES))))

        use(folder, outside)


@pytest.mark.parametrize("sql", [s.format(table="segments") for s in STATEMENTS])
def test_schema_that_is_not_ours_is_damage(filled: Path, sql: str) -> None:
    with copied(filled) as (folder, _):
        change_schema(folder, sql)

        with watched(), PrefixStore(folder) as store:
            assert store.rebuilt == 5
            assert store.lookup(PROMPT, TINY).cached_tokens == len(PROMPT)
            assert [entry.name for entry in store.pins()] == ["name"]


def test_another_database_with_our_version_is_damage(filled: Path) -> None:
    with copied(filled) as (folder, _):
        (folder / "index.db").unlink()
        change_schema(
            folder, f"CREATE TABLE t (a); PRAGMA user_version={SCHEMA_VERSION}"
        )

        with PrefixStore(folder) as store:
            assert store.rebuilt == 5


def test_schema_that_is_no_text_is_damage(filled: Path) -> None:
    with copied(filled) as (folder, _):
        path = folder / "index.db"
        data = path.read_bytes()
        assert b"saved_seconds REAL" in data
        path.write_bytes(data.replace(b"saved_seconds REAL", b"saved_second\xff REAL"))

        with PrefixStore(folder) as store:
            assert store.rebuilt == 5


def test_statement_without_an_end_is_ended(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("promptcache.store.index.connection.STATEMENT_SECONDS", 0.2)
    with copied(filled) as (folder, _), PrefixStore(folder) as store:
        change_schema(folder, STATEMENTS[2].format(table="segments"))

        with watched(), pytest.raises(DamagedIndexError, match="takes too long, run"):
            store.prefixes()
        assert store.verify(fix=True).is_sound
        assert store.lookup(PROMPT, TINY).cached_tokens == len(PROMPT)


def change_schema(folder: Path, sql: str) -> None:
    """Run some SQL on an index, as far as it makes sense."""
    with (
        closing(sqlite3.connect(folder / "index.db", isolation_level=None)) as index,
        suppress(sqlite3.Error),
    ):
        index.executescript(sql)
    (folder / "index.db").chmod(0o600)


# With a model: never a wrong token


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory, model_dir: Path
) -> tuple[Path, CachedGenerator, list[int]]:
    """A store with a prefix of a model, the model, and what it answers."""
    folder = tmp_path_factory.mktemp("built") / "store"
    with CachedGenerator.load(model_dir, store=folder, memory_limit=0) as generator:
        generator.build(PROMPT[:66], prefill_step_size=32)
    plain = CachedGenerator(
        generator.model,
        generator.tokenizer,
        reuse=False,
        save=False,
        memory_limit=0,
        identity=generator.identity,
    )
    return folder, plain, answer(plain)


def answer(generator: CachedGenerator) -> list[int]:
    return [r.token for r in generator.stream_generate(PROMPT, 6)]


def check_answer(folder: Path, plain: CachedGenerator, wanted: list[int]) -> None:
    with warnings.catch_warnings(), watched():
        warnings.simplefilter("ignore")
        with CachedGenerator(
            plain.model,
            plain.tokenizer,
            store=folder,
            memory_limit=0,
            identity=plain.identity,
        ) as generator:
            assert answer(generator) == wanted


@fuzz(20)
@given(data=st.data())
def test_no_damage_to_a_blob_makes_a_wrong_token(
    built: tuple[Path, CachedGenerator, list[int]], data: st.DataObject
) -> None:
    folder, plain, wanted = built
    with copied(folder) as (copy, _):
        damage(data.draw(st.sampled_from(sorted(copy.glob("blobs/*/*")))), data)
        check_answer(copy, plain, wanted)


@fuzz(20)
@given(data=st.data())
def test_no_damage_to_the_index_makes_a_wrong_token(
    built: tuple[Path, CachedGenerator, list[int]], data: st.DataObject
) -> None:
    folder, plain, wanted = built
    with copied(folder) as (copy, _):
        with closing(sqlite3.connect(copy / "index.db")) as connection:
            forge(connection, data)
            connection.commit()
        check_answer(copy, plain, wanted)


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE segments SET id = 0 WHERE start = 0",
        "UPDATE segments SET id = 99 WHERE start = 0",
        "UPDATE segments SET parent_id = 0",
        "DELETE FROM segments WHERE start = 0",
        "UPDATE segments SET start = 0, end = end - start",
        "UPDATE segments SET token_ids = zeroblob(length(token_ids))",
    ],
)
def test_rows_that_are_left_out_are_not_taken_for_zeros(
    built: tuple[Path, CachedGenerator, list[int]], sql: str
) -> None:
    folder, plain, wanted = built
    with copied(folder) as (copy, _):
        with closing(sqlite3.connect(copy / "index.db")) as connection:
            connection.execute(sql)
            connection.commit()
        check_answer(copy, plain, wanted)


@fuzz(20)
@given(layout=ODD)
def test_no_forged_layout_breaks_a_generation(
    built: tuple[Path, CachedGenerator, list[int]], layout: str
) -> None:
    folder, plain, wanted = built
    with copied(folder) as (copy, _):
        for path in copy.glob("blobs/*/*"):
            seal(path, {"layout": layout}, {})
        check_answer(copy, plain, wanted)


def test_checksum_is_compared_before_bytes_are_used(
    built: tuple[Path, CachedGenerator, list[int]],
) -> None:
    folder, plain, wanted = built
    with copied(folder) as (copy, _):
        with PrefixStore(copy) as store:
            paths = blob_paths(store)
        for path in paths:
            content = bytearray(path.read_bytes())
            content[-100] ^= 1
            path.write_bytes(content)
        with PrefixStore(copy) as store, pytest.raises(DamagedBlobError):
            store._blobs.check(paths[0].stem)
        check_answer(copy, plain, wanted)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        *[("start", "-1"), ("start", "71"), ("end", str(2**63)), ("end", "nan")],
        *[("fingerprint", "zz"), ("fingerprint", "ab"), ("priority", "9")],
        *[("fingerprint_parts", "[]"), ("fingerprint_parts", '{"a": 1}')],
        *[("created_at", "nan"), ("created_at", "1e999"), ("created_at", "-1")],
        *[("resumption", '{"sliceable": 7}'), ("resumption", '{"more": true}')],
    ],
)
def test_field_of_the_wrong_kind_is_damage(filled: Path, field: str, text: str) -> None:
    with copied(filled) as (folder, _), PrefixStore(folder) as store:
        (part,) = store.lookup(PROMPT, TINY).slices
        path, _header = store.segments.open_blob(part)
        seal(path, {field: text}, {})

        with pytest.raises(DamagedBlobError, match="header cannot be read"):
            store.segments.open_blob(part)
