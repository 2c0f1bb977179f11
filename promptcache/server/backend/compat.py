"""mlx-lm's server: all that promptcache uses of it, in one place.

The server is composed of its parts, which are not a public interface: a release of
mlx-lm may change any of them. `incompatibilities` finds out before a request does.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

from mlx_lm import server
from mlx_lm.processors import load_processor
from mlx_lm.server import (
    APIHandler,
    CompletionRequest,
    ModelProvider,
    ResponseGenerator,
    TimeBudget,
    get_system_fingerprint,
)
from mlx_lm.utils import _parse_size

__all__ = [
    "APIHandler",
    "CompletionRequest",
    "ModelProvider",
    "ResponseGenerator",
    "TimeBudget",
    "describe",
    "find",
    "get_system_fingerprint",
    "incompatibilities",
    "load_processor",
    "parse_size",
]
parse_size: Callable[[str], int] = _parse_size
# What is overridden or called, with the names of its parameters.
PARAMETERS = {
    "APIHandler.__init__": (
        *("self", "response_generator", "args", "system_fingerprint", "kwargs"),
    ),
    "APIHandler._set_completion_headers": ("self", "status_code"),
    "APIHandler._set_cors_headers": ("self",),
    "APIHandler._set_stream_headers": ("self", "status_code"),
    "APIHandler.do_GET": ("self",),
    "APIHandler.do_POST": ("self",),
    "APIHandler.handle_completion": ("self", "request", "stop_words"),
    "APIHandler.handle_models_request": ("self",),
    "ModelProvider.__init__": ("self", "cli_args"),
    "ModelProvider._load": ("self", "model_path", "adapter_path", "draft_model_path"),
    "ModelProvider.load": ("self", "model_path", "adapter_path", "draft_model_path"),
    "ModelProvider.load_default": ("self",),
    "ModelProvider.reset": ("self",),
    "ResponseGenerator.__init__": ("self", "model_provider", "prompt_cache"),
    "ResponseGenerator._await_response": ("self", "response_queue"),
    "ResponseGenerator._next_request": ("self", "timeout"),
    "ResponseGenerator._run_generate": ("self",),
    "ResponseGenerator._serve_single": ("self", "request", "stream"),
    "ResponseGenerator._tokenize": ("self", "tokenizer", "request", "args"),
    "ResponseGenerator.generate": (
        *("self", "request", "generation_args", "progress_callback"),
    ),
    "ResponseGenerator.generation_available": ("self",),
    "ResponseGenerator.stop_and_join": ("self",),
    "TimeBudget.__iter__": ("self",),
    "TimeBudget.__next__": ("self",),
    "CompletionRequest": (
        *("request_type", "prompt", "messages", "tools", "role_mapping"),
    ),
}


def incompatibilities(source: Any = server) -> Iterator[str]:
    """Yield what of mlx-lm's server has other parameters than promptcache needs."""
    for name, expected in PARAMETERS.items():
        attribute = find(source, name)
        if attribute is None:
            yield f"{name} is gone"
        elif (parameters := tuple(inspect.signature(attribute).parameters)) != expected:
            yield f"{name} takes {_listed(parameters)}, not {_listed(expected)}"


def find(source: Any, name: str) -> Any:
    """Return an attribute of attributes by its dotted name, None if there is none."""
    for part in name.split("."):
        source = getattr(source, part, None)
    return source


def _listed(names: Sequence[str]) -> str:
    return f"({', '.join(names)})"


def describe(incompatible: Sequence[str]) -> str:
    """Return in one line what differs."""
    return f"mlx-lm {version('mlx-lm')}: {'; '.join(incompatible)}"
