"""The database: one SQLite file that many processes share.

It knows how rows are read and written safely, not what is in them.
"""

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import UnionType
from typing import Any

from promptcache.errors import DamagedIndexError, StoreError, StoreFormatError
from promptcache.index.schema import SCHEMA_VERSION, create_tables

# Writers queue behind each other; a save holds the lock for milliseconds.
TIMEOUT_SECONDS = 30
# What an answer may be delayed by for the sake of its receipt.
BUSY_MILLISECONDS = 100

# What values that no promptcache has written lead to.
VALUE_ERRORS = (ArithmeticError, RecursionError, TypeError, ValueError)
DAMAGED = "the index holds what was never written, run `promptcache verify`"


class Database:
    """The file of the index, and its transactions.

    Invariants:
        Every write happens inside `writing()`.
    """

    def __init__(self, path: Path) -> None:
        """Take the file; it is there for use after `open`."""
        self.path = path
        self.read_only = False
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection

    def open(self, populate: Callable[[], object]) -> None:
        """Open the file, creating it where there is none.

        `populate` is called with new tables before anybody else sees them.

        Raises:
            StoreFormatError: A newer promptcache wrote it.
            DamagedIndexError: It is no database, or of an older format.
            StoreError: It cannot be opened.
        """
        self.read_only = False
        with translated():
            self._connection = self._connect()
            try:
                self._prepare(populate)
            except BaseException:
                self._connection.close()
                raise

    def _connect(self) -> sqlite3.Connection:
        try:
            # Created by hand, because SQLite would follow the umask.
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            if os.access(self.path.parent, os.W_OK):
                return _open(self.path, "mode=rw")
        except (OSError, sqlite3.OperationalError) as error:
            if not os.path.exists(self.path):
                raise StoreError(f"the index {self.path} cannot be created") from error
        self.read_only = True
        # `immutable` reads where no -shm file can be made; it must not be used
        # while a WAL holds rows that it would not see.
        wal = self.path.with_name(f"{self.path.name}-wal")
        has_rows = os.path.exists(wal) and wal.stat().st_size
        return _open(self.path, "mode=ro" if has_rows else "immutable=1")

    def _prepare(self, populate: Callable[[], object]) -> None:
        """Check the schema's version, or create the tables."""
        version = self._version()
        if version == SCHEMA_VERSION:
            return
        if version:
            raise DamagedIndexError(f"the index has the older format {version}")
        if self.read_only:
            raise StoreError(f"the index {self.path} is empty and cannot be written")
        # Both have an effect before the first table only. Freed pages can then be
        # given back, and readers never wait for a writer.
        self.execute("PRAGMA auto_vacuum=INCREMENTAL")
        _switch_to_wal(self._connection)
        with self.writing():
            if self._version() < SCHEMA_VERSION:
                create_tables(self._connection)
                populate()
                self.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def _version(self) -> int:
        """Return the schema's version, 0 before there is one."""
        version = int(self.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA_VERSION:
            raise StoreFormatError(
                f"the store {self.path.parent} has format {version} and this "
                f"promptcache reads up to {SCHEMA_VERSION}, upgrade promptcache"
            )
        return version

    def close(self) -> None:
        """Close the connection; the last one to do so folds the WAL back in."""
        with self._lock:
            self._connection.close()

    def shrink(self) -> None:
        """Give the room of deleted rows and of the WAL back to the disk."""
        with self._lock, contextlib.suppress(StoreError), translated():
            # `execute` would take one step, which frees one page.
            self._connection.executescript("PRAGMA incremental_vacuum")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def writing(self) -> AbstractContextManager[None]:
        """Hold the write lock for a transaction. Raises StoreError."""
        return self._transaction("BEGIN IMMEDIATE")

    @contextlib.contextmanager
    def impatient(self) -> Iterator[None]:
        """Fail soon where another process writes, rather than wait for it."""
        with self._lock:
            self.execute(f"PRAGMA busy_timeout={BUSY_MILLISECONDS}")
            try:
                yield
            finally:
                self.execute(f"PRAGMA busy_timeout={TIMEOUT_SECONDS * 1000}")

    def reading(self) -> AbstractContextManager[None]:
        """See one state of the store until the end, whatever others do."""
        return self._transaction("BEGIN")

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        """Commit at the end, or roll back; inside another one, be part of it."""
        with self._lock:
            if self._connection.in_transaction:
                yield
                return
            self.execute(begin)
            try:
                yield
            except BaseException:
                self._connection.rollback()
                raise
            with translated():
                self._connection.commit()

    def execute(self, sql: str, parameters: Sequence[object] = ()) -> sqlite3.Cursor:
        """Run a statement. Raises StoreError."""
        with self._lock, translated():
            return self._connection.execute(sql, parameters)

    def execute_many(self, sql: str, rows: Iterable[Sequence[object]]) -> None:
        """Run a statement once for each row. Raises StoreError."""
        with self._lock, translated():
            self._connection.executemany(sql, rows)

    def rows(
        self, sql: str, parameters: Sequence[object] = ()
    ) -> list[tuple[Any, ...]]:
        """Return all rows of a query, unchecked. Raises StoreError."""
        with self._lock, translated():
            return self._connection.execute(sql, parameters).fetchall()

    def is_sound(self) -> bool:
        """Return whether SQLite finds its own file sound."""
        try:
            return self.rows("PRAGMA quick_check") == [("ok",)]
        except StoreError:
            return False


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise StoreError or DamagedIndexError for what SQLite and its values raise."""
    try:
        yield
    except (sqlite3.OperationalError, sqlite3.ProgrammingError) as error:
        # The latter after `close`.
        raise StoreError(f"the index cannot be used ({error})") from error
    except (sqlite3.DatabaseError, *VALUE_ERRORS) as error:
        raise DamagedIndexError(
            f"the index is damaged ({error}), run `promptcache verify`"
        ) from error
    except sqlite3.Error as error:
        raise StoreError(f"the index cannot be used ({error})") from error


def _open(path: Path, options: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{_quoted(path)}?{options}",
        uri=True,
        timeout=TIMEOUT_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """Turn WAL on, waiting for others: SQLite does not wait for this by itself."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode == sqlite3.SQLITE_BUSY
            if not busy or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _quoted(path: Path) -> str:
    return (
        str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    )


def checked(
    rows: list[tuple[Any, ...]], *kinds: type | UnionType
) -> list[tuple[Any, ...]]:
    """Return rows whose values are of the kinds that were put there.

    SQLite keeps any kind of value in any column. Raises DamagedIndexError.
    """
    for row in rows:
        if not all(map(isinstance, row, kinds)):
            raise DamagedIndexError(DAMAGED)
    return rows


def integer(value: object) -> int:
    """Return a value that must be a number. Raises DamagedIndexError."""
    with translated():
        if not isinstance(value, int):
            raise TypeError(f"{type(value).__name__} in place of a number")
    return value
