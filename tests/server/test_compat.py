"""The seam: what promptcache needs of mlx-lm's server is where it was."""

import inspect
import re
from types import SimpleNamespace
from typing import Any

import click
from mlx_lm import server
from mlx_lm.server import APIHandler, ModelProvider, ResponseGenerator

from promptcache.server.backend.compat import changes, told


def test_mlx_lm_server_is_as_it_is_used() -> None:
    found = changes()

    assert not found, told(found)


def test_what_mlx_lm_moves_is_told_by_name() -> None:
    class Moved(ResponseGenerator):
        def _next_request(self, timeout: Any = None, patience: Any = None) -> Any:
            return self.prompt_cache.get(timeout)

        def _generate(self) -> None:
            return None

    source = SimpleNamespace(
        ResponseGenerator=Moved,
        ModelProvider=ModelProvider,
        APIHandler=APIHandler,
        CompletionRequest=server.CompletionRequest,
    )

    found = changes(source)

    assert "TimeBudget.__iter__ is gone" in found
    assert (
        "ResponseGenerator._next_request takes (self, timeout, patience), "
        "not (self, timeout)"
    ) in found
    assert any("ResponseGenerator._generate does not" in line for line in found)
    assert told(found).startswith("mlx-lm ")


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
