"""Uses: up to where segments were used when, so that their ends age by themselves."""

from collections.abc import Iterable

from promptcache.segments.types import SegmentSlice
from promptcache.store.index.database import Database, segment_within
from promptcache.store.index.rows import Use


class Uses:
    """The last use of each segment, and earlier ones that reached further."""

    def __init__(self, database: Database) -> None:
        """Take the database that they are in."""
        self._database = database

    def all(self, namespace: str | None = None) -> list[Use]:
        """Return the uses that are known of a namespace, or of all."""
        condition, values = segment_within(namespace)
        sql = f"SELECT segment_id, position, used_at FROM uses WHERE {condition}"
        return self._database.select(Use, sql, values)

    def note(self, slices: Iterable[SegmentSlice], *, now: float) -> None:
        """Note up to where each segment of a match was used."""
        places = [(part.key, part.stop) for part in slices if part.start < part.end]
        with self._database.writing():
            # A use that reached no further counts no more.
            self._database.execute_many(
                "DELETE FROM uses WHERE position <= ?2"
                " AND segment_id = (SELECT id FROM segments WHERE key = ?1)",
                places,
            )
            self._database.execute_many(
                "INSERT INTO uses (segment_id, position, used_at)"
                " SELECT id, ?, ? FROM segments WHERE key = ?",
                [(stop, now, key) for key, stop in places],
            )

    def cut(self, segment_id: int, end: int) -> None:
        """Let what reached further than the new end of a segment count up to there."""
        self._database.execute(
            "INSERT OR REPLACE INTO uses SELECT segment_id, ?2, max(used_at) FROM uses"
            " WHERE segment_id = ?1 AND position >= ?2 GROUP BY segment_id",
            [segment_id, end],
        )
        self._database.execute(
            "DELETE FROM uses WHERE segment_id = ? AND position > ?", [segment_id, end]
        )
