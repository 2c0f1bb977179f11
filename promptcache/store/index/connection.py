"""The connection: how the index's file is opened, and what SQLite's errors mean."""

import contextlib
import math
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from promptcache.errors import DamagedIndexError, StoreError
from promptcache.files import PRIVATE_FILE, size_of
from promptcache.locks import Holder, Patience, holder_of, told

Result = TypeVar("Result")
# No statement takes this long, unless somebody made it endless: listing 100,000
# prefixes takes a second.
STATEMENT_SECONDS = 60.0
# How often the clock is looked at: about every 5 ms.
STEPS_BETWEEN_LOOKS = 500_000
# The bytes of the `-shm` file that whoever writes has locked; see
# https://sqlite.org/walformat.html#wal_locks.
WRITE_LOCK = (120, 120)
Opener = Callable[[Any], None]

# What values that no promptcache has written lead to.
VALUE_ERRORS = (ArithmeticError, RecursionError, TypeError, ValueError)
# The device and the number of a file.
Identity = tuple[int, int]
MEND = "run `promptcache verify`"
DAMAGED = f"the index holds what was never written, {MEND}"
# What SQLite keeps beside a database.
BESIDE = ("-wal", "-shm", "-journal")


class _Translation:
    """Raises an error of promptcache for what SQLite and its values raise.

    A class, because every statement goes through it.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, (sqlite3.Error, *VALUE_ERRORS)):
            raise _translation_of(error) from error


_TRANSLATION = _Translation()


def translated() -> AbstractContextManager[None]:
    """Raise StoreError or DamagedIndexError for what SQLite and its values raise."""
    return _TRANSLATION


def _translation_of(error: Exception) -> StoreError:
    if isinstance(error, sqlite3.OperationalError | sqlite3.ProgrammingError):
        # The latter after `close`.
        if code_of(error) == sqlite3.SQLITE_INTERRUPT:
            return DamagedIndexError(f"the index takes too long, {MEND}")
        if isinstance(error, sqlite3.OperationalError) and not code_of(error):
            # Not from SQLite: a text that is not UTF-8.
            return DamagedIndexError(f"the index is damaged, {MEND}")
        return StoreError(f"the index cannot be used ({error})")
    if isinstance(error, (sqlite3.DatabaseError, *VALUE_ERRORS)):
        return DamagedIndexError(f"the index is damaged ({error}), {MEND}")
    return StoreError(f"the index cannot be used ({error})")


def code_of(error: sqlite3.Error) -> int:
    """Return SQLite's code of an error, 0 for one that comes from Python."""
    return int(getattr(error, "sqlite_errorcode", 0))


def identity_of(path: Path) -> Identity | None:
    """Return which file has a name, or None. Raises StoreError if that is unknown."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreError(f"the index cannot be used ({error.strerror})") from error
    return status.st_dev, status.st_ino


def make_private(path: Path) -> None:
    """Make the file of a database private.

    Raises DamagedIndexError for what is not a file: SQLite would wait for a pipe.
    """
    for place in (Path(f"{path}{suffix}") for suffix in ("", *BESIDE)):
        with contextlib.suppress(OSError):
            mode = place.lstat().st_mode
            if not stat.S_ISREG(mode):
                raise DamagedIndexError(f"{place} is not a file, {MEND}")
            if place == path and stat.S_IMODE(mode) != PRIVATE_FILE:
                # SQLite follows the umask; its other files get this one's mode.
                place.chmod(PRIVATE_FILE)


def is_read_only(path: Path) -> bool:
    """Return whether a database can only be read."""
    return not all(os.access(place, os.W_OK) for place in (path.parent, path))


def read_only_options(path: Path) -> str:
    """Return how to open a database that can only be read.

    `immutable` reads where no -shm file can be made; it must not be used while a WAL
    holds rows that it would not see.
    """
    return "mode=ro" if size_of(Path(f"{path}-wal")) else "immutable=1"


def connect(path: Path, options: str) -> sqlite3.Connection:
    """Open a database, with `options` of SQLite's URIs."""
    connection = sqlite3.connect(
        f"file:{_quoted(path)}?{options}",
        uri=True,
        # SQLite's own wait cannot be interrupted.
        timeout=0,
        isolation_level=None,
        check_same_thread=False,
    )
    # What a forged schema calls does nothing but compute.
    connection.execute("PRAGMA trusted_schema=OFF")
    # What is deleted is overwritten: token ids are text.
    connection.execute("PRAGMA secure_delete=ON")
    return connection


def _quoted(path: Path) -> str:
    return (
        str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    )


class BusyError(Exception):
    """Another process is at work."""


class IndexFile:
    """The file of a database, opened, and opened again when it is replaced.

    `opener` is called to open it, also when a different file has its name: it calls
    `attempt`, after `create` where there is no file.

    Invariants:
        Only SQLite opens and closes its files: when a process closes any descriptor of
        a file, POSIX drops all the locks it has there.
    """

    def __init__(
        self,
        path: Path,
        opener: "Opener | None" = None,
        patience: Patience | None = None,
    ) -> None:
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
            try:
                with translated():
                    connection = self._opened()
            except StoreError:
                if identity_of(self.path) in (identity, None):
                    raise
                # It was replaced before it could be opened.
                continue
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

    def close(self) -> None:
        """Close the connection; the last one to do so folds the WAL back in."""
        with self._lock:
            self._follows, self._identity = False, None
            for connection in (self._connection, self._replaced):
                if connection is not None:
                    connection.close()

    def _patiently(self, act: Callable[[], Result]) -> Result:
        """Try until no other process is at work. Raises StoreError after some time.

        In between, other threads may use the connection, unless a transaction is open.
        """
        try:
            # Almost always enough; a wait takes longer to prepare.
            return self._tried(act)
        except BusyError:
            pass
        attempts = self._patience.attempts(
            self._writer, most=self._most, sleep=self._sleep
        )
        for _ in attempts:
            with contextlib.suppress(BusyError):
                return self._tried(act)
        raise StoreError(f"the index is locked by {told(self._writer())}")

    def _tried(self, act: Callable[[], Result]) -> Result:
        self._ends_at = time.monotonic() + STATEMENT_SECONDS
        try:
            return act()
        except sqlite3.OperationalError as error:
            if code_of(error) & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            raise BusyError from error

    def _writer(self) -> Holder | None:
        return holder_of(Path(f"{self.path}-shm"), *WRITE_LOCK)

    def _sleep(self, seconds: float) -> None:
        self._lock.release()
        try:
            time.sleep(seconds)
        finally:
            self._lock.acquire()

    def _is_endless(self) -> bool:
        return time.monotonic() > self._ends_at

    def _prepare(self) -> None:
        """Check the tables of the file that was opened, or create them."""
        raise NotImplementedError


def _open_plainly(file: IndexFile) -> None:
    if file.is_missing():
        file.create()
    file.attempt()
