"""The database: one SQLite file that many processes share.

It knows how rows are read and written safely, not what is in them.
"""

import contextlib
import math
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from promptcache.errors import DamagedIndexError, StoreError, StoreFormatError
from promptcache.files import size_of
from promptcache.locks import Holder, holder_of
from promptcache.store.index.connection import (
    STATEMENT_SECONDS,
    BusyError,
    IndexFile,
    translated,
)
from promptcache.store.index.rows import decoded, decoded_column
from promptcache.store.index.schema import SCHEMA_VERSION, create_tables, has_tables

Result = TypeVar("Result")
# Longest wait for the lock when usage is recorded.
BUSY_SECONDS = 0.1
# The bytes of the `-shm` file that readers have locked; see `connection.WRITE_LOCK`.
READ_LOCKS = (123, 127)


class Database(IndexFile):
    """The file of the index, and its transactions.

    Invariants:
        Every write happens inside `writing()`.
        A transaction begins in the file that has the name at that moment.
    """

    def _prepare(self) -> None:
        version = self._version()
        if version == SCHEMA_VERSION:
            self._check_schema()
            return
        if version:
            raise DamagedIndexError(f"the index has the older format {version}")
        if self.read_only:
            raise StoreError(f"the index {self.path} is empty and cannot be written")
        # Before the first table only. Freed pages can then be given back, and readers
        # never wait for a writer.
        self.execute("PRAGMA auto_vacuum=INCREMENTAL")
        self.execute("PRAGMA journal_mode=WAL").fetchall()
        with self.writing():
            if self._version() < SCHEMA_VERSION:
                create_tables(self._connection)
                self._populate()
                self.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def _check_schema(self) -> None:
        if not self._patiently(lambda: has_tables(self._connection)):
            raise DamagedIndexError(
                "the index has other tables than it should, run `promptcache verify`"
            )

    def _version(self) -> int:
        [version] = self.column(int, "PRAGMA user_version")
        if version > SCHEMA_VERSION:
            raise StoreFormatError(
                f"the store {self.path.parent} has format {version} and this "
                f"promptcache reads up to {SCHEMA_VERSION}, upgrade promptcache"
            )
        return version

    def growth_nbytes(self) -> int:
        """Return by how much the file grows once the WAL is folded in."""
        sizes = (self.column(int, f"PRAGMA page_{of}")[0] for of in ("count", "size"))
        return max(math.prod(sizes) - size_of(self.path), 0)

    def shrink(self) -> None:
        """Give the room of deleted rows and of the WAL back to the disk.

        The wait for a process that writes, or reads what the WAL holds, is short.
        """
        with self.impatient(), contextlib.suppress(StoreError), translated():
            # `execute` would take one step, which frees one page.
            self._patiently(
                lambda: self._connection.executescript("PRAGMA incremental_vacuum")
            )
            self._patiently(self._truncate_wal)

    def _truncate_wal(self) -> None:
        [row] = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        if row[0]:
            raise BusyError

    def reader(self) -> Holder | None:
        """Return a process that keeps the WAL from being emptied, if known."""
        return holder_of(Path(f"{self.path}-shm"), *READ_LOCKS)

    def writing(self) -> AbstractContextManager[None]:
        """Hold the write lock for a transaction.

        Raises StoreError, also where what was written is in a file that has lost its
        name meanwhile.
        """
        return self._transaction("BEGIN IMMEDIATE")

    @contextlib.contextmanager
    def impatient(self) -> Iterator[None]:
        """Wait only briefly for a process that writes."""
        with self._lock:
            self.refresh()
            before, self._most = self._most, BUSY_SECONDS
            try:
                yield
            finally:
                self._most = before

    def reading(self) -> AbstractContextManager[None]:
        """See one state of the store until the end, whatever others do."""
        return self._transaction("BEGIN")

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        """Commit at the end, or roll back; a nested one is part of the outer one."""
        with self._lock:
            if self._in_transaction:
                yield
                return
            self._begin(begin)
            try:
                yield
            except BaseException:
                self._connection.rollback()
                raise
            with translated():
                self._connection.commit()
            if begin != "BEGIN" and self.is_replaced():
                raise StoreError("the index was replaced meanwhile, try again")

    def _begin(self, begin: str) -> None:
        while True:
            self.refresh()
            with translated():
                self._patiently(lambda: self._connection.execute(begin))
            if not self.is_replaced():
                return
            self._connection.rollback()

    def execute(self, sql: str, parameters: Sequence[object] = ()) -> sqlite3.Cursor:
        """Run a statement. Raises StoreError."""
        with self._lock, translated():
            return self._patiently(lambda: self._connection.execute(sql, parameters))

    def execute_many(self, sql: str, rows: Iterable[Sequence[object]]) -> None:
        """Run a statement once for each row. Raises StoreError."""
        with self._lock, translated():
            self._ends_at = time.monotonic() + STATEMENT_SECONDS
            self._connection.executemany(sql, rows)

    def insert(self, table: str, row: Mapping[str, object]) -> int:
        """Add a row, by the names of its columns; return its id. Raises StoreError."""
        names, marks = ", ".join(row), ", ".join("?" * len(row))
        sql = f"INSERT INTO {table} ({names}) VALUES ({marks})"
        row_id = self.execute(sql, [*row.values()]).lastrowid
        assert row_id is not None
        return row_id

    def select(
        self, kind: Callable[..., Result], sql: str, parameters: Sequence[object] = ()
    ) -> list[Result]:
        """Return the rows of a query as values of a class.

        Its columns have the names of the class's fields, in their order. Raises
        StoreError, and DamagedIndexError for values that are not of the fields' types.
        """
        with self._lock, translated():
            names, rows = self._patiently(lambda: self._query(sql, parameters))
        return decoded(kind, names, rows)

    def column(
        self, kind: Callable[..., Result], sql: str, parameters: Sequence[object] = ()
    ) -> list[Result]:
        """Return the only column of a query as values of a type; see `select`."""
        with self._lock, translated():
            _, rows = self._patiently(lambda: self._query(sql, parameters))
        return decoded_column(kind, rows)

    def exists(self, sql: str, parameters: Sequence[object] = ()) -> bool:
        """Return whether a query has rows. Raises StoreError."""
        return self.execute(sql, parameters).fetchone() is not None

    def _query(
        self, sql: str, parameters: Sequence[object]
    ) -> tuple[list[str], list[tuple[Any, ...]]]:
        cursor = self._connection.execute(sql, parameters)
        return [column[0] for column in cursor.description], cursor.fetchall()

    def is_sound(self) -> bool:
        """Return whether SQLite finds its own file sound."""
        try:
            with self._lock, translated():
                self._check_schema()
            is_whole = self.column(str, "PRAGMA quick_check") == ["ok"]
            return is_whole and not self.exists("PRAGMA foreign_key_check")
        except StoreError:
            return False
