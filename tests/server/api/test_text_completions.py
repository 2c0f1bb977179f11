"""Text completions: requests to completions, and events to answers."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from openai.types import Completion as OpenAICompletion

from promptcache.server.api.ignored import TEXT
from promptcache.server.api.text_completions import (
    TextAnswer,
    TextRequest,
    completion_of,
)
from promptcache.server.completion import (
    AnswerEnd,
    Completion,
    Event,
    Finished,
    Started,
    TextDelta,
    TokenLogprob,
    Usage,
)
from tests.helpers.answers import (
    completions,
    encoded,
    read_stream,
    refusal,
    unknown_fields,
)


def asked(**fields: Any) -> Completion:
    return completion_of(TextRequest.model_validate({"prompt": "Once", **fields}))


def answer_to(**fields: Any) -> TextAnswer:
    request = TextRequest.model_validate({"prompt": "Once", **fields})
    return TextAnswer(request, answer_id="cmpl-1", created=5, system_fingerprint="f")


@pytest.mark.parametrize("prompt", ["Once", [1, 2], ["Once"], [[1, 2]]])
def test_a_prompt_is_text_or_token_ids(prompt: Any) -> None:
    expected = "Once" if "Once" in prompt else [1, 2]

    assert asked(prompt=prompt) == Completion(
        model="default_model", prompt=expected, stop=[]
    )


def test_null_is_not_given() -> None:
    nulls = {name: None for name in TextRequest.model_fields if name != "prompt"}

    assert asked(**nulls, user_location=None) == asked()


def test_what_asks_for_nothing_is_taken() -> None:
    assert asked(best_of=1, echo=False, suffix="") == asked()


def test_what_clients_always_send_is_not_used() -> None:
    assert asked(**dict.fromkeys(TEXT, "x")) == asked()


@pytest.mark.parametrize(
    ("told", "expected"), [(0, 0), (5, 5), (True, 0), (False, None), (None, None)]
)
def test_logprobs_are_a_number_or_as_in_mlx_lm(told: Any, expected: Any) -> None:
    assert asked(logprobs=told).top_logprobs == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": ""}, "prompt must not be empty"),
        ({"prompt": []}, "prompt must not be empty"),
        ({"prompt": [[]]}, "prompt must not be empty"),
        ({"prompt": 5}, "prompt must be text or a list of token ids"),
        ({"prompt": [True]}, "prompt must have token ids in [0, 2147483647]"),
        ({"prompt": [2**31]}, "prompt must have token ids in [0, 2147483647]"),
        ({"prompt": [1, "a"]}, "prompt must have token ids in [0, 2147483647]"),
        (
            {"prompt": ["a", "b"]},
            "prompt must be one prompt, several are not supported",
        ),
        ({"prompt": "\ud800"}, "prompt is not valid Unicode"),
        ({"echo": True}, "echo is not supported"),
        ({"suffix": "x"}, "suffix is not supported"),
        ({"best_of": 2}, "best_of must be 1"),
        ({"tools": []}, "tools is not supported"),
        ({"messages": []}, "messages is not supported"),
        ({"logprobs": 21}, "logprobs must be an integer in [0, 20]"),
        ({"logprobs": 1.5}, "logprobs must be an integer in [0, 20]"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(fields: Any, message: str) -> None:
    assert refusal(TextRequest, {"prompt": "Once", **fields}).message == message


@settings(deadline=None, max_examples=30)
@given(completions(num_answers=2, has_logprobs=True))
def test_streamed_answers_say_what_whole_ones_say(events: list[Event]) -> None:
    options = {"n": 2, "stream_options": {"include_usage": True}, "logprobs": 1}
    whole = answer_to(**options).whole(events)
    *streamed, (_, done) = read_stream(encoded(answer_to(**options).encode, events))
    joined: list[Any] = [
        {
            "index": index,
            "text": "",
            "logprobs": {
                name: []
                for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            },
            "finish_reason": None,
        }
        for index in range(2)
    ]
    for _, chunk in streamed:
        for told in chunk["choices"]:
            choice = joined[told["index"]]
            assert told["text"] or told["finish_reason"]
            choice["text"] += told["text"]
            choice["finish_reason"] = told["finish_reason"]
            for name, values in (told["logprobs"] or {}).items():
                choice["logprobs"][name] += values

    assert done == "[DONE]"
    assert joined == whole["choices"]
    assert streamed[-1][1]["usage"] == whole["usage"]


@settings(deadline=None, max_examples=30)
@given(completions(num_answers=2, has_logprobs=True))
def test_whole_answers_have_openais_form(events: list[Event]) -> None:
    whole = answer_to(n=2, logprobs=1).whole(events)

    json.dumps(whole, allow_nan=False)
    known = OpenAICompletion.model_validate(whole, strict=True)
    assert unknown_fields(known) == set()


def test_an_answer() -> None:
    top = (TokenLogprob("On", 3, -0.5, b"On"), TokenLogprob("A", 4, -2, b"A"))
    events = [
        Started(Usage(1)),
        TextDelta("On", logprobs=(TokenLogprob("On", 3, -0.5, b"On", top),)),
        TextDelta("ce", logprobs=(TokenLogprob("ce", 5, -0.25, b"ce"),)),
        AnswerEnd("length"),
        Finished(Usage(1, 0, 2)),
    ]

    assert answer_to(logprobs=2).whole(events) == {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 5,
        "model": "default_model",
        "system_fingerprint": "f",
        "choices": [
            {
                "index": 0,
                "text": "Once",
                "logprobs": {
                    "tokens": ["On", "ce"],
                    "token_logprobs": [-0.5, -0.25],
                    "top_logprobs": [{"On": -0.5, "A": -2}, {}],
                    "text_offset": [0, 2],
                },
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": 1,
            "completion_tokens": 2,
            "total_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }
