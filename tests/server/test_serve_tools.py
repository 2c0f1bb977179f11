"""Tools and reasoning come through as mlx-lm's server tells them, and are reused."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.helpers import scripted
from tests.helpers.serving import running, system_and

CALL = {"name": "look", "arguments": {"at": "sea"}}
SAYS = ("<think>", "What was asked?", "</think>", "<tool_call>", json.dumps(CALL))
# As many templates do it: thinking is dropped from what was said before.
TEMPLATE = """\
{%- if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}
{%- for message in messages %}<|{{ message.role }}|>{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}{% set tool_call = call.function -%}
<tool_call>{"name": "{{ tool_call.name }}", "arguments": \
{{- tool_call.arguments | tojson }}}</tool_call>{% endfor %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}
SYSTEM = "You are the keeper of a lighthouse. " * 12


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("tools")
    model = scripted.save_model(folder / "model", [*SAYS, "</tool_call>"], TEMPLATE)
    with running(model, "--memory-limit", "64MB", store=folder / "store") as server:
        yield server.client()


def call_of(client: openai.OpenAI, messages: Any, *, stream: bool) -> dict[str, Any]:
    """Return what was thought, called and reused, however it came."""
    arguments: Any = {
        "model": "default_model",
        "messages": messages,
        "tools": [TOOL],
        "temperature": 0,
        "max_tokens": 20,
    }
    if not stream:
        whole = client.chat.completions.create(**arguments)
        return _told([whole.choices[0].message], [whole.choices[0]], whole.usage)
    parts = [
        *client.chat.completions.create(
            **arguments, stream=True, stream_options={"include_usage": True}
        )
    ]
    choices = [choice for part in parts for choice in part.choices]
    return _told([choice.delta for choice in choices], choices, parts[-1].usage)


def _told(deltas: list[Any], choices: list[Any], usage: Any) -> dict[str, Any]:
    calls = [call.function for delta in deltas for call in delta.tool_calls or []]
    return {
        "thought": "".join(getattr(delta, "reasoning", None) or "" for delta in deltas),
        "text": "".join(delta.content or "" for delta in deltas),
        "calls": [(call.name, json.loads(call.arguments)) for call in calls],
        "reason": choices[-1].finish_reason,
        "cached": usage.prompt_tokens_details.cached_tokens,
        "prompt": usage.prompt_tokens,
    }


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_tool_is_called_and_its_result_reuses_the_call(
    client: openai.OpenAI, stream: bool
) -> None:
    messages: Any = system_and(f"{stream} {SYSTEM}", "What do you see?")
    function = {"name": "look", "arguments": json.dumps(CALL["arguments"])}
    call = {"id": "1", "type": "function", "function": function}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "1", "content": "Two ships."}

    first = call_of(client, messages, stream=stream)
    again = call_of(client, messages, stream=stream)
    second = call_of(client, [*messages, called, result], stream=stream)

    for told in (first, again, second):
        assert told["thought"] == "What was asked?"
        assert told["calls"] == [("look", {"at": "sea"})]
        assert told["text"] == ""
        assert told["reason"] == "tool_calls"
    assert again["cached"] == again["prompt"] - 1
    # All but the thinking, which the template drops, with what comes after it.
    assert second["cached"] >= first["prompt"]
