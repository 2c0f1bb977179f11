"""`promptcache pin` and `promptcache unpin`."""

from typing import TYPE_CHECKING

import click

from promptcache_cli import output
from promptcache_cli.options import open_existing, store_options

if TYPE_CHECKING:
    from promptcache import Prefix


@click.command()
@click.argument("key")
@click.argument("name")
@store_options
def pin(key: str, name: str, store_path: str | None, json_: bool, quiet: bool) -> None:
    """Name a prefix, so that eviction keeps it

    A name of a different prefix moves to this one. In each namespace, such as a
    server's API keys have, a name means a prefix of its own.

    Example:

    \b
        promptcache pin 3f9c narrator
    """
    with open_existing(store_path) as store:
        prefix = store.pin(key, name)
    _report(
        prefix,
        f"Pinned {prefix.key[:12]} as {prefix.full_name}",
        json_=json_,
        quiet=quiet,
    )


@click.command()
@click.argument("name")
@store_options
def unpin(name: str, store_path: str | None, json_: bool, quiet: bool) -> None:
    """Remove a name, so that its prefix may be evicted

    Example:

    \b
        promptcache unpin narrator
    """
    with open_existing(store_path) as store:
        prefix = store.unpin(name)
    _report(prefix, f"Unpinned {prefix.key[:12]}", json_=json_, quiet=quiet)


def _report(prefix: "Prefix", summary: str, *, json_: bool, quiet: bool) -> None:
    if json_:
        output.json_data(prefix.to_json())
    else:
        output.Console(quiet=quiet).info(summary)
