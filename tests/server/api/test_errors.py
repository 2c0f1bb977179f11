"""Errors in the form of each API."""

import subprocess
import sys
from typing import Any

import pytest

from promptcache.server.api.chat_completions import ChatRequest
from promptcache.server.api.errors import (
    ApiError,
    anthropic_error,
    openai_error,
    path_of,
    response_error,
)
from promptcache.server.api.messages import MessageRequest, TokenCountRequest
from promptcache.server.api.responses import ResponseRequest
from promptcache.server.api.text_completions import TextRequest
from tests.helpers.answers import refusal

REQUESTS = [
    ChatRequest,
    TextRequest,
    ResponseRequest,
    MessageRequest,
    TokenCountRequest,
]


def test_openais_form() -> None:
    error = ApiError(404, "invalid_request_error", "model_not_found", "model", "no m")

    assert openai_error(error) == {
        "error": {
            "message": "no m",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (418, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_anthropics_form(status: int, kind: str) -> None:
    error = ApiError(status, "server_error", None, None, "no")

    assert anthropic_error(error) == {
        "type": "error",
        "error": {"type": kind, "message": "no"},
    }


def test_the_form_of_failed_responses() -> None:
    error = ApiError(500, "server_error", None, None, "no")

    assert response_error(error) == {"code": "server_error", "message": "no"}


def test_a_place_is_a_path() -> None:
    assert path_of(("input", 3, "<message>", "content", 0)) == "input[3].content[0]"
    assert path_of(()) == ""


def test_a_refusal_names_the_parameter() -> None:
    error = refusal(ChatRequest, {"messages": [{"role": "user", "content": [{}]}]})

    assert error == ApiError(
        400,
        "invalid_request_error",
        None,
        "messages[0].content[0].type",
        "messages[0].content[0].type is missing",
    )


@pytest.mark.parametrize("model", REQUESTS)
@pytest.mark.parametrize("body", [None, [], "text", 5, True])
def test_a_body_is_an_object(model: Any, body: Any) -> None:
    error = refusal(model, body)

    assert (error.param, error.message) == (None, "body must be an object")


@pytest.mark.parametrize("model", REQUESTS)
def test_a_long_name_makes_no_long_message(model: Any) -> None:
    assert len(refusal(model, {"x" * 10**6: 1, "max_tokens": 1}).message) < 200


@pytest.mark.parametrize("model", REQUESTS)
def test_a_message_is_one_line(model: Any) -> None:
    message = refusal(model, {"a\nb\x1b": 1, "max_tokens": 1, "prompt": "x"}).message

    assert message.isprintable()


@pytest.mark.parametrize("model", REQUESTS)
def test_names_that_are_not_unicode_are_refused(model: Any) -> None:
    message = refusal(model, {"\ud800": 1}).message

    assert message == "body is not valid Unicode"


@pytest.mark.parametrize("model", REQUESTS)
def test_requests_have_a_schema(model: Any) -> None:
    schema = model.model_json_schema()

    assert schema["additionalProperties"] is False
    assert "model" in schema["properties"]


def test_translating_imports_no_engine_and_no_http() -> None:
    modules = (
        "chat_completions", "text_completions", "response_answer", "message_answer",
    )  # fmt: skip
    names = ", ".join(f"promptcache.server.api.{module}" for module in modules)
    heavy = ("mlx", "mlx_lm", "transformers", "numpy", "fastapi", "starlette")
    code = f"import sys, {names}; print(*(m for m in {heavy!r} if m in sys.modules))"
    command = [sys.executable, "-c", code]

    assert subprocess.check_output(command, text=True).split() == []
