"""Fields of requests: strict types with bounded, finite values."""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from promptcache.prompts.chat import OWN_ARGUMENTS

MAX_INT = 2**31 - 1
MAX_DEPTH = 100
MAX_MESSAGES = 4_096
MAX_TOOLS = 1_024
MAX_NAME = 1_000
MAX_STOPS = 16
MAX_STOP_LENGTH = 1_000
MAX_BIASES = 1_024
MAX_BIAS = 100.0
# Below it a temperature chooses as 0 does, but divides logits until they overflow.
MIN_TEMPERATURE = 1e-4
# Closer to 0 a repetition penalty multiplies logits until they overflow.
MIN_REPETITION_PENALTY = 0.01
DEFAULT_MODEL = "default_model"
# What goes to the tokenizer's `apply_chat_template` and not to the template.
NO_TEMPLATE_ARGUMENTS = {
    *OWN_ARGUMENTS,
    "chat_template",
    "continue_final_message",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenizer",
    "tokenizer_kwargs",
    "truncation",
}


def refused(reason: str, *where: str | int) -> PydanticCustomError:
    """Return the error that refuses a value.

    Args:
        reason: What is wrong, as the rest of a sentence that begins with the place.
        where: Where in the value that is checked it is wrong.
    """
    return PydanticCustomError(
        "refused", "{reason}", {"reason": reason, "where": where}
    )


def check_values(value: Any) -> None:
    """Raise for text that is not Unicode, and for numbers that are not finite.

    JSON itself allows both, and parsers let them through.
    """
    _check_value(value, ())


def _check_value(value: Any, where: tuple[str | int, ...]) -> None:
    if isinstance(value, str):
        _check_text(value, where)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise refused("must be a finite number", *where)
    elif isinstance(value, dict | list):
        if len(where) > MAX_DEPTH:
            # The place itself would be too long to tell.
            raise refused("is nested too deeply", *where[:1])
        _check_all(value, where)


def _check_all(
    values: dict[str, Any] | list[Any], where: tuple[str | int, ...]
) -> None:
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        if isinstance(key, str):
            _check_text(key, where)
        # A prompt may be a hundred thousand integers.
        if not isinstance(value, int):
            _check_value(value, (*where, key))


def _check_text(text: str, where: tuple[str | int, ...]) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise refused("is not valid Unicode", *where) from None


class Part(BaseModel):
    """An object inside of a request; null is as good as nothing.

    What it has besides says nothing to a model that reads text, and is left out.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class Body(BaseModel):
    """A request's body; what is unknown is refused, and null is as good as nothing.

    Attributes:
        ignored: The fields that are taken and not used, with who sends them.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    ignored: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_ignored(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        check_values(values)
        return {
            name: value
            for name, value in values.items()
            if value is not None and name not in cls.ignored
        }

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return the schema, with the fields that are taken and not used."""
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        properties = schema.setdefault("properties", {})
        for name, client in cls.ignored.items():
            properties[name] = {"description": f"Not used; {client} may send it."}
        return reference


def _near_zero_is_zero(value: Any) -> Any:
    is_near = isinstance(value, float) and 0 < value < MIN_TEMPERATURE
    return 0.0 if is_near else value


def _check_repetition_penalty(value: float) -> float:
    if 0 < value < MIN_REPETITION_PENALTY:
        raise refused(f"must be 0 or at least {MIN_REPETITION_PENALTY}")
    return value


def _parse_stop(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise refused("must be text or a list of texts")
    if len(texts) > MAX_STOPS:
        raise refused(f"must have at most {MAX_STOPS} texts")
    for number, text in enumerate(texts):
        where = () if texts is not value else (number,)
        if not isinstance(text, str):
            raise refused("must be text", *where)
        if not text or len(text) > MAX_STOP_LENGTH:
            raise refused(f"must have 1 to {MAX_STOP_LENGTH} characters", *where)
    return texts


def _parse_logit_bias(value: Any) -> Any:
    if not isinstance(value, dict):
        raise refused("must be an object")
    if len(value) > MAX_BIASES:
        raise refused(f"must have at most {MAX_BIASES} tokens")
    return {_token_id(key): _bias(bias, key) for key, bias in value.items()}


def _token_id(key: Any) -> int:
    text = str(key)
    if not re.fullmatch(r"0|[1-9][0-9]{0,9}", text) or int(text) > MAX_INT:
        raise refused("must have token ids as keys")
    return int(text)


def _bias(value: Any, key: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not -MAX_BIAS <= value <= MAX_BIAS:
        raise refused(f"must be a number in [-{MAX_BIAS:g}, {MAX_BIAS:g}]", str(key))
    return float(value)


def _check_template_config(value: dict[str, Any]) -> dict[str, Any]:
    if reserved := NO_TEMPLATE_ARGUMENTS & value.keys():
        raise refused("is not an argument of chat templates", min(reserved))
    return value


def _refuse_other_than_nothing(value: Any) -> Any:
    if value:
        raise refused("is not supported")
    return value


def _check_size(value: Any) -> Any:
    """Refuse integers that no float holds, which pydantic would convert."""
    if isinstance(value, int) and abs(value) > MAX_INT:
        raise refused(f"must be at most {MAX_INT} in size")
    return value


Float = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_check_size)]
Probability = Annotated[Float, Field(ge=0, le=1)]
Temperature = Annotated[Float, BeforeValidator(_near_zero_is_zero), Field(ge=0, le=100)]
Penalty = Annotated[Float, Field(ge=-100, le=100)]
RepetitionPenalty = Annotated[
    Float, Field(ge=0, le=100), AfterValidator(_check_repetition_penalty)
]
XtcThreshold = Annotated[Float, Field(ge=0, le=0.5)]
ContextSize = Annotated[int, Field(ge=0, le=2**20)]
TopK = Annotated[int, Field(ge=0, le=MAX_INT)]
MaxTokens = Annotated[int, Field(ge=1, le=MAX_INT)]
NumAnswers = Annotated[int, Field(ge=1, le=16)]
NumLogprobs = Annotated[int, Field(ge=0, le=20)]
NumDraftTokens = Annotated[int, Field(ge=0, le=64)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
# What only says that something unsupported is not asked for.
Off = Annotated[bool, BeforeValidator(_refuse_other_than_nothing)]
Empty = Annotated[str, BeforeValidator(_refuse_other_than_nothing)]
NoItems = Annotated[list[Any], BeforeValidator(_refuse_other_than_nothing)]
Object = dict[str, Any]
TemplateConfig = Annotated[Object, AfterValidator(_check_template_config)]
Stop = Annotated[
    list[str],
    BeforeValidator(_parse_stop),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "maxItems": MAX_STOPS},
            ]
        }
    ),
]
LogitBias = Annotated[
    dict[int, float],
    BeforeValidator(_parse_logit_bias),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
]
