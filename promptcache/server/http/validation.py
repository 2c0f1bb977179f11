"""Request checks: what mlx-lm's server would fail over, in OpenAI's words.

Some of it would end the thread that generates, and with it the server.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from promptcache.errors import UsageError

# Answers longer than any model's context.
MAX_TOKENS = 2**24
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class BadRequestError(UsageError):
    """A request is malformed, or asks for what makes no sense."""


def parse_body(raw: bytes) -> dict[str, Any]:
    """Return the JSON object of a request. Raises BadRequestError."""
    try:
        body = json.loads(raw.decode())
    except RecursionError as error:
        raise BadRequestError("the body is nested too deeply") from error
    except ValueError as error:
        raise BadRequestError(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequestError("the body must be a JSON object")
    return body


def check_completion(body: Mapping[str, Any], *, is_chat: bool) -> None:
    """Raise BadRequestError for what mlx-lm's server does not accept."""
    if is_chat:
        _check_messages(body.get("messages"))
        _check_list_of_objects(body, "tools")
    else:
        _check(
            isinstance(body.get("prompt"), str) and body["prompt"],
            "prompt must be text, and not empty",
        )
    _check_stop(body.get("stop"))
    _check_numbers(body)
    for name in ("stream_options", "chat_template_kwargs", "role_mapping"):
        value = body.get(name)
        _check(value is None or isinstance(value, dict), f"{name} must be an object")


def check_vocabulary(arguments: Any, vocab_size: int) -> None:
    """Raise BadRequestError for what a model of this vocabulary cannot do.

    Args:
        arguments: mlx-lm's arguments of a generation.
        vocab_size: How many tokens the model knows.
    """
    top_k = arguments.sampling.top_k
    _check(
        top_k < vocab_size,
        f"top_k must be less than {vocab_size}, the size of the vocabulary",
    )
    for token_id in arguments.logits.logit_bias or {}:
        _check(0 <= token_id < vocab_size, f"logit_bias has no token {token_id}")


def _check(is_right: object, message: str) -> None:
    if not is_right:
        raise BadRequestError(message)


def _check_messages(messages: Any) -> None:
    _check(
        isinstance(messages, list) and messages, "messages must be a list, not empty"
    )
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        _check(isinstance(message, dict), f"{place} must be an object")
        _check(message.get("role") in ROLES, f"{place} must have a role")
        content = message.get("content")
        _check(
            content is None or isinstance(content, str | list),
            f"{place} must have text or a list of parts as content",
        )
        for part in content if isinstance(content, list) else ():
            _check(isinstance(part, dict), f"{place} must have objects as parts")


def _check_list_of_objects(body: Mapping[str, Any], name: str) -> None:
    value = body.get(name)
    is_one = isinstance(value, list) and all(isinstance(v, dict) for v in value)
    _check(value is None or is_one, f"{name} must be a list of objects")


def _check_stop(stop: Any) -> None:
    words = [stop] if isinstance(stop, str) else stop or []
    is_list = isinstance(words, list) and all(isinstance(w, str) for w in words)
    _check(is_list, "stop must be text, or a list of texts")
    _check(all(words), "stop must not be empty text")


def _check_numbers(body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if isinstance(value, float):
            _check(math.isfinite(value), f"{name} must be a finite number")
        if isinstance(value, int):
            _check(abs(value) < 2**63, f"{name} is too large")
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        is_count = isinstance(value, int) and 1 <= value <= MAX_TOKENS
        _check(value is None or is_count, f"{name} must be in [1, {MAX_TOKENS}]")
    seed = body.get("seed")
    _check(
        seed is None or (isinstance(seed, int) and seed >= 0), "seed must be 0 or more"
    )
    bias = body.get("logit_bias")
    _check(bias is None or isinstance(bias, dict), "logit_bias must be an object")
    for value in (bias or {}).values():
        is_number = isinstance(value, int | float) and math.isfinite(value)
        _check(is_number, "logit_bias must hold finite numbers")
