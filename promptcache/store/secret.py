"""The secret: what API keys are hashed with, so that a store does not tell them."""

import os

from promptcache.errors import StoreError, warn
from promptcache.files import foreign_access
from promptcache.store.blobs.folder import BlobFolder

SECRET_FILE = "secret"
# Of HMAC's hash.
SECRET_NBYTES = 32


def store_secret(blobs: BlobFolder) -> bytes:
    """Return the secret of a store, which is made when it is first asked for.

    Where it cannot be kept, it is one of this process. Raises StoreError if the file
    holds none, or if others could have put it there.
    """
    try:
        try:
            return _read(blobs)
        except FileNotFoundError:
            return _create(blobs)
    except OSError as error:
        warn(
            f"the store's secret cannot be kept ({error.strerror}): what is cached for "
            "API keys is found until this process ends"
        )
        return os.urandom(SECRET_NBYTES)


def _create(blobs: BlobFolder) -> bytes:
    # Of two processes that start at once, the second finds what the first has made.
    with blobs.files.write_lock():
        try:
            return _read(blobs)
        except FileNotFoundError:
            blobs.files.write_file(SECRET_FILE, os.urandom(SECRET_NBYTES))
            return _read(blobs)


def _read(blobs: BlobFolder) -> bytes:
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
