"""Fingerprints: what the KV values of the index's segments depend on."""

import json

from promptcache.segments.fingerprint import Fingerprint
from promptcache.store.index.connection import translated
from promptcache.store.index.database import Database

COLUMNS = "digest, model, source, parts"


class Fingerprints:
    """The fingerprints that something was computed under."""

    def __init__(self, database: Database) -> None:
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
        return self._database.column(int, sql, [fingerprint.digest])[0]

    def of_segment(self, segment_id: int) -> Fingerprint:
        """Return the fingerprint that a segment was computed under."""
        sql = f"""
            SELECT {COLUMNS} FROM fingerprints
            WHERE id = (SELECT fingerprint_id FROM segments WHERE id = ?)
        """
        [fingerprint] = self._select(sql, segment_id)
        return fingerprint

    def of_namespace(self, namespace: str) -> list[Fingerprint]:
        """Return all fingerprints of a namespace that something was computed under."""
        sql = f"SELECT {COLUMNS} FROM fingerprints WHERE namespace = ?"
        return self._select(sql, namespace)

    def _select(self, sql: str, parameter: object) -> list[Fingerprint]:
        fingerprints = self._database.select(Fingerprint, sql, [parameter])
        with translated():
            for fingerprint in fingerprints:
                bytes.fromhex(fingerprint.digest)
        return fingerprints
