"""JSON forms: what commands print and servers answer, for machines."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from promptcache.reports import Prefix

if TYPE_CHECKING:
    from promptcache.explanation import Explanation


def iso_time(seconds: float) -> str:
    """Return a Unix time as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def of_prefix(prefix: Prefix) -> dict[str, Any]:
    """Return a prefix as JSON shows it."""
    return {
        "key": prefix.key,
        "name": prefix.name,
        "model": prefix.model,
        "num_tokens": prefix.num_tokens,
        "nbytes": prefix.nbytes,
        "created_at": iso_time(prefix.created_at),
        "used_at": iso_time(prefix.used_at),
        "hits": prefix.hits,
        "pinned": prefix.pinned,
        "namespace": prefix.namespace,
    }


def of_explanation(explanation: "Explanation") -> dict[str, Any]:
    """Return an explanation as JSON shows it."""
    return {
        "prompt_tokens": explanation.prompt_tokens,
        "cached_tokens": explanation.cached_tokens,
        "key": explanation.key,
        "divergence": explanation.divergence and asdict(explanation.divergence),
        "is_miss": explanation.is_miss,
        "declined": explanation.declined and asdict(explanation.declined),
        "verdict": explanation.verdict,
    }
