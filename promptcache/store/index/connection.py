"""The connection: how the index's file is opened, and what SQLite's errors mean."""

import contextlib
import os
import sqlite3
import stat
from contextlib import AbstractContextManager
from pathlib import Path

from promptcache.errors import DamagedIndexError, StoreError
from promptcache.files import PRIVATE_FILE, size_of

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
