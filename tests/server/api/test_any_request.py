"""Requests at random, and the ones that known clients send."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from promptcache.server.api import (
    chat_completions,
    messages,
    responses,
    text_completions,
)
from promptcache.server.api.errors import validation_error
from promptcache.server.completion import Completion

USER = {"role": "user", "content": "Hello"}
# The models of requests, with a valid request and what translates it.
APIS: dict[str, tuple[type[BaseModel], dict[str, Any], Callable[..., Completion]]] = {
    "chat": (
        chat_completions.ChatRequest,
        {"messages": [USER]},
        chat_completions.completion_of,
    ),
    "text": (
        text_completions.TextRequest,
        {"prompt": "Once"},
        text_completions.completion_of,
    ),
    "responses": (
        responses.ResponseRequest,
        {"input": "Hello"},
        responses.completion_of,
    ),
    "messages": (
        messages.MessageRequest,
        {"messages": [USER], "max_tokens": 1},
        messages.completion_of,
    ),
}
WORDS = st.sampled_from(
    [
        "type", "text", "content", "role", "user", "system", "assistant", "tool",
        "message", "function", "function_call", "function_call_output", "reasoning",
        "arguments", "call_id", "tool_calls", "tool_use", "tool_result", "thinking",
        "input", "output", "name", "id", "parameters", "input_schema", "schema",
        "json_schema", "format", "{}", "", "auto", "none", "required", "any", "1",
    ]
)  # fmt: skip
SCALARS = st.one_of(
    WORDS,
    st.none(),
    st.booleans(),
    st.floats(),
    st.integers(),
    st.sampled_from([2**31, -(2**63), 10**400, 1e308, 5e-324, "\ud800", "x" * 2000]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=5)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("api", APIS)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_any_request_is_translated_or_refused_in_a_line(
    api: str, data: st.DataObject
) -> None:
    model, valid, completion_of = APIS[api]
    names = st.sampled_from([*model.model_fields])
    body = {**valid, **data.draw(st.dictionaries(names, VALUES, max_size=3))}

    try:
        request = model.model_validate(body)
    except ValidationError as error:
        message = validation_error(error).message
        assert message.isprintable()
        assert len(message) < 500
    else:
        completion = completion_of(request)
        told = (completion.messages, completion.prompt, completion.sampling)
        assert json.dumps(told, allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize("api", APIS)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_null_is_as_good_as_nothing(api: str, data: st.DataObject) -> None:
    model, valid, _ = APIS[api]
    names = st.sampled_from([n for n in model.model_fields if n not in valid])
    nulls = dict.fromkeys(data.draw(st.sets(names | st.text(max_size=5))))

    assert model.model_validate({**nulls, **valid}) == model.model_validate(valid)


def test_codex_is_understood() -> None:
    """As its source has it; it sends no fields of sampling."""
    request = responses.ResponseRequest.model_validate(
        {
            "model": "local",
            "instructions": "You are Codex.",
            "input": [
                {
                    "type": "message",
                    "role": "developer",
                    "content": [{"type": "input_text", "text": "<permissions>"}],
                },
                {
                    "type": "message",
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "# AGENTS.md"},
                        {"type": "input_text", "text": "<environment_context>"},
                    ],
                },
                {
                    "type": "message",
                    "role": "user",
                    "content": [{"type": "input_text", "text": "List files"}],
                },
            ],
            "tools": [
                {
                    "type": "function",
                    "name": "exec_command",
                    "description": "Runs a command.",
                    "strict": False,
                    "parameters": {"type": "object", "properties": {}},
                },
                {"type": "custom", "name": "apply_patch", "format": {}},
                {"type": "web_search", "external_web_access": True},
                {"type": "image_generation", "output_format": "png"},
            ],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "reasoning": {"effort": "medium", "summary": "auto"},
            "store": False,
            "stream": True,
            "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": "0199",
            "text": {"verbosity": "low"},
            "client_metadata": {"x-codex-installation-id": "1"},
            "service_tier": "priority",
        }
    )
    completion = responses.completion_of(request)

    assert [m["role"] for m in completion.messages or ()] == ["system", "user"]
    assert len(completion.tools) == 1
    assert len(request.left_out_tools) == 3


def test_claude_code_is_understood() -> None:
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    request = messages.MessageRequest.model_validate(
        {
            "model": "claude-opus-5",
            "max_tokens": 32000,
            "system": [
                {"type": "text", "text": "x-anthropic-billing-header: cch=1;"},
                {"type": "text", "text": "You are Claude Code.", **cached},
            ],
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "<system-reminder>"},
                        {"type": "text", "text": "List files", **cached},
                    ],
                }
            ],
            "tools": [
                {
                    "name": "Bash",
                    "description": "Runs a command.",
                    "input_schema": {"type": "object", "properties": {}},
                    "eager_input_streaming": True,
                    **cached,
                }
            ],
            "metadata": {"user_id": "u"},
            "thinking": {"type": "adaptive"},
            "context_management": {"edits": [{"type": "clear_thinking_20251015"}]},
            "output_config": {"effort": "medium"},
            "stream": True,
        }
    )

    assert messages.completion_of(request).messages == [
        {"role": "system", "content": "You are Claude Code."},
        {"role": "user", "content": "<system-reminder>\n\nList files"},
    ]
