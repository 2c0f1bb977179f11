"""Answers: the tokens of a generation as text, reasoning and calls of tools.

What mlx-lm knows of a model's format is used: its text state machine and its parsers of
calls.
"""

import json
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.generate import TextStateMachine, make_text_state_machine

from promptcache.engine.decode import Step
from promptcache.prompts.chat import Message
from promptcache.server.completion import (
    AnswerEnd,
    Event,
    FinishReason,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCall,
)

REASONING, TOOL = "reasoning", "tool"


class StopTexts:
    """Finds where a text ends that comes piece by piece.

    What may be the start of a stop text is held back until that is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None

    def take(self, text: str) -> str:
        """Return how much more of the text is known to come before any stop text."""
        text = self._held + text
        places = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if places:
            # The one that is complete first, as if characters came one by one.
            end, self.found = min(places, key=lambda p: (p[0] + len(p[1]), p[0]))
            self._held = ""
            return text[:end]
        num_held = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def end(self) -> str:
        """Return what is held back, as nothing follows it."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Return how many characters at a text's end are the start of a stop text."""
        longest = min(len(text), len(stop) - 1)
        lengths = (n for n in range(longest, 0, -1) if text.endswith(stop[:n]))
        return next(lengths, 0)


class AnswerParser:
    """Makes events of the tokens of one answer.

    Stop texts end the text that people see, exactly before their first character.
    Those in reasoning or in a call do not count, as for OpenAI.

    Attributes:
        is_done: Whether a stop text has ended the answer.
        num_tokens: How many tokens it has taken.
        num_reasoning: How many of them were reasoning.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[int] = (),
        *,
        tools: Sequence[Message] = (),
        stop: Sequence[str] = (),
        top_logprobs: int | None = None,
        index: int = 0,
        is_chat: bool = True,
        make_id: Callable[[], str] = lambda: f"call_{uuid.uuid4().hex[:24]}",
    ) -> None:
        """Take what the answer is to.

        Args:
            tokenizer: mlx-lm's wrapper of the model's tokenizer.
            prompt_ids: The prompt, which may end inside of reasoning.
            tools: The functions that may be called.
            stop: Texts that end it.
            top_logprobs: How many likely tokens to tell, None for no log-probabilities.
            index: Which of a completion's answers it is.
            is_chat: Whether it may hold reasoning and calls.
            make_id: Makes the id of a call.
        """
        self.is_done = False
        self.num_tokens = 0
        self.num_reasoning = 0
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer
        self._tools = list(tools) or None
        self._stops = StopTexts(stop)
        self._top_logprobs = top_logprobs
        self._index = index
        self._make_id = make_id
        machine = make_text_state_machine(tokenizer) if is_chat else TextStateMachine()
        initial = initial_state(tokenizer, prompt_ids) if is_chat else "normal"
        self._machine = machine.make_state(initial)
        self._state = initial
        self._call = ""
        self._has_called = False

    def take(self, step: Step, finish_reason: str | None) -> list[Event]:
        """Return what a token adds; with the last one, the answer ends.

        Args:
            step: The token.
            finish_reason: "stop" for one that is no part of the answer, "length" for
                the last that may be generated, else None.
        """
        self.num_tokens += 1
        logprobs: tuple[TokenLogprob, ...] = ()
        if finish_reason != "stop":
            self._detokenizer.add_token(step.token)
            logprobs = self._logprobs(step)
        if finish_reason is not None:
            self._detokenizer.finalize()
        events = [*self._events(self._detokenizer.last_segment)]
        if finish_reason is not None and not self.is_done:
            events += self._flush()
        self.num_reasoning += self._state == REASONING
        events = _with_logprobs(_joined(events), logprobs, self._index)
        if self.is_done:
            events.append(AnswerEnd("stop", self._stops.found, self._index))
        elif finish_reason is not None:
            reason: FinishReason = "length" if finish_reason == "length" else "stop"
            is_call = self._has_called and reason == "stop"
            reason = "tool_calls" if is_call else reason
            events.append(AnswerEnd(reason, None, self._index))
        return events

    def _events(self, text: str) -> Iterator[Event]:
        """Yield what more text adds."""
        self._machine, segments = TextStateMachine.split(self._machine, text)
        for state, segment in segments:
            yield from self._segment(state, segment)

    def _segment(self, state: str, text: str) -> Iterator[Event]:
        if self.is_done:
            return
        if self._state == TOOL and state != TOOL:
            yield from self._end_call()
        self._state = state
        if state == TOOL:
            self._call += text
        elif state == REASONING:
            if text:
                yield ReasoningDelta(text, self._index)
        elif text := self._stops.take(text):
            yield TextDelta(text, self._index)
        self.is_done = self._stops.found is not None

    def _flush(self) -> Iterator[Event]:
        """Yield what was held back, as nothing follows it."""
        self._machine, text, state = TextStateMachine.flush(self._machine)
        yield from self._segment(state or self._state, text)
        if self._state == TOOL:
            yield from self._end_call()
        if not self.is_done and (held := self._stops.end()):
            yield TextDelta(held, self._index)

    def _end_call(self) -> Iterator[Event]:
        """Yield the calls in what the model has written, or the text if it has none."""
        text, self._call = self._call, ""
        if not text.strip():
            return
        try:
            parsed = self._tokenizer.tool_parser(text, self._tools)
            calls = parsed if isinstance(parsed, list) else [parsed]
            found = [self._tool_call(call) for call in calls]
        # Parsers raise whatever they like about what a model has made up.
        except Exception as error:
            logging.warning("a call of a tool cannot be read: %r", error)
            yield TextDelta(text, self._index)
            return
        self._has_called = True
        yield from found

    def _tool_call(self, call: Any) -> ToolCall:
        arguments = json.dumps(call["arguments"], ensure_ascii=False)
        call_id = str(call.get("id") or self._make_id())
        return ToolCall(call_id, str(call["name"]), arguments, self._index)

    def _logprobs(self, step: Step) -> tuple[TokenLogprob, ...]:
        if self._top_logprobs is None:
            return ()
        top: list[int] = []
        if self._top_logprobs:
            order = mx.argpartition(-step.logprobs, kth=self._top_logprobs - 1)
            top = order[: self._top_logprobs].tolist()
        ids = [step.token, *top]
        values = step.logprobs[mx.array(ids)].astype(mx.float32).tolist()
        chosen, *others = map(self._logprob, ids, values)
        others.sort(key=lambda other: -other.logprob)
        return (replace(chosen, top=tuple(others)),)

    def _logprob(self, token_id: int, logprob: float) -> TokenLogprob:
        text = self._tokenizer.decode([token_id])
        return TokenLogprob(text, token_id, logprob, text.encode())


def initial_state(tokenizer: Any, prompt_ids: Sequence[int]) -> str:
    """Return whether an answer begins with text, or inside of reasoning."""
    initial = "normal"
    if tokenizer.has_thinking:
        ids = list(prompt_ids)
        if tokenizer.rfind_think_start(ids) > tokenizer.rfind_think_end(ids):
            initial = REASONING
    return str(tokenizer.response_initial_state or initial)


def _joined(events: Sequence[Event]) -> list[Event]:
    """Return events with deltas of the same kind made one."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, TextDelta) and isinstance(last, TextDelta):
            joined[-1] = TextDelta(last.text + event.text, event.index)
        elif isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
            joined[-1] = ReasoningDelta(last.text + event.text, event.index)
        else:
            joined.append(event)
    return joined


def _with_logprobs(
    events: list[Event], logprobs: tuple[TokenLogprob, ...], index: int
) -> list[Event]:
    """Return events that tell a token's log-probability, if it is to be told."""
    if not logprobs:
        return events
    for i, event in enumerate(events):
        if isinstance(event, TextDelta | ReasoningDelta):
            events[i] = type(event)(event.text, event.index, logprobs)
            return events
    return [TextDelta("", index, logprobs), *events]
