"""Fields: what requests of several APIs are made of, with their bounds."""

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from promptcache.errors import UsageError

# Answers longer than any model's context.
MAX_TOKENS = 2**24
MAX_MESSAGES = 4096
MAX_TOOLS = 1024
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000
MAX_ANSWERS = 16
# OpenAI's are 20; mlx-lm's server takes 11.
MAX_TOP_LOGPROBS = 20
MAX_BIASED = 1024
# What a client may not say to the template: it would be rendered by one of its own, or
# in another form.
FORBIDDEN_ARGUMENTS = {
    *("chat_template", "tokenizer", "messages", "conversation", "tools", "documents"),
    *("add_generation_prompt", "continue_final_message", "tokenize", "return_dict"),
    *("return_tensors", "padding", "truncation", "max_length", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask",),
}


class BadRequestError(UsageError):
    """A request is malformed, or asks for what is not supported.

    Attributes:
        param: The field that is wrong, as a path.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def _valid_text(text: str) -> str:
    """Return text that can be encoded. Raises ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("must be valid Unicode") from error
    return text


Text = Annotated[str, AfterValidator(_valid_text)]
Name = Annotated[Text, Field(min_length=1, max_length=256)]
StopText = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)]
TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
ContextSize = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
Probability = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=100)]
Penalty = Annotated[float, Field(ge=-100, le=100)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Object = dict[str, Any]
Bias = Annotated[
    dict[str, Annotated[float, Field(ge=-10000, le=10000)]],
    Field(max_length=MAX_BIASED),
]


class Part(BaseModel):
    """A part of a request, of which nothing is ignored; null means "not given"."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: v for name, v in value.items() if v is not None}


def template_arguments(value: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return arguments of the chat template. Raises BadRequestError."""
    for name in sorted({*(value or {})} & FORBIDDEN_ARGUMENTS):
        raise BadRequestError(
            f"chat_template_kwargs must not hold {name}", "chat_template_kwargs"
        )
    return dict(value or {})


def stops_of(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return the texts that end an answer."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def bias_of(bias: Mapping[str, float] | None) -> dict[int, float]:
    """Return a bias by token id. Raises BadRequestError."""
    if not all(key.isascii() and key.isdigit() for key in bias or {}):
        raise BadRequestError("logit_bias must name token ids", "logit_bias")
    return {int(key): value for key, value in (bias or {}).items()}


def arguments_of(text: str) -> Any:
    """Return the arguments of a call as templates want them: an object, or text."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return arguments if isinstance(arguments, dict) else text
