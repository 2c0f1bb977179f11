"""`python -m promptcache_cli`."""

from promptcache_cli.main import cli

cli(prog_name="promptcache")
