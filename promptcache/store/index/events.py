"""The history: what happened to prefixes, which blobs cannot tell again."""

import math
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from promptcache.errors import DamagedIndexError
from promptcache.segments.fingerprint import Fingerprint
from promptcache.store.index.connection import DAMAGED
from promptcache.store.index.database import Database
from promptcache.store.index.fingerprints import Fingerprints
from promptcache.store.index.schema import within
from promptcache.store.reports import Usage, Written
from promptcache.store.types import Eviction, RequestUsage

# So many evictions are remembered of each fingerprint, to say later why a prompt
# missed: of each, so that what others lose makes nobody forget.
MAX_EVICTIONS = 10_000
# What a measured speed still counts for after the next one.
SPEED_DECAY = 0.5
Deed = Literal["prefill", "load"]
DEEDS: tuple[Deed, ...] = ("prefill", "load")


class _EvictionRow(NamedTuple):
    key: str
    end: int
    reason: str
    removed_at: float


class History:
    """Speeds, what requests got, bytes written, and evictions."""

    def __init__(self, database: Database, fingerprints: Fingerprints) -> None:
        self._database = database
        self._fingerprints = fingerprints

    def add_speed(
        self,
        fingerprint: Fingerprint,
        deed: Deed,
        num_tokens: int,
        seconds: float,
        *,
        now: float,
    ) -> None:
        """Note how long it took to do something to so many tokens at once.

        What was noted before counts half as much each time.
        """
        sql = f"""
            INSERT INTO speeds (fingerprint_id, deed, num_tokens, seconds, measured_at)
            VALUES (?, ?, ?, ?, ?)
            ON CONFLICT (fingerprint_id, deed) DO UPDATE SET
                num_tokens = num_tokens * {SPEED_DECAY} + excluded.num_tokens,
                seconds = seconds * {SPEED_DECAY} + excluded.seconds,
                measured_at = excluded.measured_at
        """
        with self._database.writing():
            fingerprint_id = self._fingerprints.add(fingerprint)
            self._database.execute(
                sql, [fingerprint_id, deed, num_tokens, seconds, now]
            )

    def speed(
        self, fingerprint: str, deed: Deed, *, now: float, since: float = 0.0
    ) -> float | None:
        """Return how many tokens a second it takes, or None if that is not known.

        Args:
            fingerprint: What the tokens' KV values depend on.
            deed: What is done to them.
            now: Unix time; measured later, by a clock that was ahead, it counts as
                not known.
            since: Measured before, it does neither.
        """
        sql = """
            SELECT num_tokens / seconds FROM speeds
            JOIN fingerprints f ON f.id = fingerprint_id
            WHERE digest = ? AND deed = ? AND measured_at BETWEEN ? AND ?
        """
        speeds = self._database.column(float, sql, [fingerprint, deed, since, now])
        if not all(0 < speed < math.inf for speed in speeds):
            raise DamagedIndexError(DAMAGED)
        return next(iter(speeds), None)

    def add_receipt(
        self, receipt: RequestUsage, key: str | None, saved_seconds: float
    ) -> None:
        """Add what a request got to what is known of a prefix, or of misses."""
        columns = (
            "requests, cached_tokens, prefilled_tokens, load_seconds, prefill_seconds, "
            "saved_seconds"
        )
        sums = ", ".join(f"{c} = {c} + excluded.{c}" for c in columns.split(", "))
        sql = f"""
            INSERT INTO usage (fingerprint_id, key, {columns})
            VALUES (?, ?, 1, ?, ?, ?, ?, ?)
            ON CONFLICT (fingerprint_id, key) DO UPDATE SET {sums}
        """
        figures = [
            receipt.cached_tokens,
            receipt.prefilled_tokens,
            receipt.load_seconds,
            receipt.prefill_seconds,
            saved_seconds,
        ]
        with self._database.writing():
            fingerprint_id = self._fingerprints.add(receipt.fingerprint)
            self._database.execute(sql, [fingerprint_id, key or "", *figures])

    def usage(self, namespace: str | None = None) -> list[Usage]:
        """Return what requests of a namespace, or of all, got, the most saved first."""
        condition, values = within(namespace, "f")
        sql = f"""
            SELECT f.model, NULLIF(u.key, '') AS key, p.name, u.requests,
                u.cached_tokens, u.prefilled_tokens, u.load_seconds, u.prefill_seconds,
                u.saved_seconds, f.namespace
            FROM usage u JOIN fingerprints f ON f.id = u.fingerprint_id
            LEFT JOIN prefixes p ON p.key = u.key
            WHERE {condition}
            ORDER BY u.saved_seconds DESC, u.key
        """
        return self._database.select(Usage, sql, values)

    def add_written(self, nbytes: int, *, now: float) -> None:
        """Note that so many bytes of a blob were written."""
        sql = """
            INSERT INTO writes (day, nbytes) VALUES (?, ?)
            ON CONFLICT (day) DO UPDATE SET nbytes = nbytes + excluded.nbytes
        """
        with self._database.writing():
            self._database.execute(sql, [_day(now), nbytes])

    def written(self) -> Written:
        """Return how many bytes of blobs were written, in all and today."""
        sql = """
            SELECT coalesce(sum(nbytes), 0) AS total_nbytes,
                coalesce(sum(nbytes) FILTER (WHERE day = ?), 0) AS today_nbytes
            FROM writes
        """
        [written] = self._database.select(Written, sql, [_day(time.time())])
        return written

    def note_eviction(
        self, segment_key: str, keys: Mapping[int, str], reason: str, *, now: float
    ) -> None:
        """Remember that a segment is being taken away, and why.

        `keys` are those of the prefixes that it is needed for, by their ends.
        """
        add = """
            INSERT INTO evictions
                (fingerprint_id, number, key, end, reason, removed_at)
            SELECT fingerprint_id, 1 + coalesce(
                (SELECT max(number) FROM evictions e
                WHERE e.fingerprint_id = s.fingerprint_id), 0), ?, ?, ?, ?
            FROM segments s WHERE key = ?
        """
        forget = """
            WITH own(id) AS (SELECT fingerprint_id FROM segments WHERE key = ?)
            DELETE FROM evictions WHERE fingerprint_id = (SELECT id FROM own)
            AND number <= (
                SELECT max(number) FROM evictions
                WHERE fingerprint_id = (SELECT id FROM own)
            ) - ?
        """
        with self._database.writing():
            for end, key in keys.items():
                self._database.execute(add, [key, end, reason, now, segment_key])
            self._database.execute(forget, [segment_key, MAX_EVICTIONS])

    def evictions(self, fingerprint: str) -> Iterator[tuple[str, Eviction]]:
        """Yield the keys of what was taken away, the longest prefixes first."""
        sql = """
            SELECT e.key, e.end, e.reason, e.removed_at FROM evictions e
            JOIN fingerprints f ON f.id = e.fingerprint_id
            WHERE f.digest = ? ORDER BY e.end DESC, e.number DESC
        """
        for row in self._database.select(_EvictionRow, sql, [fingerprint]):
            if row.end < 0:
                raise DamagedIndexError(DAMAGED)
            yield row.key, Eviction(*row[1:])


def _day(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).date().isoformat()
