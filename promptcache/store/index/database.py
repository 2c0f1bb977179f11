"""The database: one SQLite file that many processes share.

It knows how rows are read and written safely, not what is in them.
"""

import contextlib
import math
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from promptcache.errors import DamagedIndexError, StoreError, StoreFormatError
from promptcache.files import size_of
from promptcache.locks import Holder, Patience, holder_of, told
from promptcache.store.index.connection import (
    Identity,
    code_of,
    connect,
    identity_of,
    is_read_only,
    make_private,
    read_only_options,
    translated,
)
from promptcache.store.index.rows import decoded, decoded_column
from promptcache.store.index.schema import SCHEMA_VERSION, create_tables, has_tables

Result = TypeVar("Result")
# No statement takes this long, unless somebody made it endless: listing 100,000
# prefixes takes a second.
STATEMENT_SECONDS = 60.0
# How often the clock is looked at: about every 5 ms.
STEPS_BETWEEN_LOOKS = 500_000
# What an answer may be delayed by for the sake of its receipt.
BUSY_SECONDS = 0.1
# The bytes of the `-shm` file that whoever writes has locked, and whoever reads; see
# https://sqlite.org/walformat.html#wal_locks.
WRITE_LOCK, READ_LOCKS = (120, 120), (123, 127)
Opener = Callable[["Database"], None]


class Database:
    """The file of the index, and its transactions.

    Invariants:
        Every write happens inside `writing()`.
        Only SQLite opens and closes its files: when a process closes any descriptor of
        a file, POSIX drops all the locks it has there.
        A transaction begins in the file that has the name at that moment.
    """

    def __init__(
        self,
        path: Path,
        opener: "Opener | None" = None,
        patience: Patience | None = None,
    ) -> None:
        """Store the path; `open` opens the file.

        `opener` is called to open it, also when a different file has its name: it
        calls `attempt`, after `create` where there is no file.
        """
        self.path = path
        self.read_only = False
        self._opener = opener or _open_plainly
        self._patience = patience or Patience()
        # The longest wait for another process, None for the usual one.
        self._most: float | None = None
        self._populate: Callable[[], object] = lambda: None
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection
        self._identity: Identity | None = None
        # What was open before: other threads may still read from its cursors.
        self._replaced: sqlite3.Connection | None = None
        # Not before it is open, while it is opened, nor after `close`.
        self._follows = False
        self._ends_at = math.inf

    def open(self, populate: Callable[[], object]) -> None:
        """Open the file, creating it where there is none.

        `populate` is called with new tables before anybody else sees them.

        Raises:
            StoreFormatError: A newer promptcache wrote it.
            DamagedIndexError: It is not a database, or of an older format.
            StoreError: It cannot be opened.
        """
        self._populate = populate
        self._opener(self)
        self._follows = True

    def create(self) -> None:
        """Make an empty file where there is none. Raises StoreError."""
        try:
            connect(self.path, "mode=rwc").close()
        except sqlite3.OperationalError as error:
            raise StoreError(f"the index {self.path} cannot be created") from error

    def attempt(self) -> None:
        """Open the file that is there. Raises as `open` does."""
        connection, identity = self._connect()
        if self._replaced is not None:
            # SQLite leaves the WAL of the file that has the name now alone.
            self._replaced.close()
        self._replaced = getattr(self, "_connection", None)
        self._connection, self._identity = connection, identity
        try:
            with translated():
                self._prepare()
        except BaseException:
            self._identity = None
            connection.close()
            raise

    def _connect(self) -> "tuple[sqlite3.Connection, Identity]":
        while True:
            identity = identity_of(self.path)
            if identity is None:
                raise StoreError(f"the index {self.path} is not there")
            with translated():
                connection = self._opened()
            if identity == identity_of(self.path):
                return connection, identity
            connection.close()

    def _opened(self) -> sqlite3.Connection:
        """Return a connection that has opened the WAL, which goes by its name, too."""
        make_private(self.path)
        self.read_only = is_read_only(self.path)
        options = read_only_options(self.path) if self.read_only else "mode=rw"
        connection = connect(self.path, options)
        connection.set_progress_handler(self._is_endless, STEPS_BETWEEN_LOOKS)
        try:
            with self._lock:
                self._patiently(
                    lambda: connection.execute("PRAGMA user_version").fetchone()
                )
        except BaseException:
            connection.close()
            raise
        return connection

    def is_missing(self) -> bool:
        """Return whether nothing has the file's name."""
        return identity_of(self.path) is None

    def is_replaced(self) -> bool:
        """Return whether the file that is open does not have its name any more."""
        return self._follows and identity_of(self.path) != self._identity

    def refresh(self) -> None:
        """Open the file that has the name now, if it differs. Raises StoreError."""
        if not self.is_replaced():
            return
        with self._lock:
            # Another thread may have opened it, or be inside a transaction.
            if not self._in_transaction and self.is_replaced():
                self._follows, self._identity = False, None
                try:
                    self._opener(self)
                finally:
                    self._follows = True

    @property
    def _in_transaction(self) -> bool:
        return self._identity is not None and self._connection.in_transaction

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Keep others from writing and from folding the WAL in, if it can be opened."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(sqlite3.Error, StoreError), self._lock:
                make_private(self.path)
                connection = connect(self.path, "mode=rw")
                stack.callback(connection.close)
                self._patiently(lambda: connection.execute("BEGIN IMMEDIATE"))
            yield

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

    def close(self) -> None:
        """Close the connection; the last one to do so folds the WAL back in."""
        with self._lock:
            self._follows, self._identity = False, None
            for connection in (self._connection, self._replaced):
                if connection is not None:
                    connection.close()

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
            raise _BusyError

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

    def _patiently(self, act: Callable[[], Result]) -> Result:
        """Try until no other process is at work. Raises StoreError after some time.

        In between, other threads may use the connection, unless a transaction is open.
        """
        try:
            # Almost always enough; a wait takes longer to prepare.
            return self._tried(act)
        except _BusyError:
            pass
        attempts = self._patience.attempts(
            self._writer, most=self._most, sleep=self._sleep
        )
        for _ in attempts:
            with contextlib.suppress(_BusyError):
                return self._tried(act)
        raise StoreError(f"the index is locked by {told(self._writer())}")

    def _tried(self, act: Callable[[], Result]) -> Result:
        self._ends_at = time.monotonic() + STATEMENT_SECONDS
        try:
            return act()
        except sqlite3.OperationalError as error:
            if code_of(error) & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            raise _BusyError from error

    def _writer(self) -> Holder | None:
        return holder_of(Path(f"{self.path}-shm"), *WRITE_LOCK)

    def _sleep(self, seconds: float) -> None:
        self._lock.release()
        try:
            time.sleep(seconds)
        finally:
            self._lock.acquire()

    def execute(self, sql: str, parameters: Sequence[object] = ()) -> sqlite3.Cursor:
        """Run a statement. Raises StoreError."""
        with self._lock, translated():
            return self._patiently(lambda: self._connection.execute(sql, parameters))

    def execute_many(self, sql: str, rows: Iterable[Sequence[object]]) -> None:
        """Run a statement once for each row. Raises StoreError."""
        with self._lock, translated():
            self._ends_at = time.monotonic() + STATEMENT_SECONDS
            self._connection.executemany(sql, rows)

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

    def _is_endless(self) -> bool:
        return time.monotonic() > self._ends_at

    def is_sound(self) -> bool:
        """Return whether SQLite finds its own file sound."""
        try:
            with self._lock, translated():
                self._check_schema()
            is_whole = self.column(str, "PRAGMA quick_check") == ["ok"]
            return is_whole and not self.exists("PRAGMA foreign_key_check")
        except StoreError:
            return False


class _BusyError(Exception):
    pass


def _open_plainly(database: Database) -> None:
    if database.is_missing():
        database.create()
    database.attempt()
