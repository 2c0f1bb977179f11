"""The `promptcache` command."""

import sys
from typing import Any

import click

from promptcache import PromptCacheError, __version__
from promptcache_cli import INTERRUPTED, output
from promptcache_cli.commands.batch import batch
from promptcache_cli.commands.build import build
from promptcache_cli.commands.chat import chat
from promptcache_cli.commands.explain import explain
from promptcache_cli.commands.generate import generate
from promptcache_cli.commands.ls import ls
from promptcache_cli.commands.parity import parity
from promptcache_cli.commands.path import path
from promptcache_cli.commands.pin import pin, unpin
from promptcache_cli.commands.prune import prune
from promptcache_cli.commands.rm import rm
from promptcache_cli.commands.serve import serve
from promptcache_cli.commands.show import show
from promptcache_cli.commands.stats import stats
from promptcache_cli.commands.sync import sync
from promptcache_cli.commands.verify import verify


class Group(click.Group):
    """A group whose errors are one line on stderr and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command and exit."""
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except PromptCacheError as error:
            code = _failed(str(error), error.exit_code)
        except click.exceptions.NoArgsIsHelpError as error:
            output.say_text(error.format_message())
            code = error.exit_code
        except click.ClickException as error:
            code = _failed(error.format_message().rstrip("."), error.exit_code)
        except click.Abort:
            output.say("promptcache: interrupted")
            code = INTERRUPTED
        except BrokenPipeError:
            # A reader such as `head` has enough.
            code = 1
        except OSError as error:
            code = _failed(str(error), 1)
        output.end()
        sys.exit(code if isinstance(code, int) else 0)


def _failed(message: str, code: int) -> int:
    output.fail(message)
    return code


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Never wait twice for the same prompt

    promptcache keeps what a language model has read, the KV caches of prompt
    prefixes, on disk, and resumes any later generation from the longest prefix
    it has.

    Example:

    \b
        promptcache build -s @narrator.txt --name narrator
        promptcache generate -s @narrator.txt "I open the door"
        promptcache ls
    """
    output.begin()


COMMANDS = (
    build,
    sync,
    generate,
    batch,
    chat,
    ls,
    show,
    rm,
    pin,
    unpin,
    prune,
    verify,
    explain,
    stats,
    parity,
    serve,
    path,
)
for command in COMMANDS:
    cli.add_command(command)
