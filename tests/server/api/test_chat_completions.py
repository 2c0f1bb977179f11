"""Chat completions: requests to completions, and events to answers."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from promptcache.server.api.chat_completions import (
    ChatAnswer,
    ChatRequest,
    completion_of,
)
from promptcache.server.api.errors import ApiError
from promptcache.server.api.ignored import CHAT
from promptcache.server.completion import (
    AnswerEnd,
    Completion,
    Event,
    Finished,
    Progress,
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

USER = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "look", "strict": True}}


def asked(**fields: Any) -> Completion:
    return completion_of(ChatRequest.model_validate({"messages": [USER], **fields}))


def refused(**fields: Any) -> str:
    return refusal(ChatRequest, {"messages": [USER], **fields}).message


def answer_to(**fields: Any) -> ChatAnswer:
    request = ChatRequest.model_validate({"messages": [USER], **fields})
    return ChatAnswer(request, answer_id="chatcmpl-1", created=5)


def test_the_least_request_leaves_everything_to_the_server() -> None:
    assert asked() == Completion(
        model="default_model", messages=[USER], tools=[], stop=[]
    )


def test_null_is_not_given() -> None:
    nulls = {name: None for name in ChatRequest.model_fields if name != "messages"}

    assert asked(**nulls, audio=None, user_location=None) == asked()


def test_what_clients_always_send_is_not_used() -> None:
    assert asked(**{name: {"any": ["thing"]} for name in CHAT}) == asked()


def test_sampling_has_the_names_of_mlx_lm() -> None:
    completion = asked(
        temperature=1, top_p=0.5, top_k=3, min_p=0.1, seed=2**63 - 1,
        xtc_probability=0.5, xtc_threshold=0.5, repetition_penalty=1.1,
        repetition_context_size=0, presence_penalty=-2, presence_context_size=1,
        frequency_penalty=2, frequency_context_size=2,
    )  # fmt: skip

    assert completion.sampling == {
        "temp": 1.0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 2**63 - 1,
        "xtc_probability": 0.5, "xtc_threshold": 0.5, "repetition_penalty": 1.1,
        "repetition_context_size": 0, "presence_penalty": -2.0,
        "presence_context_size": 1, "frequency_penalty": 2.0,
        "frequency_context_size": 2,
    }  # fmt: skip


def test_a_temperature_near_zero_is_zero() -> None:
    assert asked(temperature=1e-300).sampling == {"temp": 0.0}


def test_the_other_fields_are_taken() -> None:
    completion = asked(
        model="m", max_tokens=5, max_completion_tokens=4, stop="END", n=16,
        logit_bias={"7": -100}, logprobs=True, top_logprobs=20, adapters="a",
        draft_model="d", num_draft_tokens=3, chat_template_kwargs={"x": [1]},
        reasoning_effort="high", response_format={"type": "json_object"},
    )  # fmt: skip

    assert completion == Completion(
        model="m", messages=[USER], tools=[], max_tokens=4, stop=["END"],
        num_answers=16, logit_bias={7: -100.0}, top_logprobs=20, adapter="a",
        draft_model="d", num_draft_tokens=3, json_schema={},
        chat_template_config={"reasoning_effort": "high", "x": [1]},
    )  # fmt: skip


def test_the_default_draft_model_is_the_servers() -> None:
    assert asked(draft_model="default_model").draft_model is None


def test_logprobs_are_told_where_they_are_asked_for() -> None:
    assert asked(logprobs=True).top_logprobs == 0
    assert asked(top_logprobs=2).top_logprobs == 2
    assert asked(logprobs=False, top_logprobs=0).top_logprobs is None


def test_a_schema_is_what_answers_have_to_match() -> None:
    schema = {"type": "object", "title": "x"}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}

    assert asked(response_format=wanted).json_schema == schema
    assert asked(response_format={"type": "text"}).json_schema is None


def test_messages_have_the_form_of_templates() -> None:
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "look", "arguments": '{"at": "door"}'},
    }
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    completion = asked(
        messages=[
            {"role": "developer", "content": "Rules", "name": None},
            {"role": "user", "content": parts, "name": "Ann"},
            {
                "role": "assistant",
                "content": None,
                "reasoning": "Hm",
                "tool_calls": [call],
                "refusal": None,
                "audio": None,
            },
            {"role": "tool", "tool_call_id": "c1", "content": "locked"},
            {"role": "tool", "tool_call_id": "c2", "content": "?"},
        ]
    )

    assert completion.messages == [
        {"role": "system", "content": "Rules"},
        {"role": "user", "content": "ab", "name": "Ann"},
        {
            "role": "assistant",
            "content": "",
            "reasoning": "Hm",
            "reasoning_content": "Hm",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "look", "arguments": {"at": "door"}},
                }
            ],
        },
        {"role": "tool", "content": "locked", "tool_call_id": "c1", "name": "look"},
        {"role": "tool", "content": "?", "tool_call_id": "c2"},
    ]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (" ", {}),
        ("[1]", "[1]"),
        ("{", "{"),
        ('{"a": NaN}', '{"a": NaN}'),
        ('{"a": 1e999}', '{"a": 1e999}'),
        ('{"a": "\\ud800"}', '{"a": "\\ud800"}'),
        ('{"a":' * 5000, '{"a":' * 5000),
        ('{"a": ' + "9" * 5000 + "}", '{"a": ' + "9" * 5000 + "}"),
    ],
)
def test_arguments_are_an_object_where_they_are_one(told: Any, expected: Any) -> None:
    call = {"function": {"name": "f", "arguments": told}}
    (message,) = (
        asked(messages=[{"role": "assistant", "tool_calls": [call]}]).messages or ()
    )

    assert message["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": expected}}
    ]


def test_tools_have_the_form_of_templates() -> None:
    described = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    completion = asked(tools=[TOOL, {"type": "function", "function": described}])

    assert completion.tools == [
        {
            "type": "function",
            "function": {
                "name": "look",
                "parameters": {"type": "object", "properties": {}},
            },
        },
        {"type": "function", "function": described},
    ]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        ({"type": "function", "function": {"name": "look"}}, "look"),
    ],
)
def test_a_choice_of_tools(choice: Any, expected: str) -> None:
    assert asked(tools=[TOOL], tool_choice=choice).tool_choice == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"user_location": {}}, "user_location is not supported"),
        ({"role_mapping": {}}, "role_mapping is not supported"),
        ({"functions": []}, "functions is not supported"),
        ({"audio": {"voice": "x"}}, "audio is not supported"),
        ({"prediction": {}}, "prediction is not supported"),
        ({"web_search_options": {}}, "web_search_options is not supported"),
        ({"modalities": ["audio"]}, "modalities[0] must be 'text'"),
        ({"messages": []}, "messages must not be empty"),
        ({"messages": None}, "messages is missing"),
        ({"messages": "Hello"}, "messages must be a list"),
        ({"messages": ["Hello"]}, "messages[0] must be an object"),
        ({"messages": [USER] * 4097}, "messages must have at most 4096 items"),
        ({"messages": [{"content": "x"}]}, "messages[0].role is missing"),
        (
            {"messages": [{"role": "function"}]},
            "messages[0].role must be "
            "'system', 'developer', 'user', 'assistant' or 'tool'",
        ),
        (
            {"messages": [{"role": "assistant", "function_call": {}}]},
            "messages[0].function_call is not supported",
        ),
        (
            {"messages": [{"role": "assistant", "audio": {"id": "1"}}]},
            "messages[0].audio is not supported",
        ),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content must be text or a list of parts",
        ),
        (
            {"messages": [{"role": "user", "content": "\ud800"}]},
            "messages[0].content is not valid Unicode",
        ),
        ({"model": ""}, "model must not be empty"),
        ({"model": "m" * 1001}, "model must have at most 1000 characters"),
        ({"stream": 1}, "stream must be true or false"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": 2**31}, "max_tokens must be at most 2147483647"),
        ({"max_tokens": 1.0}, "max_tokens must be an integer"),
        ({"max_tokens": True}, "max_tokens must be an integer"),
        ({"n": 17}, "n must be at most 16"),
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"temperature": True}, "temperature must be a number"),
        ({"temperature": "1"}, "temperature must be a number"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        (
            {"temperature": 10**400},
            "temperature must be at most 2147483647 in size",
        ),
        ({"top_p": 1.1}, "top_p must be at most 1"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_k": True}, "top_k must be an integer"),
        ({"xtc_threshold": 0.6}, "xtc_threshold must be at most 0.5"),
        (
            {"repetition_penalty": 1e-9},
            "repetition_penalty must be 0 or at least 0.01",
        ),
        (
            {"presence_context_size": 2**62},
            "presence_context_size must be at most 1048576",
        ),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**63}, "seed must be less than 9223372036854775808"),
        ({"stop": ""}, "stop must have 1 to 1000 characters"),
        ({"stop": ["a", ""]}, "stop[1] must have 1 to 1000 characters"),
        ({"stop": ["x" * 1001]}, "stop[0] must have 1 to 1000 characters"),
        ({"stop": ["x"] * 17}, "stop must have at most 16 texts"),
        ({"stop": [1]}, "stop[0] must be text"),
        ({"stop": 1}, "stop must be text or a list of texts"),
        ({"stop": "\ud800"}, "stop is not valid Unicode"),
        ({"logit_bias": []}, "logit_bias must be an object"),
        ({"logit_bias": {"x": 1}}, "logit_bias must have token ids as keys"),
        ({"logit_bias": {"-1": 1}}, "logit_bias must have token ids as keys"),
        ({"logit_bias": {"²": 1}}, "logit_bias must have token ids as keys"),
        ({"logit_bias": {str(2**31): 1}}, "logit_bias must have token ids as keys"),
        (
            {"logit_bias": {"1": True}},
            "logit_bias.1 must be a number in [-100, 100]",
        ),
        (
            {"logit_bias": {"1": -101}},
            "logit_bias.1 must be a number in [-100, 100]",
        ),
        (
            {"logit_bias": {str(i): 0 for i in range(1025)}},
            "logit_bias must have at most 1024 tokens",
        ),
        ({"top_logprobs": 21}, "top_logprobs must be at most 20"),
        ({"tools": [TOOL] * 1025}, "tools must have at most 1024 items"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type must be 'function'"),
        ({"tools": [{"function": {}}]}, "tools[0].function.name is missing"),
        (
            {"tool_choice": "any"},
            "tool_choice must be auto, none, required or an object",
        ),
        (
            {"tool_choice": {"type": "allowed_tools"}},
            "tool_choice of type allowed_tools is not supported, only function",
        ),
        (
            {"tool_choice": {"type": "function"}},
            "tool_choice.function.name must be the name of a function",
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice names f, which is not among the tools",
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "none"}}},
            "tool_choice cannot name a function none",
        ),
        (
            {"tool_choice": "required"},
            "tool_choice asks for a call, but there are no tools",
        ),
        (
            {"response_format": {"type": "grammar"}},
            "response_format.type must be 'text', 'json_object' or 'json_schema'",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema is missing",
        ),
        (
            {"chat_template_kwargs": {"a": float("inf")}},
            "chat_template_kwargs.a must be a finite number",
        ),
    ],
)
def test_what_is_wrong_is_told_in_a_line(fields: Any, message: str) -> None:
    assert refused(**fields) == message


@pytest.mark.parametrize(
    "kind", ["image_url", "input_audio", "file", "image", "input_image", "video"]
)
def test_what_is_not_text_is_refused_by_name(kind: str) -> None:
    part = {"type": kind, kind: {"url": "https://example.com"}}
    content = [{"type": "text", "text": "See"}, part]

    assert refused(messages=[{"role": "user", "content": content}]) == (
        f"messages[0].content[1] of type {kind} is not supported, only text"
    )


@pytest.mark.parametrize(
    "name",
    [
        "chat_template", "tokenizer", "messages", "tools", "add_generation_prompt",
        "tokenize", "conversation", "return_dict",
    ],
)  # fmt: skip
def test_arguments_that_are_not_the_templates_are_refused(name: str) -> None:
    assert refused(chat_template_kwargs={name: 1}) == (
        f"chat_template_kwargs.{name} is not an argument of chat templates"
    )


def test_what_is_nested_too_deeply_is_refused() -> None:
    value: Any = 1
    for _ in range(900):
        value = [value]

    assert refused(chat_template_kwargs={"x": value}) == (
        "chat_template_kwargs is nested too deeply"
    )


def test_the_schema_tells_also_what_is_not_used() -> None:
    properties = ChatRequest.model_json_schema()["properties"]

    assert {*CHAT, "messages", "stop", "tool_choice"} <= properties.keys()


def joined_choices(chunks: list[Any], num_answers: int) -> list[Any]:
    """Return the choices of a whole answer, as a client joins them."""
    choices: list[Any] = [
        {
            "index": index,
            "message": {"role": "assistant", "content": None},
            "logprobs": None,
            "finish_reason": None,
        }
        for index in range(num_answers)
    ]
    for told in (choice for chunk in chunks for choice in chunk["choices"]):
        choice = choices[told["index"]]
        message, delta = choice["message"], told["delta"]
        assert "" not in delta.values()
        for name in ("content", "reasoning"):
            if name in delta:
                message[name] = (message.get(name) or "") + delta[name]
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            assert call["index"] == len(calls)
            calls.append({k: v for k, v in call.items() if k != "index"})
        if told["logprobs"]:
            empty = {"content": [], "refusal": None}
            choice["logprobs"] = choice["logprobs"] or empty
            choice["logprobs"]["content"] += told["logprobs"]["content"]
        choice["finish_reason"] = told["finish_reason"] or choice["finish_reason"]
    return choices


@settings(deadline=None, max_examples=30)
@given(completions(num_answers=2, has_logprobs=True))
def test_streamed_answers_say_what_whole_ones_say(events: list[Event]) -> None:
    options = {"n": 2, "stream_options": {"include_usage": True}, "logprobs": True}
    whole = answer_to(**options).whole(events)
    *streamed, (_, done) = read_stream(encoded(answer_to(**options).encode, events))
    chunks = [data for _, data in streamed]

    assert done == "[DONE]"
    for choice in whole["choices"]:
        # Without tokens there is nothing to stream.
        choice["logprobs"] = choice["logprobs"]["content"] and choice["logprobs"]
    choices = joined_choices(chunks, 2)
    assert [{**c, "logprobs": c["logprobs"] or []} for c in choices] == whole["choices"]
    assert [chunk["usage"] for chunk in chunks if "usage" in chunk] == [whole["usage"]]
    for chunk in chunks:
        known = ChatCompletionChunk.model_validate(chunk, strict=True)
        assert unknown_fields(known) <= {"reasoning"}


@settings(deadline=None, max_examples=30)
@given(completions(num_answers=2))
def test_openais_client_reads_streams(events: list[Event]) -> None:
    state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    for _, data in read_stream(encoded(answer_to(n=2).encode, events)):
        if data != "[DONE]":
            list(state.handle_chunk(ChatCompletionChunk.model_validate(data)))
    read = state.current_completion_snapshot.to_dict()["choices"]
    assert isinstance(read, list)

    whole = answer_to(n=2).whole(events)
    for found, expected in zip(read, whole["choices"], strict=True):
        assert found["finish_reason"] == expected["finish_reason"]
        message = {k: v for k, v in found["message"].items() if v is not None}
        for call in message.get("tool_calls", ()):
            # OpenAI's client keeps the place, and parses the arguments.
            del call["index"]
            call["function"].pop("parsed_arguments", None)
        message.pop("parsed", None)
        assert {"content": None, **message} == expected["message"]


@settings(deadline=None, max_examples=30)
@given(completions(num_answers=3, has_logprobs=True))
def test_whole_answers_have_openais_form(events: list[Event]) -> None:
    whole = answer_to(n=3, logprobs=True).whole(events)

    json.dumps(whole, allow_nan=False)
    known = ChatCompletion.model_validate(whole, strict=True)
    assert unknown_fields(known) <= {"reasoning"}


def test_an_answer() -> None:
    token = TokenLogprob("Hi", 3, -0.5, b"Hi", (TokenLogprob("Yo", 4, -9e9, b"Yo"),))
    events = [
        Progress(1, 2),
        Started(Usage(7, 5)),
        TextDelta("", logprobs=(token,)),
        TextDelta("Hi"),
        ToolCall("c1", "look", "{}"),
        AnswerEnd("tool_calls"),
        Finished(Usage(7, 5, 4, 1)),
    ]
    logprobs = {
        "content": [
            {
                "token": "Hi",
                "logprob": -0.5,
                "bytes": [72, 105],
                "top_logprobs": [
                    {"token": "Yo", "logprob": -9999.0, "bytes": [89, 111]}
                ],
            }
        ],
        "refusal": None,
    }
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "look", "arguments": "{}"},
    }
    messages = encoded(answer_to(logprobs=True).encode, events)

    assert messages[0] == b": keepalive 1/2\n\n"
    assert messages[-1] == b"data: [DONE]\n\n"
    assert [
        data["choices"][0] for _, data in read_stream(messages) if data != "[DONE]"
    ] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": "Hi"},
            "logprobs": logprobs,
            "finish_reason": None,
        },
        {
            "index": 0,
            "delta": {"tool_calls": [{"index": 0, **call}]},
            "logprobs": None,
            "finish_reason": None,
        },
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "tool_calls"},
    ]
    assert answer_to(logprobs=True).whole(events) == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 5,
        "model": "default_model",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hi",
                    "tool_calls": [call],
                },
                "logprobs": logprobs,
                "finish_reason": "tool_calls",
            }
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 4,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 5},
            "completion_tokens_details": {"reasoning_tokens": 1},
        },
    }


def test_an_error_ends_a_stream() -> None:
    error = ApiError(500, "server_error", None, None, "it broke")

    assert read_stream(answer_to().encode_error(error)) == [
        (
            None,
            {
                "error": {
                    "message": "it broke",
                    "type": "server_error",
                    "param": None,
                    "code": None,
                }
            },
        )
    ]
