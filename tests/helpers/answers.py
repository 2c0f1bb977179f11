"""Events of completions at random, and what a client reads in a stream."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from promptcache.server.api.errors import ApiError, validation_error
from promptcache.server.completion import (
    AnswerEnd,
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

# Also what some clients take for ends of lines, and what no number of JSON is.
TEXTS = st.text(max_size=8) | st.sampled_from(["", "\n\n", "\u2028", "data: [DONE]"])
LOGPROBS = st.floats(max_value=0) | st.sampled_from([float("-inf"), float("nan")])
COUNTS = st.integers(min_value=0, max_value=2**40)


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    prompt, completion = draw(COUNTS), draw(COUNTS)
    cached = draw(st.integers(min_value=0, max_value=prompt))
    reasoning = draw(st.integers(min_value=0, max_value=completion))
    return Usage(prompt, cached, completion, reasoning)


@st.composite
def token_logprobs(draw: st.DrawFn, depth: int = 1) -> TokenLogprob:
    text = draw(TEXTS)
    top = draw(st.lists(token_logprobs(0), max_size=2)) if depth else []
    logprob = draw(LOGPROBS)
    return TokenLogprob(text, draw(COUNTS), logprob, text.encode(), tuple(top))


@st.composite
def answer_events(draw: st.DrawFn, index: int, *, has_logprobs: bool) -> list[Event]:
    """Return the events of one answer."""
    tokens = st.lists(token_logprobs(), max_size=2 * has_logprobs).map(tuple)
    deltas = st.one_of(
        st.builds(TextDelta, TEXTS, st.just(index), tokens),
        st.builds(ReasoningDelta, TEXTS, st.just(index), tokens),
        st.builds(
            ToolCall,
            st.uuids().map(lambda value: f"call_{value.hex}"),
            st.text(min_size=1, max_size=8),
            st.sampled_from(
                ['{"a": [1, "é"]}', "{}", "", "no JSON", "[1]", '"\\ud800"']
            ),
            st.just(index),
        ),
    )
    reason = draw(st.sampled_from(["stop", "length", "tool_calls"]))
    stop = draw(st.sampled_from([None, "END"])) if reason == "stop" else None
    return [*draw(st.lists(deltas, max_size=8)), AnswerEnd(reason, stop, index)]


@st.composite
def completions(
    draw: st.DrawFn, *, num_answers: int = 1, has_logprobs: bool = False
) -> list[Event]:
    """Return the events of a completion, those of its answers mixed."""
    left = [
        draw(answer_events(index, has_logprobs=has_logprobs))
        for index in range(num_answers)
    ]
    mixed: list[Event] = []
    while left:
        number = draw(st.integers(min_value=0, max_value=len(left) - 1))
        mixed.append(left[number].pop(0))
        left = [events for events in left if events]
    progress = draw(st.lists(st.builds(Progress, COUNTS, COUNTS), max_size=2))
    started = Started(draw(usages()))
    return [*progress, started, *mixed, Finished(draw(usages()))]


def read_stream(messages: Iterable[bytes]) -> list[tuple[str | None, Any]]:
    """Return the events that a client reads, each a name and its data."""
    return [
        (event, "[DONE]" if data == "[DONE]" else json.loads(data))
        for event, data in _messages_in(b"".join(messages).decode())
    ]


def _messages_in(text: str) -> Iterator[tuple[str | None, str]]:
    for block in text.split("\n\n"):
        # As careless clients split lines.
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line)
        if "data" in fields:
            yield fields.get("event"), fields["data"]


def encoded(
    encode: Callable[[Event], list[bytes]], events: Iterable[Event]
) -> list[bytes]:
    """Return the messages of all events."""
    return [message for event in events for message in encode(event)]


def unknown_fields(value: Any) -> set[str]:
    """Return the fields that a client's own models do not know."""
    if isinstance(value, BaseModel):
        own = [getattr(value, name) for name in type(value).model_fields]
        return {*(value.model_extra or {})}.union(*map(unknown_fields, own))
    if isinstance(value, list):
        return set[str]().union(*map(unknown_fields, value))
    return set()


def refusal(model: type[BaseModel], body: Any) -> ApiError:
    """Return why a request is refused."""
    try:
        model.model_validate(body)
    except ValidationError as error:
        return validation_error(error)
    raise AssertionError(f"not refused: {body}")
