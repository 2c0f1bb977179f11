"""`promptcache rm`."""

from typing import TYPE_CHECKING

import click

from promptcache import KeyNotFoundError
from promptcache.units import format_size
from promptcache_cli import output
from promptcache_cli.options import (
    confirm,
    dry_run_option,
    open_existing,
    store_options,
    yes_option,
)

if TYPE_CHECKING:
    from promptcache import Prefix, PrefixStore


@click.command()
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@store_options
@dry_run_option
@yes_option
def rm(
    keys: tuple[str, ...],
    store_path: str | None,
    json_: bool,
    quiet: bool,
    dry_run: bool,
    yes: bool,
) -> None:
    """Remove prefixes by key or name, pinned ones too

    What other prefixes share with them stays.

    Example:

    \b
        promptcache rm 3f9c
        promptcache ls -q | xargs promptcache rm -y
    """
    with open_existing(store_path) as store:
        prefixes = list({p.key: p for p in map(store.resolve, keys)}.values())
        if not dry_run:
            names = ", ".join(p.full_name or p.key[:12] for p in prefixes)
            confirm(f"Remove {names}?", yes=yes)
        planned = {prefix.key: prefix.nbytes for prefix in prefixes}
        removed = planned if dry_run else _remove(store, prefixes)
        freed = sum(removed.values())
        result = {
            "removed": [
                {"key": p.key, "reason": "asked for", "nbytes": removed[p.key]}
                for p in prefixes
            ],
            "freed_nbytes": freed,
            "kept_nbytes": store.total_nbytes(),
            "dry_run": dry_run,
        }
    if json_:
        output.json_data(result)
        return
    for prefix in prefixes:
        output.data(prefix.key)
    verbs = ("Would remove", "free") if dry_run else ("Removed", "freed")
    console = output.Console(quiet=quiet)
    console.info(f"{verbs[0]} {len(prefixes)}, {verbs[1]} {format_size(freed)}")


def _remove(store: "PrefixStore", prefixes: "list[Prefix]") -> dict[str, int]:
    """Return the bytes that each removed prefix freed."""
    freed = {}
    for prefix in prefixes:
        try:
            freed[prefix.key] = store.remove(prefix.key).freed_nbytes
        except KeyNotFoundError:
            # A step on the way to one that was removed before it.
            freed[prefix.key] = 0
    return freed
