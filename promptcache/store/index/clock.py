"""The clock: when segments were used, in an order that no wrong clock upsets.

Eviction goes by the time of the last use. The machine's clock may have been ahead then,
or behind: what is noted here never goes back, and a time that turns out to have been
ahead is taken back to now.
"""

import time
from collections.abc import Iterable

from promptcache.segments.types import SegmentSlice
from promptcache.store.index.database import Database
from promptcache.store.index.rows import Use
from promptcache.store.index.schema import segment_within

# Nobody has used promptcache before (1 November 2026): a clock that says so is wrong.
# Boards without a battery start in 1970.
BEGINNING = 1_793_491_200.0
# Clocks are set back by this much to be right; nothing is taken back for it.
DRIFT_SECONDS = 60.0
# The order of times that are taken back is kept within this much.
SQUEEZED_SECONDS = 1.0
# What a float of a Unix time tells apart, and some.
TICK_SECONDS = 1e-6
TIMES = (
    ("segments", "used_at"),
    ("segments", "created_at"),
    ("uses", "used_at"),
    ("prefixes", "used_at"),
    ("prefixes", "created_at"),
)
UNION = " UNION ALL ".join(
    f"SELECT max({column}) AS used_at FROM {table}" for table, column in TIMES
)


class Clock:
    """The time of a store, which all of its processes share."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def time(self) -> float:
        """Return the Unix time, later than all that was noted unless that was ahead."""
        now, last = time.time(), self._last()
        if now < BEGINNING or last - DRIFT_SECONDS < now <= last:
            return max(now, last + TICK_SECONDS)
        return now

    def now(self) -> float:
        """Return the Unix time, and note it."""
        with self._database.writing():
            now = self.time()
            if now < self._last():
                self.take_back(now)
            sql = "INSERT OR REPLACE INTO clock (id, noted_at) VALUES (0, ?)"
            self._database.execute(sql, [now])
        return now

    def settle(self) -> None:
        """Take back what was noted as later than now, whoever did so."""
        latest = f"SELECT used_at FROM ({UNION}) WHERE used_at IS NOT NULL"
        now = self.now()
        if any(at > now for at in self._database.column(float, latest)):
            self.take_back(now)

    def _last(self) -> float:
        return max(
            self._database.column(float, "SELECT noted_at FROM clock"), default=0
        )

    def take_back(self, now: float) -> None:
        """Set times that are later than now to just before it, in the same order."""
        with self._database.writing():
            for table, column in TIMES:
                sql = f"""
                    WITH ahead(latest) AS (SELECT max({column}) FROM {table})
                    UPDATE {table} SET {column} = ?1 - ?2
                        * ((SELECT latest FROM ahead) - {column})
                        / ((SELECT latest FROM ahead) - ?1)
                    WHERE {column} > ?1
                """
                self._database.execute(sql, [now - TICK_SECONDS, SQUEEZED_SECONDS])


class Uses:
    """The last use of each segment, and earlier ones that reached further."""

    def __init__(self, database: Database) -> None:
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
        """Count what reached further than the new end of a segment up to there."""
        self._database.execute(
            "INSERT OR REPLACE INTO uses SELECT segment_id, ?2, max(used_at) FROM uses"
            " WHERE segment_id = ?1 AND position >= ?2 GROUP BY segment_id",
            [segment_id, end],
        )
        self._database.execute(
            "DELETE FROM uses WHERE segment_id = ? AND position > ?", [segment_id, end]
        )
