"""`promptcache serve`."""

import logging
import signal
from argparse import Namespace
from typing import TYPE_CHECKING, Any

import click

from promptcache import UsageError
from promptcache.locks import Patience
from promptcache_cli import output
from promptcache_cli.options import (
    JSON_OBJECT,
    SIZE,
    draft_option,
    limit_options,
    model_options,
    open_store,
    option,
    option_group,
    prefill_step_option,
    quantization_options,
    quiet_option,
    store_bits_option,
    store_option,
)

if TYPE_CHECKING:
    from promptcache.server.server import Server

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

# Named as in mlx-lm's server, with its defaults.
server_options = option_group(
    option("--host", default="127.0.0.1", help="Where to listen"),
    option(
        "--port",
        type=click.IntRange(0, 65535),
        default=8080,
        help="Which port, 0 for any",
    ),
    option(
        "--allowed-origins",
        default="",
        show_default=False,
        callback=lambda ctx, param, value: [*filter(None, value.split(","))],
        help="Origins of web pages that may ask, separated by commas; * for all  "
        "[default: none]",
    ),
    draft_option,
    option(
        "--num-draft-tokens",
        type=click.IntRange(0),
        default=3,
        help="How many tokens it proposes at once",
    ),
    option(
        "--trust-remote-code", is_flag=True, help="Run code that comes with the model"
    ),
    option(
        "--log-level",
        type=click.Choice(LOG_LEVELS, case_sensitive=False),
        default="INFO",
        help="What to log on stderr; INFO tells a line of each request",
    ),
    option(
        "--chat-template",
        default="",
        show_default=False,
        help="A chat template, as text",
    ),
    option(
        "--use-default-chat-template",
        is_flag=True,
        help="Use the tokenizer's default chat template where the model has none",
    ),
    option(
        "--temp",
        type=click.FloatRange(0),
        default=0.0,
        help="Sampling temperature, unless a request says otherwise, as the next three",
    ),
    option(
        "--top-p",
        type=click.FloatRange(0, 1),
        default=1.0,
        help="Sample from the likeliest tokens of this probability in all",
    ),
    option(
        "--top-k",
        type=click.IntRange(0),
        default=0,
        help="Sample from this number of the likeliest tokens, 0 for all",
    ),
    option(
        "--min-p",
        type=click.FloatRange(0, 1),
        default=0.0,
        help="Sample from tokens this likely, as a share of the likeliest",
    ),
    option(
        "--max-tokens",
        type=click.IntRange(1),
        default=512,
        help="Most tokens of an answer, unless a request says otherwise",
    ),
    option(
        "--chat-template-args",
        type=JSON_OBJECT,
        default="{}",
        show_default=False,
        help="Arguments of the chat template, a JSON object, or @FILE",
    ),
    option(
        "--decode-concurrency",
        type=click.IntRange(1),
        default=32,
        help="Answers to generate at once",
    ),
    option(
        "--prompt-concurrency",
        type=click.IntRange(1),
        default=8,
        help="Prompts to read at once",
    ),
    prefill_step_option,
    option(
        "--prompt-cache-size",
        type=int,
        help="Without effect: bytes are limited, not numbers",
    ),
    option("--prompt-cache-bytes", type=SIZE, help="The same as --memory-limit"),
    quantization_options,
    option("--pipeline", is_flag=True, help="Without effect on one machine"),
)


cache_options = option_group(
    option(
        "--memory-limit",
        type=SIZE,
        help="Most bytes of memory for caches  [env: PROMPTCACHE_MEMORY_LIMIT; "
        "default: an eighth of the memory]",
    ),
    option(
        "--save-answers/--no-save-answers",
        default=True,
        help="Store answers, too, which the next turn begins with",
    ),
    store_bits_option,
)
access_options = option_group(
    option(
        "--allow-model",
        "allowed_models",
        multiple=True,
        help="A pattern of other models, adapters and drafts that requests may name, "
        "such as 'mlx-community/*'; repeatable",
    ),
    option(
        "--api-key",
        "api_keys",
        multiple=True,
        help="A key that clients must present; each has its own prefixes; repeatable  "
        "[env: PROMPTCACHE_API_KEY, separated by commas]",
    ),
    option(
        "--metrics-key",
        help="A key that opens /metrics, which API keys do not  "
        "[env: PROMPTCACHE_METRICS_KEY]",
    ),
    option(
        "--pin-quota",
        type=SIZE,
        help="Most bytes that each API key may pin  [default: its part of a half of "
        "the store's limit]",
    ),
    option("--insecure", is_flag=True, help="Accept remote clients without an API key"),
    option(
        "--max-request-size",
        "most_nbytes",
        type=SIZE,
        default="32MB",
        help="Most bytes of a request",
    ),
    option(
        "--max-prompt-tokens",
        "most_tokens",
        type=click.IntRange(0),
        help="Most tokens of a prompt, 0 for any number  "
        "[default: the model's context]",
    ),
)
# Arguments of `Server` that are not options of mlx-lm's server.
OWN_ARGUMENTS = (
    *("memory_limit", "save_answers", "store_bits", "api_keys", "metrics_key"),
    *("pin_quota", "insecure", "most_nbytes", "most_tokens", "allowed_models"),
)


@click.command()
@model_options
@server_options
@store_option
@limit_options
@cache_options
@access_options
@quiet_option
def serve(
    store_path: str | None,
    max_size: int | None,
    daily_writes: int | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Serve a model with the OpenAI API and the durable cache

    It takes the options of mlx-lm's server, and has a prompt cache in memory and on
    disk: what was read once is not read again, even after a restart. Chats are stored
    with their answers, other prompts if they are long. With --kv-bits or a draft model,
    requests are not batched.

    GET /v1/cache lists what is stored, POST /v1/cache/explain says why a prompt hits
    or misses, POST /v1/cache/pin keeps a prefix; each API key is answered as if it
    were the only one. GET /metrics is for Prometheus.

    Example:

    \b
        promptcache serve -m mlx-community/Qwen3-4B-4bit --port 8080
        promptcache serve --host 0.0.0.0 --api-key "$KEY"
    """
    from promptcache.server.server import Server

    console = output.Console(quiet=quiet)
    _log(options["log_level"])
    own = {name: options.pop(name) for name in OWN_ARGUMENTS}
    if own["memory_limit"] is None:
        own["memory_limit"] = options["prompt_cache_bytes"]
    if any(not key.strip() for key in own["api_keys"]):
        raise UsageError("an API key must not be empty")
    # As Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Requests wait no longer than those of a generator.
    with open_store(store_path, max_size, daily_writes, patience=Patience()) as store:
        mlx_lm_options = Namespace(**options)
        server = Server(mlx_lm_options, store=store, announce=console.info, **own)
        with server:
            _serve(server, options["host"], console)


def _serve(server: "Server", host: str, console: output.Console) -> None:
    address = f"[{host}]" if ":" in host else host
    console.info(f"Serving {server.model} at http://{address}:{server.port}/v1")
    try:
        server.serve()
    except KeyboardInterrupt:
        console.info("Stopping")


def _log(level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(output.LogFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # It says when it starts and stops, which `serve` does.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
