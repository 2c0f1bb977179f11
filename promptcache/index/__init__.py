"""What the store knows of its segments and prefixes, in SQLite."""

from promptcache.index.database import Database
from promptcache.index.index import ROOT_ID, Index
from promptcache.index.schema import SCHEMA_VERSION

__all__ = ["ROOT_ID", "SCHEMA_VERSION", "Database", "Index"]
