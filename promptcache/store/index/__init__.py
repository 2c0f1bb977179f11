"""The index: what the store has, in SQLite.

All SQL is here, and only SQLite opens the files of a database. Rows are plain values;
files of segments are left to `blobs`.
"""

from promptcache.store.index.database import Database
from promptcache.store.index.index import Index
from promptcache.store.index.schema import SCHEMA_VERSION
from promptcache.store.index.segments import ROOT_ID

__all__ = ["ROOT_ID", "SCHEMA_VERSION", "Database", "Index"]
