"""Errors: what went wrong in the form of each API, and what is wrong with a request."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from promptcache.printable import printable

INVALID = "invalid_request_error"
# Anthropic's types by status.
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


class ApiError(NamedTuple):
    """An error as an answer, in OpenAI's words.

    Attributes:
        status: The HTTP status.
        type: OpenAI's type of it.
        code: Its code, or None.
        param: The field of the request that is wrong, or None.
        message: One line.
    """

    status: int
    type: str
    code: str | None
    param: str | None
    message: str


def openai_error(error: ApiError) -> dict[str, Any]:
    """Return an error as OpenAI's three APIs have it."""
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """Return an error as Anthropic's API has it."""
    otherwise = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _ANTHROPIC_TYPES.get(error.status, otherwise)
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def response_error(error: ApiError) -> dict[str, Any]:
    """Return an error as a failed response of OpenAI's Responses API has it."""
    return {"code": error.code or "server_error", "message": error.message}


class HasErrors(Protocol):
    """What is wrong with a request, as pydantic and FastAPI raise it."""

    def errors(self) -> Sequence[Any]:
        """Return its errors."""


def validation_error(error: HasErrors) -> ApiError:
    """Return what is wrong with a request, of several things the first."""
    first = error.errors()[0]
    context = first.get("ctx") or {}
    where = (*first["loc"], *context.get("where", ()))
    # FastAPI says where in the request; no request has a field of this name.
    param = path_of(where[1:] if where[:1] == ("body",) else where)
    reason = _reason(first["type"], context) or first["msg"]
    # A client names fields and types as it likes.
    message = printable(f"{param or 'body'} {reason}")
    return ApiError(400, INVALID, None, param or None, message)


def path_of(where: Sequence[str | int]) -> str:
    """Return a place in a request, like `messages[0].content`.

    Names in angle brackets are no places: they say which of several models was tried.
    """
    path = ""
    for step in where:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("<"):
            path += f".{step[:100]}" if path else step[:100]
    return path


def _reason(kind: str, context: dict[str, Any]) -> str | None:
    """Return the rest of a sentence that begins with the place of an error."""
    match kind:
        case "refused":
            return str(context["reason"])
        case "greater_than_equal":
            return f"must be at least {context['ge']}"
        case "less_than_equal":
            return f"must be at most {context['le']}"
        case "less_than":
            return f"must be less than {context['lt']}"
        case "too_short" | "string_too_short":
            return "must not be empty"
        case "too_long":
            return f"must have at most {context['max_length']} items"
        case "string_too_long":
            return f"must have at most {context['max_length']} characters"
        case "literal_error":
            return f"must be {context['expected']}"
    return _REASONS.get(kind)


_REASONS = {
    "json_invalid": "is not JSON",
    "extra_forbidden": "is not supported",
    "missing": "is missing",
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "int_type": "must be an integer",
    "list_type": "must be a list",
    "model_attributes_type": "must be an object",
    "model_type": "must be an object",
    "string_type": "must be text",
    "string_unicode": "is not valid Unicode",
}
