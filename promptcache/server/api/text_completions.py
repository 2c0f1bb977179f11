"""Text completions: OpenAI's older API, which goes on with a text or token ids."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, WithJsonSchema

from promptcache.server.api import ignored
from promptcache.server.api.choices import (
    ChoicesAnswer,
    ChoicesRequest,
    sampling_of,
)
from promptcache.server.api.fields import MAX_INT, Empty, Off, refused
from promptcache.server.api.logprobs import text_logprobs
from promptcache.server.completion import (
    AnswerEnd,
    Completion,
    Event,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
)

MAX_PROMPT_TOKENS = 2**22
MAX_LOGPROBS = 20


def _parse_prompt(value: Any) -> Any:
    """Return text or token ids; a list of one prompt is as good as the prompt."""
    is_nested = isinstance(value, list) and value and isinstance(value[0], str | list)
    if is_nested and len(value) > 1:
        raise refused("must be one prompt, several are not supported")
    prompt = value[0] if is_nested else value
    if isinstance(prompt, list):
        _check_token_ids(prompt)
    elif not isinstance(prompt, str):
        raise refused("must be text or a list of token ids")
    if not prompt:
        raise refused("must not be empty")
    return prompt


def _check_token_ids(prompt: list[Any]) -> None:
    if len(prompt) > MAX_PROMPT_TOKENS:
        raise refused(f"must have at most {MAX_PROMPT_TOKENS} token ids")
    # Not `isinstance`, because True is an integer to it.
    if not all(type(token) is int and 0 <= token <= MAX_INT for token in prompt):
        raise refused(f"must have token ids in [0, {MAX_INT}]")


def _parse_logprobs(value: Any) -> Any:
    """Return how many likely tokens to tell; mlx-lm's server takes true and false."""
    if isinstance(value, bool):
        return 0 if value else None
    if not isinstance(value, int) or not 0 <= value <= MAX_LOGPROBS:
        raise refused(f"must be an integer in [0, {MAX_LOGPROBS}]")
    return value


class TextRequest(ChoicesRequest):
    """A request for a text completion."""

    ignored = ignored.TEXT

    prompt: Annotated[
        str | list[int],
        BeforeValidator(_parse_prompt),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"type": "integer"}},
                ]
            }
        ),
    ]
    logprobs: Annotated[
        int | None,
        BeforeValidator(_parse_logprobs),
        WithJsonSchema({"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS}),
    ] = None
    best_of: Literal[1] | None = None
    echo: Off = False
    suffix: Empty = ""


def completion_of(request: TextRequest) -> Completion:
    """Return what a request asks for."""
    return Completion(
        model=request.model,
        prompt=request.prompt,
        max_tokens=request.max_tokens,
        stop=request.stop,
        sampling=sampling_of(request),
        logit_bias=request.logit_bias,
        top_logprobs=request.logprobs,
        num_answers=request.n,
        adapter=request.adapters,
        draft_model=request.named_draft_model,
        num_draft_tokens=request.num_draft_tokens,
    )


@dataclass(slots=True)
class _Choice:
    """One of the answers.

    Attributes:
        pending: Log-probabilities that no chunk has told.
        offset: How many characters come before them.
    """

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    pending: list[TokenLogprob] = field(default_factory=list)
    offset: int = 0
    finish_reason: str | None = None


class TextAnswer(ChoicesAnswer):
    """The answer to a request for a text completion, in OpenAI's form."""

    id_prefix = "cmpl"
    object_type = "text_completion"
    chunk_type = "text_completion"

    def __init__(self, request: TextRequest, **options: Any) -> None:
        super().__init__(request, **options)
        self._answers = [_Choice() for _ in range(request.n)]
        self._tells_logprobs = request.logprobs is not None

    def _chunks(self, event: Event) -> list[dict[str, Any]]:
        # All that a model says after a plain text is text.
        if isinstance(event, TextDelta | ReasoningDelta):
            answer = self._answers[event.index]
            answer.logprobs += event.logprobs
            answer.pending += event.logprobs
            if not event.text:
                return []
            answer.text.append(event.text)
            return [self._chunk(event.index, event.text)]
        if isinstance(event, AnswerEnd):
            answer = self._answers[event.index]
            answer.finish_reason = "length" if event.reason == "length" else "stop"
            return [self._chunk(event.index, "")]
        return []

    def _chunk(self, index: int, text: str) -> dict[str, Any]:
        answer = self._answers[index]
        told, answer.pending = answer.pending, []
        choice = self._choice(index, text, told, answer.offset, is_whole=False)
        answer.offset += sum(len(token.token) for token in told)
        return choice

    def _choices(self) -> list[dict[str, Any]]:
        return [
            self._choice(index, "".join(answer.text), answer.logprobs, 0, is_whole=True)
            for index, answer in enumerate(self._answers)
        ]

    def _choice(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprob],
        offset: int,
        *,
        is_whole: bool,
    ) -> dict[str, Any]:
        told = self._tells_logprobs and (logprobs or is_whole)
        return {
            "index": index,
            "text": text,
            "logprobs": text_logprobs(logprobs, offset) if told else None,
            "finish_reason": self._answers[index].finish_reason,
        }
