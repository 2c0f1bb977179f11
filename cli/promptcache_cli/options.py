"""Options that several commands share."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from promptcache import PromptCacheError, StoreError, UsageError, config
from promptcache.locks import Patience
from promptcache.printable import printable
from promptcache.prompts.parts import parse_json, parse_objects
from promptcache.units import parse_age, parse_size
from promptcache_cli import output

if TYPE_CHECKING:
    from promptcache import CachedGenerator, PrefixStore

# How long a command that people wait for waits for another process.
COMMAND_SECONDS = 60.0

# Of `CachedGenerator.load`.
ARGUMENT_BY_OPTION = {
    "adapter_path": "adapter_path",
    "store_path": "store",
    "max_size": "max_nbytes",
    "daily_writes": "max_daily_nbytes",
}
# Shows the default where there is one.
option = partial(click.option, show_default=True)
F = TypeVar("F", bound=Callable[..., Any])


class Parsed(click.ParamType[Any]):
    """A value that a function of the library reads, with its error message."""

    def __init__(self, name: str, convert: Callable[[str], Any]) -> None:
        self.name = name
        self._convert = convert

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        try:
            return self._convert(value) if isinstance(value, str) else value
        except PromptCacheError as error:
            self.fail(str(error), param, ctx)


def checked_text(text: str) -> str:
    """Return text. Raises UsageError for bytes that were not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError("the input is not UTF-8 text") from error
    return text


def read_text(text: str) -> str:
    """Return text, or the content of `@FILE`, or stdin for `-`."""
    return read_file(text[1:]) if text.startswith("@") else read_prompt(text)


def read_prompt(text: str) -> str:
    """Return text, or stdin for `-`; a prompt may begin with `@`."""
    return read_file("-") if text == "-" else checked_text(text)


def read_file(path: str) -> str:
    """Return a file's text, stdin's for `-`.

    Raises:
        UsageError: It cannot be read, or is not text.
    """
    try:
        if path == "-":
            return checked_text(stdin().read())
        return Path(path).read_text("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        name = "stdin" if path == "-" else path
        raise UsageError(f"{name} is not UTF-8 text") from error


def stdin() -> TextIO:
    """Return stdin. Raises UsageError if it is closed."""
    if sys.stdin is None:
        raise UsageError("cannot read stdin: it is closed")
    return sys.stdin


def read_json_object(text: str) -> dict[str, Any]:
    """Return a JSON object from text or `@FILE`. Raises UsageError for other values."""
    value = parse_json(read_text(text), "this")
    if not isinstance(value, dict):
        raise UsageError("this must be a JSON object")
    return value


def read_json_list(path: str) -> list[dict[str, Any]]:
    """Return a JSON list of objects from a file. Raises UsageError for other values."""
    return parse_objects(read_file(path), path)


SIZE = Parsed("size", parse_size)
AGE = Parsed("age", parse_age)
PROMPT = Parsed("prompt", read_prompt)
TEXT = Parsed("text", read_text)
TEXT_FILE = Parsed("file", read_file)
JSON_FILE = Parsed("file", read_json_list)
JSON_OBJECT = Parsed("json", read_json_object)

store_option = option(
    "--store",
    "store_path",
    type=click.Path(file_okay=False),
    metavar="DIRECTORY",
    help="Folder of the store  [env: PROMPTCACHE_DIR]",
)
max_size_option = option(
    "--max-size",
    type=SIZE,
    help="Most bytes for the whole store, such as 20GB  [env: PROMPTCACHE_MAX_SIZE; "
    "default: 10GB]",
)
daily_writes_option = option(
    "--daily-writes",
    type=SIZE,
    help="Most bytes to write in a day, to spare the drive  "
    "[env: PROMPTCACHE_DAILY_WRITES; default: no limit]",
)
json_option = option("--json", "json_", is_flag=True, help="Print JSON")
quiet_option = option(
    "-q", "--quiet", is_flag=True, help="Print data, warnings and errors only"
)
dry_run_option = option(
    "-n", "--dry-run", is_flag=True, help="Show what would be done and do nothing"
)
yes_option = option("-y", "--yes", is_flag=True, help="Don't ask for confirmation")
draft_option = option("--draft-model", help="A smaller model for speculative decoding")


def option_group(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Return one decorator that adds several options, in the order of the help."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


store_options = option_group(store_option, json_option, quiet_option)
limit_options = option_group(max_size_option, daily_writes_option)
save_options = option_group(store_option, limit_options, json_option, quiet_option)
model_options = option_group(
    option(
        "-m",
        "--model",
        help="Folder or Hugging Face repository  [env: PROMPTCACHE_MODEL; "
        "default: SmolLM2-135M-Instruct]",
    ),
    option("--adapter-path", metavar="DIRECTORY", help="Folder of a LoRA adapter"),
)
system_option = option("-s", "--system", type=TEXT, help="System prompt, or @FILE")
template_options = option_group(
    option("--tools", type=JSON_FILE, help="Tools, a JSON list of objects"),
    option(
        "--chat-template-config",
        type=JSON_OBJECT,
        help="Arguments of the chat template, a JSON object, or @FILE",
    ),
)
store_bits_option = option(
    "--store-bits",
    type=click.Choice(("8", "4")),
    callback=lambda ctx, param, value: value and int(value),
    help="Store keys and values in fewer bits, with a small loss",
)
quantization_options = option_group(
    option(
        "--kv-bits",
        type=int,
        help="Quantize keys and values to 2, 3, 4, 5, 6 or 8 bits",
    ),
    option(
        "--kv-group-size",
        type=int,
        default=64,
        help="Values that share a scale: 32, 64 or 128",
    ),
    option(
        "--quantized-kv-start",
        type=int,
        default=5000,
        help="Quantize from this many tokens on",
    ),
)
prefill_step_option = option(
    "--prefill-step-size",
    type=click.IntRange(1),
    default=2048,
    help="Most prompt tokens to process at once",
)
cache_options = option_group(
    quantization_options,
    store_bits_option,
    prefill_step_option,
    option(
        "--max-kv-size",
        type=click.IntRange(1),
        help="Most tokens to keep in the cache, the first four and the last ones",
    ),
    option(
        "--exact/--tight",
        default=None,
        help="Reuse only where plain mlx-lm's own pieces end, or every cached token  "
        "[default: tight, where the model allows it]",
    ),
)
prompt_options = option_group(
    click.argument("prompt", type=PROMPT, required=False),
    model_options,
    system_option,
    option(
        "-f",
        "--file",
        "files",
        type=TEXT_FILE,
        multiple=True,
        help="Text to put before the prompt, - for stdin; repeatable",
    ),
    option("--messages", type=JSON_FILE, help="Chat messages, a JSON list of objects"),
    template_options,
    option("--raw", is_flag=True, help="Do not use the chat template"),
    cache_options,
)


def open_store(
    store_path: str | None,
    max_nbytes: int | None = None,
    max_daily_nbytes: int | None = None,
    *,
    say: Callable[[str], None] | None = None,
    patience: Patience | None = None,
) -> "PrefixStore":
    """Open the store, and warn if its index had to be rebuilt.

    Args:
        store_path: Its folder.
        max_nbytes: Its size limit.
        max_daily_nbytes: Most bytes to write in a day.
        say: Called with a line while it waits for a different process; stderr if None.
        patience: How long to wait for one, else a minute.
    """
    # Imported here because it takes 30 ms, which `--help` does not need.
    from promptcache.store.store import PrefixStore

    say = say or (lambda line: output.say(f"promptcache: {line}"))
    patience = patience or Patience(COMMAND_SECONDS, say)
    store = PrefixStore(
        store_path,
        max_nbytes=max_nbytes,
        max_daily_nbytes=max_daily_nbytes,
        patience=patience,
    )
    if store.rebuilt:
        output.warn(
            "the index was missing or damaged and has been "
            f"rebuilt from {store.rebuilt} blobs"
        )
    return store


def load_generator(
    options: dict[str, Any], console: output.Console, **arguments: Any
) -> "CachedGenerator":
    """Load the model that a command's options name, and remove these options.

    Args:
        options: The options that `model_options` adds, and others. Those that
            `save_options` adds are used if they are there.
        console: Shows what takes long.
        arguments: Further arguments of `CachedGenerator.load`.
    """
    from promptcache.generator import CachedGenerator

    for option, name in ARGUMENT_BY_OPTION.items():
        if option in options:
            arguments[name] = options.pop(option)
    model = options.pop("model")
    return CachedGenerator.load(model, announce=console.info, **arguments)


@contextlib.contextmanager
def open_existing(store_path: str | None) -> "Iterator[PrefixStore]":
    """Open a store that exists; the default one may not exist yet.

    Raises StoreError if there is none.
    """
    from promptcache.store.store import PrefixStore

    path = config.store_dir(store_path)
    is_new_default = is_missing(path) and path == config.default_store_dir()
    if is_missing(path) and not is_new_default:
        raise StoreError(f"there is no store {path}")
    if not is_new_default and not path.is_symlink() and not PrefixStore.is_in(path):
        raise StoreError(f"there is no store in {path}")
    with empty_store() if is_new_default else open_store(store_path) as store:
        yield store


def is_missing(path: Path) -> bool:
    """Return whether a store does not exist yet; a link leads to one."""
    return not path.exists() and not path.is_symlink()


@contextlib.contextmanager
def empty_store() -> "Iterator[PrefixStore]":
    """Open a temporary store in place of one that does not exist yet."""
    # Imported here because it takes 5 ms.
    import tempfile

    from promptcache.store.store import PrefixStore

    with (
        tempfile.TemporaryDirectory(prefix="promptcache-") as folder,
        PrefixStore(Path(folder) / "store") as store,
    ):
        yield store


def confirm(question: str, *, yes: bool) -> None:
    """Ask on a terminal; a script goes on, as a cache can be computed again."""
    asks = not yes and output.is_terminal(sys.stdin)
    if asks and not click.confirm(printable(question), err=True):
        raise click.exceptions.Exit(0)
