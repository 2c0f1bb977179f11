"""The seam: what promptcache needs of mlx-lm's server is where it was."""

import inspect
import re
from types import SimpleNamespace
from typing import Any

import click
from mlx_lm import server
from mlx_lm.server import APIHandler, ModelProvider, ResponseGenerator

from promptcache.server.backend.compat import describe, find, incompatibilities

# What mlx-lm's code does with the prompt cache and with what is overridden.
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


def uses_missing_in(source: Any) -> list[str]:
    """Return the methods of mlx-lm's server that no longer do what is relied on."""
    code = {
        name: "".join(inspect.getsource(find(source, name)).split()) for name in USES
    }
    return [
        f"{name} does not {use!r}"
        for name, uses in USES.items()
        for use in uses
        if "".join(use.split()) not in code[name]
    ]


def test_mlx_lm_server_is_as_it_is_used() -> None:
    found = [*incompatibilities()]

    assert not found, describe(found)
    assert uses_missing_in(server) == []


def test_what_mlx_lm_moves_is_told_by_name() -> None:
    class Moved(ResponseGenerator):
        def _next_request(self, timeout: Any = None, patience: Any = None) -> Any:
            return self.prompt_cache.get(timeout)

    source = SimpleNamespace(
        ResponseGenerator=Moved,
        ModelProvider=ModelProvider,
        APIHandler=APIHandler,
        CompletionRequest=server.CompletionRequest,
    )

    found = [*incompatibilities(source)]

    assert "TimeBudget.__iter__ is gone" in found
    assert (
        "ResponseGenerator._next_request takes (self, timeout, patience), "
        "not (self, timeout)"
    ) in found
    assert describe(found).startswith("mlx-lm ")


def test_what_mlx_lm_does_otherwise_is_named() -> None:
    class Other(ResponseGenerator):
        def _generate(self) -> None:
            return None

    source = SimpleNamespace(
        ResponseGenerator=Other, ModelProvider=ModelProvider, APIHandler=APIHandler
    )

    missing = uses_missing_in(source)

    assert len(missing) == len(USES["ResponseGenerator._generate"])
    assert all("ResponseGenerator._generate does not" in line for line in missing)


def test_serve_takes_all_options_of_mlx_lms_server() -> None:
    from promptcache_cli.commands.serve import serve

    source = inspect.getsource(server.main)
    wanted = set(re.findall(r'"(--[a-z-]+)"', source))

    options = {
        name
        for param in serve.params
        if isinstance(param, click.Option)
        for name in [*param.opts, *param.secondary_opts]
    }
    assert len(wanted) > 20
    assert wanted <= options
