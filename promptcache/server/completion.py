"""A completion: what a client asks for, and what it is answered, in any API.

The modules in `api` make a `Completion` of a request's body, and an answer in their
API's form of the events that it results in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from promptcache.prompts.chat import Message

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a client asks for.

    Attributes:
        model: The name of the model.
        messages: The chat, in the form that chat templates take, or None.
        prompt: Text or token ids in place of a chat.
        tools: Functions in the form that chat templates take.
        tool_choice: "auto", "none", "required", or the name of the function to call.
        json_schema: What the answer has to match; an empty one is any JSON object.
        max_tokens: Most tokens to generate, None for the server's default.
        stop: Texts that end the answer, and are not part of it.
        sampling: Keyword arguments of sampling (`temp`, `top_p`, `top_k`, `min_p`,
            `seed`, `repetition_penalty`, `presence_penalty`, `frequency_penalty` and
            so on); the server's defaults for what is missing.
        logit_bias: What to add to the logits of token ids.
        top_logprobs: How many likely tokens to tell beside each chosen one, None to
            tell no log-probabilities.
        num_answers: How many answers to give.
        chat_template_config: Further arguments of the chat template.
        adapter: The name of a LoRA adapter, or None.
        draft_model: The name of a draft model, or None for the server's.
        num_draft_tokens: Tokens that a draft model proposes at a time, None for the
            server's default.
    """

    model: str
    messages: Sequence[Message] | None = None
    prompt: str | Sequence[int] | None = None
    tools: Sequence[Message] = ()
    tool_choice: str = "auto"
    json_schema: Mapping[str, Any] | None = None
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    num_answers: int = 1
    chat_template_config: Mapping[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    draft_model: str | None = None
    num_draft_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """How many tokens a completion took.

    Attributes:
        prompt_tokens: Tokens of the whole prompt.
        cached_tokens: How many of them were not read again.
        completion_tokens: Tokens generated, in all answers.
        reasoning_tokens: How many of them were reasoning.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log-probability.

    Attributes:
        token: Its text.
        token_id: Its id.
        logprob: The natural logarithm of its probability.
        data: Its bytes.
        top: The likeliest tokens in its place.
    """

    token: str
    token_id: int
    logprob: float
    data: bytes
    top: tuple["TokenLogprob", ...] = ()


# What happens to a completion. `index` says to which of its answers.


@dataclass(frozen=True, slots=True)
class Progress:
    """So many tokens of the prompt have been read."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt has been read, and the answers begin."""

    usage: Usage


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of an answer's text; may be empty where only log-probabilities are told."""

    text: str
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what the model thinks before it answers."""

    text: str
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole call of a function.

    Attributes:
        id: Of this call, unique.
        name: The function.
        arguments: JSON text.
        index: Of the answer.
    """

    id: str
    name: str
    arguments: str
    index: int = 0


@dataclass(frozen=True, slots=True)
class AnswerEnd:
    """An answer is complete.

    Attributes:
        reason: Why it ended.
        stop: Which of the stop texts ended it, if one did.
        index: Of the answer.
    """

    reason: FinishReason
    stop: str | None = None
    index: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """All answers are complete."""

    usage: Usage


Event = (
    Progress | Started | TextDelta | ReasoningDelta | ToolCall | AnswerEnd | Finished
)
