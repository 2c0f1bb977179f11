"""`promptcache ls`."""

from typing import TYPE_CHECKING

import click

from promptcache.units import format_size
from promptcache_cli import output
from promptcache_cli.options import open_existing, store_options

if TYPE_CHECKING:
    from promptcache import Prefix


@click.command()
@store_options
def ls(store_path: str | None, json_: bool, quiet: bool) -> None:
    """List prefixes, the last used first

    SIZE is what removing the prefix would free: what it shares with others is
    not counted. The name of a prefix in a namespace, such as a server's API keys
    have, is NAMESPACE/NAME. With --quiet only the keys are printed.

    Example:

    \b
        promptcache ls
        promptcache ls --json | jq '.[] | select(.hits == 0) | .key'
    """
    with open_existing(store_path) as store:
        prefixes = store.prefixes()
        if json_:
            output.json_data([prefix.to_json() for prefix in prefixes])
        elif quiet:
            for prefix in prefixes:
                output.data(prefix.key)
        else:
            _print_table(prefixes)
            used = format_size(store.total_nbytes())
            limit = format_size(store.max_nbytes)
            count = f"{len(prefixes)} prefix{'' if len(prefixes) == 1 else 'es'}"
            output.say(f"{count}, {used} of {limit} used")


def _print_table(prefixes: "list[Prefix]") -> None:
    if not prefixes:
        return
    rows = [
        [
            prefix.key[:12],
            prefix.full_name or "",
            prefix.model,
            prefix.num_tokens,
            format_size(prefix.nbytes),
            prefix.hits,
            output.ago(prefix.used_at),
        ]
        for prefix in prefixes
    ]
    headers = ["KEY", "NAME", "MODEL", "TOKENS", "SIZE", "HITS", "USED"]
    output.table(headers, rows)
