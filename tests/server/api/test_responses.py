"""Responses: requests to completions, and events to responses."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from openai.types import responses as known
from openai.types.responses import Response

from promptcache.server.api.errors import ApiError
from promptcache.server.api.ignored import RESPONSES
from promptcache.server.api.response_answer import ResponseAnswer
from promptcache.server.api.responses import (
    ResponseRequest,
    completion_of,
    conversation_items,
    joined,
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
    TokenLogprob,
    ToolCall,
    Usage,
)
from tests.helpers.answers import (
    completions,
    encoded,
    read_stream,
    refusal,
    unknown_fields,
)

LOOK = {
    "type": "function",
    "name": "look",
    "description": "Look",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    "strict": False,
}
# The models of the events, by the last parts of their names.
EVENTS = {
    "response.created": known.ResponseCreatedEvent,
    "response.in_progress": known.ResponseInProgressEvent,
    "response.output_item.added": known.ResponseOutputItemAddedEvent,
    "response.output_item.done": known.ResponseOutputItemDoneEvent,
    "response.content_part.added": known.ResponseContentPartAddedEvent,
    "response.content_part.done": known.ResponseContentPartDoneEvent,
    "response.output_text.delta": known.ResponseTextDeltaEvent,
    "response.output_text.done": known.ResponseTextDoneEvent,
    "response.reasoning_text.delta": known.ResponseReasoningTextDeltaEvent,
    "response.reasoning_text.done": known.ResponseReasoningTextDoneEvent,
    "response.function_call_arguments.delta": (
        known.ResponseFunctionCallArgumentsDeltaEvent
    ),
    "response.function_call_arguments.done": (
        known.ResponseFunctionCallArgumentsDoneEvent
    ),
    "response.completed": known.ResponseCompletedEvent,
    "response.incomplete": known.ResponseIncompleteEvent,
    "response.failed": known.ResponseFailedEvent,
}


def parsed(**fields: Any) -> ResponseRequest:
    return ResponseRequest.model_validate({"input": "Hello", **fields})


def asked(**fields: Any) -> Completion:
    return completion_of(parsed(**fields))


def answer_to(**fields: Any) -> ResponseAnswer:
    return ResponseAnswer(parsed(**fields), response_id="resp_1", created=5)


def streamed(events: list[Event], **fields: Any) -> list[dict[str, Any]]:
    messages = read_stream(encoded(answer_to(**fields).encode, events))
    assert all(name == data["type"] for name, data in messages)
    return [data for _, data in messages]


def test_the_least_request_leaves_everything_to_the_server() -> None:
    assert asked() == Completion(
        model="default_model",
        messages=[{"role": "user", "content": "Hello"}],
        tools=[],
    )


def test_null_is_not_given() -> None:
    nulls = {name: None for name in ResponseRequest.model_fields if name != "input"}

    assert asked(**nulls, conversation=None, prompt=None) == asked()


def test_what_clients_always_send_is_not_used() -> None:
    assert asked(**{name: {"any": ["thing"]} for name in RESPONSES}) == asked()


@pytest.mark.parametrize("nothing", ["", []])
def test_codex_probes_with_nothing(nothing: Any) -> None:
    completion = asked(input=nothing, max_output_tokens=1)

    assert completion.messages == [{"role": "user", "content": ""}]
    assert completion.max_tokens == 1


def test_a_system_message_alone_gets_an_empty_user() -> None:
    assert asked(input=[], instructions="Rules").messages == [
        {"role": "system", "content": "Rules"},
        {"role": "user", "content": ""},
    ]


def test_items_become_messages_of_alternating_roles() -> None:
    text = {"type": "input_text", "text": "Go"}
    completion = asked(
        instructions="Rules",
        input=[
            {"role": "developer", "content": [{"type": "input_text", "text": "Dev"}]},
            {"type": "message", "role": "user", "content": [text, text]},
            {"type": "message", "role": "user", "content": "on"},
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "Hm"}],
                "encrypted_content": None,
            },
            {
                "type": "message",
                "role": "assistant",
                "id": "msg_1",
                "status": "completed",
                "content": [
                    {"type": "output_text", "text": "I ", "annotations": []},
                    {"type": "output_text", "text": "look"},
                ],
            },
            {
                "type": "function_call",
                "call_id": "c1",
                "name": "look",
                "arguments": '{"at": "door"}',
            },
            {
                "type": "function_call",
                "call_id": "c2",
                "name": "look",
                "arguments": "",
            },
            {"type": "function_call_output", "call_id": "c1", "output": "locked"},
            {
                "type": "function_call_output",
                "call_id": "c2",
                "output": [{"type": "input_text", "text": "dark"}],
            },
            {"type": "reasoning", "summary": [], "encrypted_content": "AAAA"},
            {"role": "system", "content": "Later"},
            {"role": "user", "content": "Next"},
        ],
    )

    assert completion.messages == [
        {"role": "system", "content": "Rules\n\nDev\n\nLater"},
        {"role": "user", "content": "Go\n\nGo\n\non"},
        {
            "role": "assistant",
            "content": "I look",
            "reasoning": "Hm",
            "reasoning_content": "Hm",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "look", "arguments": {"at": "door"}},
                },
                {
                    "id": "c2",
                    "type": "function",
                    "function": {"name": "look", "arguments": {}},
                },
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "locked", "name": "look"},
        {"role": "tool", "tool_call_id": "c2", "content": "dark", "name": "look"},
        {"role": "user", "content": "Next"},
    ]


def test_only_functions_are_used_of_the_tools() -> None:
    request = parsed(
        tools=[
            {"type": "web_search", "external_web_access": False},
            LOOK,
            {"type": "namespace", "name": "mcp__docs", "tools": [LOOK]},
            {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}},
        ],
        tool_choice="auto",
    )

    assert request.left_out_tools == [
        "web_search",
        "namespace mcp__docs",
        "custom apply_patch",
    ]
    assert completion_of(request).tools == [
        {
            "type": "function",
            "function": {
                "name": "look",
                "description": "Look",
                "parameters": LOOK["parameters"],
            },
        }
    ]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        ({"type": "function", "name": "look"}, "look"),
    ],
)
def test_a_choice_of_tools(choice: Any, expected: str) -> None:
    assert asked(tools=[LOOK], tool_choice=choice).tool_choice == expected


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {}),
        (
            {"type": "json_schema", "name": "n", "strict": True, "schema": {"a": 1}},
            {"a": 1},
        ),
    ],
)
def test_a_format_is_what_answers_have_to_match(wanted: Any, expected: Any) -> None:
    completion = asked(text={"format": wanted, "verbosity": "low"})

    assert completion.json_schema == expected


def test_sampling_and_logprobs_are_taken() -> None:
    completion = asked(temperature=0.5, top_p=1, top_logprobs=2)

    assert completion.sampling == {"temp": 0.5, "top_p": 1.0}
    assert completion.top_logprobs == 2
    assert asked(include=["message.output_text.logprobs"]).top_logprobs == 0
    assert asked(include=["reasoning.encrypted_content"]).top_logprobs is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"user_location": {}}, "user_location is not supported"),
        ({"conversation": "conv_1"}, "conversation is not supported"),
        ({"prompt": {"id": "p"}}, "prompt is not supported"),
        ({"max_tool_calls": 2}, "max_tool_calls is not supported"),
        ({"background": True}, "background is not supported"),
        ({"input": 5}, "input must be a list"),
        ({"input": ["Hello"]}, "input[0] must be an object"),
        (
            {"input": [{"type": "item_reference", "id": "msg_1"}]},
            "input[0] of type item_reference is not supported",
        ),
        (
            {"input": [{"type": "web_search_call"}]},
            "input[0] of type web_search_call is not supported",
        ),
        ({"input": [{"type": []}]}, "input[0] of type [] is not supported"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0] of type input_image is not supported, only text",
        ),
        (
            {
                "input": [
                    {
                        "type": "function_call_output",
                        "call_id": "c",
                        "output": [{"type": "input_file"}],
                    }
                ]
            },
            "input[0].output[0] of type input_file is not supported, only text",
        ),
        (
            {"input": [{"type": "function_call", "name": "f"}]},
            "input[0].call_id is missing",
        ),
        (
            {"input": [{"role": "tool", "content": ""}]},
            "input[0].role must be 'system', 'developer', 'user' or 'assistant'",
        ),
        (
            {"input": [{"role": "user", "content": "x"}] * 16385},
            "input must have at most 16384 items",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens must be at least 1"),
        ({"tools": [{"type": "function"}]}, "tools[0].name is missing"),
        ({"tools": [{"name": "f"}]}, "tools[0].type is missing"),
        (
            {"tool_choice": {"type": "web_search"}},
            "tool_choice of type web_search is not supported, only function",
        ),
        (
            {"tools": [{"type": "web_search"}], "tool_choice": "required"},
            "tool_choice asks for a call, but there are no tools",
        ),
        (
            {"text": {"format": {"type": "xml"}}},
            "text.format.type must be 'text', 'json_object' or 'json_schema'",
        ),
        ({"instructions": 5}, "instructions must be text"),
        ({"store": "no"}, "store must be true or false"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(fields: Any, message: str) -> None:
    assert refusal(ResponseRequest, {"input": "Hi", **fields}).message == message


@settings(deadline=None, max_examples=30)
@given(completions())
def test_a_kept_conversation_goes_on(events: list[Event]) -> None:
    first = parsed(instructions="Not kept", store=True)
    response = ResponseAnswer(first).whole(events)
    items = json.loads(json.dumps(conversation_items(first, response)))
    second = parsed(input="Next", previous_response_id=response["id"])
    third = joined(second, items)
    kept = conversation_items(third, {"output": []})

    assert completion_of(third).messages == [
        *(asked(input=[*items, {"role": "user", "content": "Next"}]).messages or ()),
    ]
    assert (completion_of(third).messages or ())[0]["content"].startswith("Hello")
    # What is kept again is the same.
    assert (
        asked(input=json.loads(json.dumps(kept))).messages
        == completion_of(third).messages
    )


@settings(deadline=None, max_examples=30)
@given(completions(has_logprobs=True))
def test_streamed_responses_say_what_whole_ones_say(events: list[Event]) -> None:
    messages = streamed(events, top_logprobs=1)
    output: list[dict[str, Any]] = []
    for message in messages:
        match message["type"].split(".")[1:]:
            case ["output_item", "added"]:
                assert message["output_index"] == len(output)
                output.append(message["item"])
            case ["output_item", "done"]:
                joined_item = {**output[-1], "status": message["item"]["status"]}
                assert joined_item == message["item"]
            case ["content_part", "added"]:
                output[-1]["content"].append(message["part"])
            case ["content_part", "done"]:
                part = output[-1]["content"][message["content_index"]]
                assert part["text"] == message["part"]["text"]
                output[-1]["content"] = [message["part"]]
            case ["function_call_arguments", "delta"]:
                assert message["delta"]
                output[-1]["arguments"] += message["delta"]
            case ["function_call_arguments", "done"]:
                assert output[-1]["arguments"] == message["arguments"]
            case [_, "delta"]:
                assert message["delta"]
                assert message["item_id"] == output[-1]["id"]
                output[-1]["content"][message["content_index"]]["text"] += message[
                    "delta"
                ]
            case [_, "done"]:
                assert output[-1]["content"][0]["text"] == message["text"]

    last = messages[-1]["response"]
    assert [message["sequence_number"] for message in messages] == [
        *range(len(messages))
    ]
    assert last == answer_to(top_logprobs=1).whole(events)
    assert [{**i, "status": 0} for i in output] == [
        {**i, "status": 0} for i in last["output"]
    ]


@settings(deadline=None, max_examples=30)
@given(completions(has_logprobs=True))
def test_events_have_openais_form(events: list[Event]) -> None:
    for message in streamed(events, top_logprobs=1, tools=[LOOK]):
        event = EVENTS[message["type"]].model_validate(message, strict=True)
        assert unknown_fields(event) == set()


@settings(deadline=None, max_examples=30)
@given(completions(has_logprobs=True))
def test_whole_responses_have_openais_form(events: list[Event]) -> None:
    choice = {"type": "function", "name": "look"}
    wanted = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    answer = answer_to(tools=[LOOK], tool_choice=choice, text=wanted, top_logprobs=1)
    whole = answer.whole(events)

    json.dumps(whole, allow_nan=False)
    assert unknown_fields(Response.model_validate(whole)) == set()


def test_events_come_in_openais_order() -> None:
    events = [
        Progress(1, 2),
        Started(Usage(7, 5)),
        ReasoningDelta("Hm"),
        TextDelta("Hi", logprobs=(TokenLogprob("Hi", 3, -1, b"Hi"),)),
        TextDelta("!"),
        ToolCall("c1", "look", "{}"),
        AnswerEnd("tool_calls"),
        Finished(Usage(7, 5, 4, 1)),
    ]
    messages = streamed(events)

    assert [message["type"].removeprefix("response.") for message in messages] == [
        "created",
        "in_progress",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    response = messages[-1]["response"]
    assert [item["type"] for item in response["output"]] == [
        "reasoning",
        "message",
        "function_call",
    ]
    assert response["output"][1]["content"][0]["logprobs"] == []
    assert response["output"][2]["call_id"] == "c1"
    assert response["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 11,
    }


def test_a_prompt_that_takes_long_keeps_the_connection() -> None:
    """A comment for proxies, and an event for Codex, which counts only those."""
    answer = answer_to()
    answer.begin()
    comment, again = answer.encode(Progress(1, 2))

    assert comment == b": keepalive 1/2\n\n"
    assert read_stream([again])[0][0] == "response.in_progress"


def test_a_response_that_is_cut_is_incomplete() -> None:
    events = [
        Started(Usage(1)),
        TextDelta("Hi"),
        AnswerEnd("length"),
        Finished(Usage(1)),
    ]
    whole = answer_to().whole(events)

    assert streamed(events)[-1]["type"] == "response.incomplete"
    assert whole["status"] == "incomplete"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert whole["output"][0]["status"] == "incomplete"


def test_an_error_fails_a_response() -> None:
    error = ApiError(400, "invalid_request_error", "context_length_exceeded", None, "!")
    messages = [data for _, data in read_stream(answer_to().encode_error(error))]

    assert [message["type"] for message in messages] == [
        "response.created",
        "response.in_progress",
        "response.failed",
    ]
    assert messages[-1]["response"]["status"] == "failed"
    assert messages[-1]["response"]["error"] == {
        "code": "context_length_exceeded",
        "message": "!",
    }


def test_a_response_tells_what_was_asked_for() -> None:
    whole = answer_to(
        model="m", tools=[LOOK, {"type": "web_search"}], instructions="Rules",
        tool_choice={"type": "function", "name": "look"}, max_output_tokens=5,
        previous_response_id="resp_0",
    ).whole([Started(Usage(1)), AnswerEnd("stop"), Finished(Usage(1))])  # fmt: skip

    assert whole["model"] == "m"
    assert whole["tools"] == [LOOK]
    assert whole["tool_choice"] == {"type": "function", "name": "look"}
    assert whole["instructions"] == "Rules"
    assert whole["max_output_tokens"] == 5
    assert whole["previous_response_id"] == "resp_0"
