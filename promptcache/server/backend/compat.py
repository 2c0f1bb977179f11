"""mlx-lm's server: all that promptcache uses of it, in one place.

The server is composed of its parts, which are no public interface: a release of mlx-lm
may move any of them. `changes` tells which, before a request finds out.
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
    "changes",
    "get_system_fingerprint",
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
# What its code does with the prompt cache and with what is overridden.
USES = {
    "ResponseGenerator._generate": (
        "self._next_request(timeout)",
        "for _ in self._time_budget:",
        "self.model_provider.load_default()",
        "self.prompt_cache.fetch_nearest_cache(",
        "current_model_key, prompt",
        "all_tokens=[prompt[:prompt_cache_count]]",
        "self.prompt_cache.insert_cache(",
        "cache_key[:],",
        "r.all_tokens[:],",
        "self.prompt_cache.trim_to(n_bytes=total - active)",
        "self._tokenize(current_tokenizer, request, args)",
        "self._serve_single((rqueue, request, args), generation_stream)",
    ),
    "ResponseGenerator._serve_single": (
        "cache_key = vision.cache_key if vision is not None else prompt[:]",
        "self.prompt_cache.fetch_nearest_cache(",
        "self.model_provider.model_key, cache_key, cache",
        "rqueue.put((tokens_processed, tokens_total))",
        "cache += make_prompt_cache(self.model_provider.draft_model)",
    ),
    "ResponseGenerator.generate": (
        "self.requests.put((response_queue, request, generation_args))",
        "self._await_response(response_queue)",
    ),
    "APIHandler.do_POST": (
        'self.headers.get("Content-Length")',
        "self.rfile.read(content_length)",
        "self.handle_completion(request, stop_words)",
    ),
    "APIHandler.handle_completion": (
        "self.response_generator.generate(",
        "self._set_completion_headers(404)",
        "ctx.stop()",
        'self.stream_options["include_usage"]',
    ),
    "ModelProvider._load": (
        "self.processor = load_processor(model, config)",
        "self.model_key = (model_path, adapter_path, draft_model_path)",
        'hasattr(c, "merge") for c in make_prompt_cache(model)',
    ),
}


def changes(source: Any = server) -> list[str]:
    """Return what of mlx-lm's server is not as promptcache needs it, line by line."""
    return [*_moved(source), *_used_otherwise(source)]


def _moved(source: Any) -> Iterator[str]:
    for name, wanted in PARAMETERS.items():
        found = _find(source, name)
        if found is None:
            yield f"{name} is gone"
        elif (parameters := tuple(inspect.signature(found).parameters)) != wanted:
            yield f"{name} takes {_listed(parameters)}, not {_listed(wanted)}"


def _used_otherwise(source: Any) -> Iterator[str]:
    for name, uses in USES.items():
        found = _find(source, name)
        code = "" if found is None else "".join(inspect.getsource(found).split())
        for use in uses:
            if "".join(use.split()) not in code:
                yield f"{name} does not {use!r} any more"


def _find(source: Any, name: str) -> Any:
    for part in name.split("."):
        source = getattr(source, part, None)
    return source


def _listed(names: Sequence[str]) -> str:
    return f"({', '.join(names)})"


def told(found: Sequence[str]) -> str:
    """Return in one line what changed."""
    return f"mlx-lm {version('mlx-lm')}: {'; '.join(found)}"
