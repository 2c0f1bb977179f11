"""The folder of a store: its blobs and its index, opened, locked, pruned and verified.

What is found in it, and saved to it, is left to others.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Self, Unpack

from promptcache.errors import DamagedIndexError, StoreError, warn
from promptcache.files import broken_link, foreign_access, lock_file
from promptcache.locks import Limits, Patience
from promptcache.store.blobs.folder import BlobFolder
from promptcache.store.blobs.store_files import StoreFiles
from promptcache.store.index import Database, Index
from promptcache.store.maintenance import prune, rebuild, verify
from promptcache.store.reports import PrunePlan, PrunePolicy, PruneReport, VerifyReport

# What API keys are hashed with, so that a store does not reveal them.
SECRET_FILE = "secret"
# Of HMAC's hash.
SECRET_NBYTES = 32


class LockedError(StoreError):
    """Another process has held a lock for too long."""


class StoreFolder:
    """The files of one store.

    Attributes:
        path: The folder.
        rebuilt: How many segments a new index got back from the blobs.
        patience: How long to wait for other processes.
    """

    def __init__(self, path: Path, patience: Patience | None = None) -> None:
        """Open a folder, creating it where there is none.

        An index that is missing or damaged is rebuilt from the blobs.

        Raises:
            StoreFormatError: A newer promptcache wrote it.
            StoreError: It cannot be opened.
        """
        self.path = path
        self.rebuilt = 0
        self.patience = patience or Patience()
        self._blobs = BlobFolder(path, self.patience)
        self._index = self._new_index()

    @staticmethod
    def is_in(path: Path) -> bool:
        """Return whether there is a store in a folder, perhaps a damaged one."""
        return any(os.path.lexists(path / name) for name in ("index.db", "blobs"))

    def _new_index(self) -> Index:
        return Index(
            self.path / "index.db",
            populate=self._populate,
            opener=self._open_index,
            patience=self.patience,
        )

    def _open_index(self, database: Database) -> None:
        """Open the index, also one that has come in the place of another."""
        self._create_folders()
        if database.is_missing():
            rebuild.create_index(database, self._blobs)
        try:
            database.attempt()
        except DamagedIndexError:
            with self.locked("index"):
                self._recover_index(database)
        except StoreError:
            if not database.is_missing():
                raise
            # Another process puts a new one in its place this moment.
            with self.locked("index"):
                if database.is_missing():
                    rebuild.create_index(database, self._blobs)
                database.attempt()

    def _create_folders(self) -> None:
        try:
            self._blobs.files.create()
        except OSError as error:
            if reason := broken_link(self.path):
                raise StoreError(f"the store {reason}") from error
            if not os.path.exists(self.path / "index.db"):
                raise StoreError(
                    f"the store {self.path} cannot be created ({error.strerror})"
                ) from error

    def _recover_index(self, database: Database) -> None:
        try:
            # Another process may have recovered it while this one waited.
            database.attempt()
        except DamagedIndexError:
            rebuild.quarantine_index(database, self._blobs)
            rebuild.create_index(database, self._blobs)
            database.attempt()

    def _populate(self, index: Index) -> None:
        self.rebuilt += rebuild.rebuild(index, self._blobs)

    @property
    def is_read_only(self) -> bool:
        """Return whether nothing can be saved here."""
        return self._index.database.read_only

    def close(self) -> None:
        """Close the index; the store cannot be used any more.

        What other threads still wait for here fails.
        """
        self.patience.end()
        self._index.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def total_nbytes(self) -> int:
        """Return the size of all files of the store."""
        return self._blobs.files.total_nbytes()

    def secret(self) -> bytes:
        """Return what API keys are hashed with, which is to be shown to nobody.

        It is made when it is first asked for. Raises StoreError.
        """
        return _secret(self._blobs)

    @contextlib.contextmanager
    def locked(self, name: str, **limits: Unpack[Limits]) -> Iterator[None]:
        """Hold a lock of the store. Raises LockedError after some time, StoreError."""
        path = self._blobs.files.lock_path(name)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock_file(path, self.patience, **limits))
            except OSError as error:
                kind = LockedError if isinstance(error, TimeoutError) else StoreError
                raise kind(
                    f"cannot write to the store {self.path} ({error.strerror})"
                ) from error
            yield

    def plan_prune(self, policy: PrunePolicy, *, now: float | None = None) -> PrunePlan:
        """Return what a prune by a policy would remove; nothing is changed.

        Raises StoreError.
        """
        now = time.time() if now is None else now
        self._index.database.refresh()
        return prune.plan_prune(self._index, self._blobs, policy, now=now)

    def execute(self, plan: PrunePlan) -> PruneReport:
        """Do what a plan says, except for what got used or pinned meanwhile.

        Raises:
            StoreError: A file cannot be removed.
        """
        return prune.execute(self._index, self._blobs, plan)

    @staticmethod
    def clear_the_way(path: Path) -> None:
        """Set aside what keeps a store from being opened, such as a link or a folder.

        Raises StoreError.
        """
        try:
            StoreFiles(path).clear_the_way()
        except OSError as error:
            raise StoreError(
                f"the store {path} cannot be mended ({error.strerror})"
            ) from error

    def verify(
        self,
        *,
        fix: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> VerifyReport:
        """Read every blob in full and compare it with its checksums and the index.

        Sound blobs that the index does not know are added to it if their
        ancestors are there.

        Args:
            fix: Set damaged blobs aside and forget the segments that need them.
            progress: Called with the number of blobs checked and their total.

        Raises:
            StoreError: The index cannot be read or written.
        """
        if fix:
            self.clear_the_way(self.path)
        self._replace_unsound_index(self._index.database)
        report = verify.verify(self._index, self._blobs, fix=fix, progress=progress)
        rebuilt, self.rebuilt = self.rebuilt, 0
        return replace(report, rebuilt=report.rebuilt + rebuilt)

    def _replace_unsound_index(self, database: Database) -> None:
        if not verify.is_sound(self._index, self._blobs):
            with self.locked("index"):
                # Another process may have replaced it while this one waited.
                if not database.is_replaced():
                    rebuild.quarantine_index(database, self._blobs)
        database.refresh()


def _secret(blobs: BlobFolder) -> bytes:
    """Return the secret of a store, which is made when it is first asked for.

    Where it cannot be kept, it is one of this process. Raises StoreError if the file
    holds none, or if others could have put it there.
    """
    try:
        try:
            return _read_secret(blobs)
        except FileNotFoundError:
            return _create_secret(blobs)
    except OSError as error:
        warn(
            f"the store's secret cannot be kept ({error.strerror}): what is cached for "
            "API keys is found until this process ends"
        )
        return os.urandom(SECRET_NBYTES)


def _create_secret(blobs: BlobFolder) -> bytes:
    # Of two processes that start at once, the second finds what the first has made.
    with blobs.files.write_lock():
        try:
            return _read_secret(blobs)
        except FileNotFoundError:
            blobs.files.write_file(SECRET_FILE, os.urandom(SECRET_NBYTES))
            return _read_secret(blobs)


def _read_secret(blobs: BlobFolder) -> bytes:
    """Return what the file holds. Raises OSError and StoreError."""
    path = blobs.root / SECRET_FILE
    secret = blobs.files.read_file(SECRET_FILE)
    if reason := foreign_access(path):
        raise StoreError(f"{path} {reason}, remove it")
    if len(secret) != SECRET_NBYTES:
        raise StoreError(
            f"{path} is damaged, remove it: API keys then begin with nothing cached"
        )
    return secret
