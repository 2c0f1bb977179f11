"""OpenAI's text completions, with the further fields of mlx-lm's server."""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import Field

from promptcache.server.api.chat_completions import SamplingFields, usage_json
from promptcache.server.api.fields import MAX_TOP_LOGPROBS, Text
from promptcache.server.completion import (
    AnswerEnd,
    Completion,
    Event,
    Finished,
    TextDelta,
    TokenLogprob,
)

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class TextRequest(SamplingFields):
    """The body of `POST /v1/completions`."""

    prompt: (
        Annotated[Text, Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
    )
    logprobs: bool | Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    def completion(self) -> Completion:
        """Return what is asked for. Raises BadRequestError."""
        told = self.logprobs
        # mlx-lm's clients say whether, and OpenAI's how many.
        top = 0 if told is None or isinstance(told, bool) else told
        return Completion(
            prompt=self.prompt,
            max_tokens=self.max_tokens,
            top_logprobs=None if told is None or told is False else top,
            **self.common(),
        )


class TextAnswer:
    """Answers a text completion."""

    def __init__(self, request: TextRequest) -> None:
        self._request = request
        self._common = {
            "id": f"cmpl-{uuid.uuid4()}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a stream for an event."""
        match event:
            case TextDelta(text, index, logprobs):
                choice = _choice(index, text, logprobs, None)
                yield {**self._common, "choices": [choice]}
            case AnswerEnd(reason, _, index):
                choice = _choice(index, "", (), reason)
                yield {**self._common, "choices": [choice]}
            case Finished(usage):
                options = self._request.stream_options
                if options is not None and options.include_usage:
                    yield {**self._common, "choices": [], "usage": usage_json(usage)}

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """Return the whole answer."""
        choices = [self._whole(index, events) for index in range(self._request.n)]
        [usage] = [event.usage for event in events if isinstance(event, Finished)]
        return {**self._common, "choices": choices, "usage": usage_json(usage)}

    def _whole(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        text, reason = "", "stop"
        logprobs: list[TokenLogprob] = []
        for event in events:
            match event:
                case TextDelta(more, i, told) if i == index:
                    text += more
                    logprobs += told
                case AnswerEnd(why, _, i) if i == index:
                    reason = why
        return _choice(index, text, logprobs, reason)


def _choice(
    index: int, text: str, logprobs: Sequence[TokenLogprob], reason: str | None
) -> dict[str, Any]:
    told = None
    if logprobs:
        told = {
            "tokens": [each.token for each in logprobs],
            "token_logprobs": [each.logprob for each in logprobs],
            "top_logprobs": [
                {other.token: other.logprob for other in each.top} for each in logprobs
            ],
            "text_offset": [],
        }
    return {"index": index, "text": text, "logprobs": told, "finish_reason": reason}
