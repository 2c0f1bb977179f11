"""Fingerprints: what the KV values of the index's segments depend on."""

import json

from promptcache.segments.fingerprint import Fingerprint
from promptcache.store.index.database import Database, checked, integer, translated


class Fingerprints:
    """The fingerprints that something was computed under."""

    def __init__(self, database: Database) -> None:
        """Take the database that they are in."""
        self._database = database

    def add(self, fingerprint: Fingerprint) -> int:
        """Add a fingerprint, or tell its model's new name; return its id.

        A model that came from nowhere is named after its kind only, so that the name
        and source of the same one in a folder stay.
        """
        self._database.execute(
            """
            INSERT INTO fingerprints (digest, model, source, parts, namespace)
            VALUES (?, ?, ?, ?, ?)
            ON CONFLICT (digest) DO UPDATE
            SET model = excluded.model, source = excluded.source
            WHERE excluded.source IS NOT NULL OR fingerprints.source IS NULL
            """,
            [
                fingerprint.digest,
                fingerprint.model,
                fingerprint.source,
                json.dumps(dict(fingerprint.parts), sort_keys=True),
                fingerprint.namespace,
            ],
        )
        sql = "SELECT id FROM fingerprints WHERE digest = ?"
        return integer(self._database.execute(sql, [fingerprint.digest]).fetchone()[0])

    def of_segment(self, segment_id: int) -> Fingerprint:
        """Return the fingerprint that a segment was computed under."""
        sql = """
            SELECT digest, model, source, parts FROM fingerprints
            WHERE id = (SELECT fingerprint_id FROM segments WHERE id = ?)
        """
        return _fingerprint(*self._database.execute(sql, [segment_id]).fetchone())

    def of_namespace(self, namespace: str) -> list[Fingerprint]:
        """Return all fingerprints of a namespace that something was computed under."""
        rows = self._database.rows(
            "SELECT digest, model, source, parts FROM fingerprints WHERE namespace = ?",
            [namespace],
        )
        return [_fingerprint(*row) for row in rows]


def _fingerprint(
    digest: str, model: str, source: str | None, parts: str
) -> Fingerprint:
    with translated():
        bytes.fromhex(digest)
        decoded = dict(json.loads(parts))
    checked([(digest, model, source)], str, str, str | None)
    return Fingerprint(digest, model, source, decoded)
