"""Messages: requests to completions, and events to messages."""

import json
from typing import Any

import pytest
from hypothesis import given, settings

from promptcache.server.api.errors import ApiError
from promptcache.server.api.ignored import MESSAGES
from promptcache.server.api.message_answer import SIGNATURE, MessageAnswer
from promptcache.server.api.messages import (
    MessageRequest,
    TokenCountRequest,
    completion_of,
    token_count,
)
from promptcache.server.completion import (
    AnswerEnd,
    Completion,
    Event,
    Finished,
    Progress,
    ReasoningDelta,
    Started,
    TextDelta,
    ToolCall,
    Usage,
)
from tests.helpers.answers import completions, encoded, read_stream, refusal

USER = {"role": "user", "content": "Hello"}
CACHED = {"cache_control": {"type": "ephemeral"}}
LOOK = {
    "name": "look",
    "description": "Look",
    "input_schema": {"type": "object", "properties": {"at": {"type": "string"}}},
    **CACHED,
}
BILLING = "x-anthropic-billing-header: cc_version=2.1; cc_entrypoint=cli; cch=a1;"
# What Anthropic's own models have to have, and what they know, by type.
FIELDS = {
    "message_start": {"type", "message"},
    "message": {
        "id", "type", "role", "model", "content", "stop_reason", "stop_sequence",
        "usage",
    },
    "ping": {"type"},
    "content_block_start": {"type", "index", "content_block"},
    "content_block_delta": {"type", "index", "delta"},
    "content_block_stop": {"type", "index"},
    "message_delta": {"type", "delta", "usage"},
    "message_stop": {"type"},
    "text": {"type", "text"},
    "thinking": {"type", "thinking", "signature"},
    "tool_use": {"type", "id", "name", "input"},
    "text_delta": {"type", "text"},
    "thinking_delta": {"type", "thinking"},
    "signature_delta": {"type", "signature"},
    "input_json_delta": {"type", "partial_json"},
}  # fmt: skip


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value, **CACHED}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "claude", "max_tokens": 5, "messages": [USER], **fields}


def asked(*messages: Any, **fields: Any) -> Completion:
    told = {"messages": [*messages]} if messages else {}
    return completion_of(MessageRequest.model_validate(body(**told, **fields)))


def answer() -> MessageAnswer:
    return MessageAnswer(MessageRequest.model_validate(body()), message_id="msg_1")


def test_the_least_request_leaves_everything_to_the_server() -> None:
    assert asked() == Completion(
        model="claude", messages=[USER], tools=[], max_tokens=5, stop=[]
    )


def test_null_is_not_given() -> None:
    needed = ("model", "max_tokens", "messages")
    nulls = {n: None for n in MessageRequest.model_fields if n not in needed}

    assert asked(**nulls, container=None, speed=None) == asked()


def test_what_clients_always_send_is_not_used() -> None:
    fields = {name: {"any": ["thing"]} for name in MESSAGES}
    effort = {"effort": "high"}

    assert asked(**fields, mcp_servers=[], output_config=effort) == asked()


def test_sampling_and_stops_are_taken() -> None:
    completion = asked(temperature=0.5, top_p=1, top_k=3, stop_sequences=["END"])

    assert completion.sampling == {"temp": 0.5, "top_p": 1.0, "top_k": 3}
    assert completion.stop == ["END"]


def test_blocks_become_messages_of_alternating_roles() -> None:
    completion = asked(
        {"role": "user", "content": [text("<reminder>"), text("Go")]},
        {"role": "user", "content": "on"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm", "signature": "x"},
                {"type": "redacted_thinking", "data": "AAAA"},
                text("I "),
                text("look"),
                {
                    "type": "tool_use",
                    "id": "t1",
                    "name": "look",
                    "input": {"at": "door"},
                    **CACHED,
                },
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "content": [text("locked"), text("dark")],
                    "is_error": False,
                },
                {"type": "tool_result", "tool_use_id": "t2"},
                text("Next"),
            ],
        },
        system=[text("Rules"), text("More")],
    )

    assert completion.messages == [
        {"role": "system", "content": "Rules\n\nMore"},
        {"role": "user", "content": "<reminder>\n\nGo\n\non"},
        {
            "role": "assistant",
            "content": "I look",
            "reasoning": "Hm",
            "reasoning_content": "Hm",
            "tool_calls": [
                {
                    "id": "t1",
                    "type": "function",
                    "function": {"name": "look", "arguments": {"at": "door"}},
                }
            ],
        },
        {
            "role": "tool",
            "tool_call_id": "t1",
            "content": "locked\ndark",
            "name": "look",
        },
        {"role": "tool", "tool_call_id": "t2", "content": ""},
        {"role": "user", "content": "Next"},
    ]


def test_system_text_in_the_middle_is_the_neighbouring_users() -> None:
    system = {"role": "system", "content": "Now"}
    assistant = {"role": "assistant", "content": "Hi"}

    assert asked(system, USER, system, assistant, system, USER).messages == [
        {"role": "system", "content": "Now"},
        {"role": "user", "content": "Hello\n\nNow"},
        assistant,
        {"role": "user", "content": "Now\n\nHello"},
    ]


def test_a_conversation_that_grows_keeps_its_beginning() -> None:
    """Else the prompt would be read again from there."""
    turns: list[dict[str, Any]] = [
        USER,
        {"role": "system", "content": "Now"},
        {"role": "assistant", "content": "Hi"},
    ]
    before = asked(*turns, system="Rules").messages or ()
    after = asked(*turns, USER, system="Rules").messages or ()

    assert [*after[: len(before)]] == [*before]


@pytest.mark.parametrize("system", [BILLING, [text(BILLING)]])
def test_the_billing_header_is_dropped(system: Any) -> None:
    assert asked(system=system).messages == [USER]


def test_only_the_billing_header_is_dropped() -> None:
    blocks = [text(f" {BILLING}"), text(BILLING), text(f"See {BILLING}")]
    request = MessageRequest.model_validate(body(system=blocks))

    assert (completion_of(request).messages or ())[0] == {
        "role": "system",
        "content": f" {BILLING}\n\nSee {BILLING}",
    }
    kept = completion_of(request, drop_billing_header=False).messages or ()
    assert kept[0]["content"].count("cch=") == 3


def test_only_tools_that_the_client_describes_are_used() -> None:
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
    request = MessageRequest.model_validate(
        body(tools=[LOOK, search, {**LOOK, "name": "l2", "type": "custom"}])
    )

    assert request.left_out_tools == ["web_search_20250305 web_search"]
    assert completion_of(request).tools == [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": "Look",
                "parameters": LOOK["input_schema"],
            },
        }
        for name in ("look", "l2")
    ]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "look"}, "look"),
    ],
)
def test_a_choice_of_tools(choice: Any, expected: str) -> None:
    assert asked(tools=[LOOK], tool_choice=choice).tool_choice == expected


def test_a_format_is_what_answers_have_to_match() -> None:
    wanted = {"type": "json_schema", "schema": {"a": 1}}

    assert asked(output_config={"format": wanted}).json_schema == {"a": 1}
    assert asked(output_format=wanted).json_schema == {"a": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"user_location": {}}, "user_location is not supported"),
        ({"container": "c"}, "container is not supported"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers is not supported"),
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"messages": []}, "messages must not be empty"),
        (
            {"messages": [{"role": "tool", "content": ""}]},
            "messages[0].role must be 'user', 'assistant' or 'system'",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        (
            {"messages": [{"role": "user", "content": ["x"]}]},
            "messages[0].content[0] must be an object",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0] of type image is not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
            "messages[0].content[0] of type document is not supported",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "tool_result",
                                "tool_use_id": "t",
                                "content": [{"type": "image"}],
                            }
                        ],
                    }
                ]
            },
            "messages[0].content[0].content[0] of type image is not supported, "
            "only text",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "tool_use", "id": "t", "name": "f", "input": "x"}
                        ],
                    }
                ]
            },
            "messages[0].content[0].input must be an object",
        ),
        ({"system": 5}, "system must be text or a list of parts"),
        (
            {"system": [{"type": "image"}]},
            "system[0] of type image is not supported, only text",
        ),
        ({"temperature": float("inf")}, "temperature must be a finite number"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences must have at most 16 texts"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name is missing"),
        (
            {"tool_choice": "auto"},
            "tool_choice must be an object of type auto, any, tool or none",
        ),
        (
            {"tool_choice": {"type": "tool"}},
            "tool_choice.name must be the name of a tool",
        ),
        (
            {"tool_choice": {"type": "tool", "name": "web_search"}},
            "tool_choice names web_search, which is not among the tools",
        ),
        (
            {"tool_choice": {"type": "any"}},
            "tool_choice asks for a call, but there are no tools",
        ),
        (
            {"output_config": {"format": {"type": "xml"}}},
            "output_config.format.type must be 'json_schema'",
        ),
    ],
)
def test_what_is_wrong_is_told_in_a_line(fields: Any, message: str) -> None:
    assert refusal(MessageRequest, body(**fields)).message == message


def test_tokens_are_counted_without_a_limit_of_them() -> None:
    told = {name: value for name, value in body().items() if name != "max_tokens"}
    request = TokenCountRequest.model_validate(
        {**told, "system": [text(BILLING), text("Rules")], "tools": [LOOK]}
    )
    completion = completion_of(request)

    assert completion.messages == [{"role": "system", "content": "Rules"}, USER]
    assert len(completion.tools) == 1
    assert token_count(5) == {"input_tokens": 5}


def joined_message(messages: list[tuple[str | None, Any]]) -> dict[str, Any]:
    """Return the message that a stream tells, as Anthropic's client joins it."""
    message: dict[str, Any] = {}
    for name, event in messages:
        assert name == event["type"]
        assert event.keys() == FIELDS[event["type"]]
        match event["type"]:
            case "message_start":
                message = event["message"]
                assert message.keys() == FIELDS["message"]
                assert message["content"] == []
            case "content_block_start":
                assert event["index"] == len(message["content"])
                block = event["content_block"]
                assert block.keys() == FIELDS[block["type"]]
                message["content"].append(block)
                partial = ""
            case "content_block_delta":
                assert event["index"] == len(message["content"]) - 1
                delta, block = event["delta"], message["content"][-1]
                assert delta.keys() == FIELDS[delta["type"]]
                assert all(delta.values())
                match delta["type"]:
                    case "text_delta":
                        block["text"] += delta["text"]
                    case "thinking_delta":
                        block["thinking"] += delta["thinking"]
                    case "signature_delta":
                        block["signature"] = delta["signature"]
                    case "input_json_delta":
                        partial += delta["partial_json"]
                        block["input"] = json.loads(partial)
            case "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
    return message


@settings(deadline=None, max_examples=30)
@given(completions(has_logprobs=True))
def test_streamed_messages_say_what_whole_ones_say(events: list[Event]) -> None:
    messages = read_stream(encoded(answer().encode, events))
    whole = answer().whole(events)

    assert joined_message(messages) == whole
    assert whole.keys() == FIELDS["message"]
    assert messages[-1][0] == "message_stop"
    opened = [
        n for n, _ in messages if n in ("content_block_start", "content_block_stop")
    ]
    assert opened == ["content_block_start", "content_block_stop"] * len(
        whole["content"]
    )


def test_events_come_in_anthropics_order() -> None:
    events = [
        Progress(1, 2),
        Started(Usage(7, 5)),
        ReasoningDelta("Hm"),
        TextDelta("Hi"),
        TextDelta("!"),
        ToolCall("t1", "look", ""),
        AnswerEnd("tool_calls"),
        Finished(Usage(7, 5, 4, 1)),
    ]
    messages = read_stream(encoded(answer().encode, events))

    assert [name for name, _ in messages] == [
        "ping",
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert messages[1][1]["message"]["usage"] == {
        "input_tokens": 2,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 5,
        "output_tokens": 0,
    }
    assert answer().whole(events) == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude",
        "content": [
            {"type": "thinking", "thinking": "Hm", "signature": SIGNATURE},
            {"type": "text", "text": "Hi!"},
            {"type": "tool_use", "id": "t1", "name": "look", "input": {}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 2,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 5,
            "output_tokens": 4,
        },
    }


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (AnswerEnd("stop"), "end_turn"),
        (AnswerEnd("stop", "END"), "stop_sequence"),
        (AnswerEnd("length"), "max_tokens"),
        (AnswerEnd("tool_calls"), "tool_use"),
    ],
)
def test_why_a_message_ended(end: AnswerEnd, reason: str) -> None:
    whole = answer().whole([Started(Usage(1)), end, Finished(Usage(1))])

    assert whole["stop_reason"] == reason
    assert whole["stop_sequence"] == end.stop


def test_an_error_ends_a_stream() -> None:
    error = ApiError(503, "server_error", None, None, "busy")

    assert read_stream(answer().encode_error(error)) == [
        (
            "error",
            {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}},
        )
    ]
