"""Forged indexes: values that no promptcache has written."""

import os
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from promptcache import PrefixStore
from promptcache.segments.types import PromptOrigin
from promptcache.store.types import RequestUsage
from tests.helpers.places import IN_MEMORY
from tests.helpers.segments import TINY, save, save_with_checkpoints, tokens

TIMES = int(os.environ.get("FUZZ", "1"))
PROMPT = [i % 250 for i in range(70)]
STATE = [7, *tokens(45)]
ORIGIN = PromptOrigin("template", {"thinking": True}, "system", (("look", "hash"),), 5)
# More is a hang, or memory that no blob of these tests is priority.
MAX_SECONDS, MAX_NBYTES = 20, 4 * 1024**3


def fuzz(examples: int) -> Any:
    """Return the settings of a test: seeded by its code, and printed on failure."""
    return settings(
        max_examples=examples * TIMES,
        deadline=None,
        # The same in each run of `make test` and of `make test-long`.
        derandomize=TIMES <= 3,
        print_blob=True,
        phases=(Phase.explicit, Phase.generate),
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def watched() -> Iterator[None]:
    """Fail what hangs or allocates without measure."""

    def stop(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + MAX_NBYTES, limits[1]))
    signal.alarm(MAX_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def fill(folder: Path) -> None:
    """Fill a store with one of everything."""
    with PrefixStore(folder) as store:
        store.pin(save(store, PROMPT), "name")
        save(store, [*PROMPT[:40], *tokens(20, first=500)])
        save_with_checkpoints(store, STATE, [20])
        fill_history(store)


def fill_history(store: PrefixStore) -> None:
    """Leave something in each table of what happened."""
    key = save(store, [9, *tokens(20)])
    store.segments.set_origin(key, ORIGIN)
    store.remove(key)
    store.segments.set_origin(store.resolve("name").key, ORIGIN)
    store.usage_log.add_speed(TINY, 1000, 0.5)
    store.usage_log.add_load(TINY, 1000, 0.5)
    store.usage_log.record(
        RequestUsage(TINY, store.lookup(PROMPT, TINY), 40, 10, 0.1, 0.1)
    )


@contextmanager
def copied(filled: Path) -> Iterator[tuple[Path, Path]]:
    """Yield a copy of a store, and a folder beside it that must not change."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as place:
        folder, outside = Path(place, "store"), Path(place, "outside")
        shutil.copytree(filled, folder)
        outside.mkdir()
        for name in ("it.safetensors", "precious"):
            (outside / name).write_text("precious")
        yield folder, outside


ODD = st.sampled_from(
    [
        *("", "0", "-1", "3", "1e999", "nan", str(2**63), str(2**64), "9" * 5000),
        *("null", "[]", "{}", "[1]", '{"a": 1}', "true", '"', "[" * 100_000),
        *("../../outside/it", "/etc/passwd", "a" * 32, "\x00", "🦊", "os.system"),
        '{"sliceable": 7}',
        '{"sliceable": [], "needs_checkpoint": {}}',
        '{"0": ["os.system", "rows"]}',
        '{"0": ["KVCache", "rows", 64, 3, {"object": "X", "attributes": {}}]}',
        '{"layers": null}',
    ]
)


TABLES = (
    *("segments", "segments", "prefixes", "blocks", "fingerprints"),
    *("usage", "speeds", "writes", "evictions", "uses", "clock"),
)
VALUES = (
    st.none()
    | st.integers(-(2**63), 2**63 - 1)
    | st.integers(-3, 8)
    | st.floats()
    | st.binary(max_size=200)
    | ODD
)


def forge(connection: sqlite3.Connection, data: st.DataObject) -> None:
    """Put some value into some place of the index."""
    table = data.draw(st.sampled_from(TABLES))
    columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
    column = data.draw(st.sampled_from(columns))
    num_rows = connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    row = data.draw(st.integers(0, max(num_rows - 1, 0)))
    keys = {"blocks": "hash", "writes": "day", "evictions": "key", "uses": "position"}
    key = keys.get(table, "rowid")
    sql = f"""
        UPDATE OR IGNORE {table} SET {column} = ? WHERE {key} =
            (SELECT {key} FROM {table} LIMIT 1 OFFSET {row})
    """
    try:
        connection.execute(sql, [data.draw(VALUES)])
    except (sqlite3.IntegrityError, UnicodeEncodeError):
        return
