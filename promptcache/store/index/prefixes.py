"""Prefixes: what was built or saved, by key and by name."""

import json
from dataclasses import asdict
from typing import NamedTuple

from promptcache.segments.types import PromptOrigin
from promptcache.store.index.database import Database
from promptcache.store.index.rows import HeldEnd, PrefixRow, PromptRow
from promptcache.store.index.schema import NO_TOKEN, segment_within, within
from promptcache.store.reports import Prefix


class _ListedPrefix(NamedTuple):
    key: str
    name: str | None
    model: str
    num_tokens: int
    nbytes: int
    created_at: float
    used_at: float
    hits: int
    namespace: str
    segment_id: int


class Prefixes:
    """The prefixes that are listed, each with the segment it ends in."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self, namespace: str | None = None) -> list[tuple[Prefix, int]]:
        """Return the prefixes of a namespace, or of all, each with its segment's id.

        The last used come first. The end of rows that no prefix needs, left by an
        interrupted build, counts as one. `nbytes` is not known here and 0.
        """
        condition, values = within(namespace, "f")
        sql = f"""
            SELECT p.key, p.name, f.model, p.num_tokens, 0 AS nbytes, p.created_at,
                p.used_at, p.hits, f.namespace, p.segment_id
            FROM prefixes p JOIN segments s ON s.id = p.segment_id
            JOIN fingerprints f ON f.id = s.fingerprint_id
            WHERE {condition}
            UNION ALL
            SELECT s.key, NULL, f.model, s.end, 0, s.created_at, s.used_at, 0,
                f.namespace, s.id
            FROM segments s JOIN fingerprints f ON f.id = s.fingerprint_id
            WHERE {condition} AND s.first_token != ?
            AND NOT EXISTS (
                SELECT 1 FROM segments c WHERE c.parent_id = s.id
                AND (c.first_token != ? OR c.id IN (SELECT segment_id FROM prefixes))
            )
            AND NOT EXISTS (SELECT 1 FROM prefixes p WHERE p.segment_id = s.id)
            ORDER BY 7 DESC, 1
        """
        marks = [*values, *values, NO_TOKEN, NO_TOKEN]
        rows = self._database.select(_ListedPrefix, sql, marks)
        return [(Prefix(*row[:-1]), row.segment_id) for row in rows]

    def listed(self) -> list[PrefixRow]:
        """Return the prefixes that were built or saved, by key."""
        return self._listed("1", [])

    def pins(self, namespace: str | None = None) -> list[PrefixRow]:
        """Return the prefixes of a namespace, or of all, that have a name, by key."""
        condition, values = within(namespace, "p")
        return self._listed(f"p.name IS NOT NULL AND {condition}", values)

    def _listed(self, condition: str, values: list[str]) -> list[PrefixRow]:
        sql = f"""
            SELECT p.key, s.key AS segment_key, p.num_tokens, p.name, p.manifest,
                p.namespace
            FROM prefixes p JOIN segments s ON s.id = p.segment_id
            WHERE {condition} ORDER BY p.key
        """
        return self._database.select(PrefixRow, sql, values)

    def prompts(self, namespace: str) -> list[PromptRow]:
        """Return what was built or saved in a namespace, the last used first."""
        sql = """
            SELECT p.key, f.digest AS fingerprint, p.segment_id, p.num_tokens, p.origin
            FROM prefixes p JOIN segments s ON s.id = p.segment_id
            JOIN fingerprints f ON f.id = s.fingerprint_id
            WHERE f.namespace = ? ORDER BY p.used_at DESC, p.key
        """
        return self._database.select(PromptRow, sql, [namespace])

    def ends(self, namespace: str | None = None) -> list[HeldEnd]:
        """Return where the listed prefixes of a namespace, or of all, end."""
        condition, values = segment_within(namespace)
        sql = f"""
            SELECT segment_id, num_tokens AS position, name IS NOT NULL AS pinned
            FROM prefixes WHERE {condition}
        """
        return self._database.select(HeldEnd, sql, values)

    def created_at(self, key: str) -> float | None:
        """Return when a prefix was listed, or None if it is not."""
        sql = "SELECT created_at FROM prefixes WHERE key = ?"
        return next(iter(self._database.column(float, sql, [key])), None)

    def heads(self, segment_key: str) -> set[int]:
        """Return where the first users' texts begin in the prompts that end there."""
        sql = """
            SELECT DISTINCT coalesce(json_extract(origin, '$.head'), 0) FROM prefixes
            WHERE segment_id = (SELECT id FROM segments WHERE key = ?)
        """
        return set(self._database.column(int, sql, [segment_key])) - {0}

    def add(self, key: str, segment_id: int, num_tokens: int, *, now: float) -> bool:
        """List a prefix, and return whether it was not listed already."""
        sql = """
            INSERT INTO prefixes
                (key, segment_id, num_tokens, created_at, used_at, hits, namespace)
            SELECT ?, s.id, ?, ?, ?, 0, f.namespace
            FROM segments s JOIN fingerprints f ON f.id = s.fingerprint_id
            WHERE s.id = ?
            ON CONFLICT (key) DO NOTHING
        """
        with self._database.writing():
            cursor = self._database.execute(
                sql, [key, num_tokens, now, now, segment_id]
            )
            return cursor.rowcount > 0

    def remove(self, key: str) -> None:
        """Stop listing a prefix; its segments stay."""
        with self._database.writing():
            self._database.execute("DELETE FROM prefixes WHERE key = ?", [key])

    def set_name(
        self, key: str, name: str | None, *, manifest: str | None = None
    ) -> None:
        """Name a listed prefix, or take its name away.

        Another prefix of its namespace loses the name. `manifest` is the file that
        wants it so, if any.
        """
        with self._database.writing():
            if name is not None:
                sql = """
                    UPDATE prefixes SET name = NULL, manifest = NULL WHERE name = ?
                    AND namespace = (SELECT namespace FROM prefixes WHERE key = ?)
                """
                self._database.execute(sql, [name, key])
            sql = "UPDATE prefixes SET name = ?, manifest = ? WHERE key = ?"
            self._database.execute(sql, [name, manifest, key])

    def set_origin(self, key: str, origin: PromptOrigin) -> None:
        """Note how a listed prefix was rendered."""
        with self._database.writing():
            sql = "UPDATE prefixes SET origin = ? WHERE key = ?"
            self._database.execute(sql, [json.dumps(asdict(origin)), key])
