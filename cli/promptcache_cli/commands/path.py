"""`promptcache path`."""

import click

from promptcache import config
from promptcache_cli import output
from promptcache_cli.options import store_option


@click.command()
@store_option
def path(store_path: str | None) -> None:
    """Print the store's folder

    Example:

    \b
        du -sh "$(promptcache path)"
    """
    output.exact(str(config.store_dir(store_path)))
