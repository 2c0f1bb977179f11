"""`promptcache stats`."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from promptcache.units import format_size
from promptcache_cli import output
from promptcache_cli.options import json_option, open_existing, store_option

if TYPE_CHECKING:
    from promptcache import Usage


@click.command()
@store_option
@json_option
def stats(store_path: str | None, json_: bool) -> None:
    """Show the tokens and seconds saved, by model and prefix

    SAVED is what reading the cached tokens would have taken, at the speed at which
    this machine was seen to read with this model; LOADED is what finding and loading
    them took instead.

    Example:

    \b
        promptcache stats
        promptcache stats --json
    """
    with open_existing(store_path) as store:
        usage = store.usage()
        written = store.written()
    if json_:
        by_model = [_of_model(rows) for rows in _by_model(usage)]
        output.json_data(
            {
                **_sums(usage),
                "written_nbytes": written.total_nbytes,
                "written_today_nbytes": written.today_nbytes,
                "by_model": by_model,
            }
        )
        return
    rows = [row for group in _by_model(usage) for row in _table_rows(group)]
    if rows:
        headers = ["MODEL", "PREFIX", "HITS", "MISSES", "CACHED", "PREFILLED"]
        output.table([*headers, "LOADED", "SAVED"], rows)
    sums = _sums(usage)
    output.say(
        f"{sums['hits']} hits, {sums['misses']} misses, "
        f"{sums['saved_seconds']:.1f} s saved, {sums['load_seconds']:.1f} s loaded, "
        f"{format_size(written.total_nbytes)} written, "
        f"{format_size(written.today_nbytes)} of it today"
    )


def _by_model(usage: "Iterable[Usage]") -> "list[list[Usage]]":
    ordered = sorted(usage, key=lambda u: u.model)
    return [list(group) for _, group in groupby(ordered, key=lambda u: u.model)]


def _sums(usage: "Sequence[Usage]") -> dict[str, Any]:
    def seconds(values: Iterable[float]) -> float:
        return sum(values, 0.0)

    return {
        "hits": sum(u.requests for u in usage if u.key is not None),
        "misses": sum(u.requests for u in usage if u.key is None),
        "cached_tokens": sum(u.cached_tokens for u in usage),
        "prefilled_tokens": sum(u.prefilled_tokens for u in usage),
        "load_seconds": seconds(u.load_seconds for u in usage),
        "prefill_seconds": seconds(u.prefill_seconds for u in usage),
        "saved_seconds": seconds(u.saved_seconds for u in usage),
    }


def _of_model(usage: "Sequence[Usage]") -> dict[str, Any]:
    prefixes = [
        {"key": u.key, "name": u.name, "namespace": u.namespace, **_sums([u])}
        for u in usage
        if u.key is not None
    ]
    return {"model": usage[0].model, **_sums(usage), "by_prefix": prefixes}


def _table_rows(usage: "Sequence[Usage]") -> list[list[object]]:
    return [
        [
            u.model,
            u.full_name or (u.key or "(none)")[:12],
            u.requests if u.key else 0,
            0 if u.key else u.requests,
            u.cached_tokens,
            u.prefilled_tokens,
            f"{u.load_seconds:.1f}s",
            f"{u.saved_seconds:.1f}s",
        ]
        for u in usage
    ]
