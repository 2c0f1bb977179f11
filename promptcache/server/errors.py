"""API errors: what went wrong, as a status with a code and one sentence."""

from typing import Any, NamedTuple

from pydantic import ValidationError

from promptcache.errors import (
    KeyNotFoundError,
    ModelError,
    PromptCacheError,
    QuotaError,
    StoreError,
    UsageError,
)
from promptcache.server.models import UnavailableError
from promptcache.server.service import PromptTooLongError


class UnauthorizedError(PromptCacheError):
    """No key was presented, or a wrong one."""


class TooLargeError(PromptCacheError):
    """A request has more bytes than the server takes."""


class NotFoundError(PromptCacheError):
    """There is nothing at this path."""


class ForbiddenError(PromptCacheError):
    """A web page, or another host's name, may not ask for this."""


class TooSlowError(PromptCacheError):
    """A client sends its request too slowly."""


class ApiError(NamedTuple):
    """An error as the answer to a request.

    Attributes:
        status: The HTTP status.
        kind: OpenAI's type of it.
        code: Its code, or None.
        message: One sentence.
        param: The field that is wrong, or None.
    """

    status: int
    kind: str
    code: str | None
    message: str
    param: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return it in OpenAI's format."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


INVALID = "invalid_request_error"
# The first that fits.
KINDS: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (UnauthorizedError, 401, INVALID, "invalid_api_key"),
    (ForbiddenError, 403, INVALID, "forbidden"),
    (NotFoundError, 404, INVALID, "not_found"),
    (KeyNotFoundError, 404, INVALID, "not_found"),
    (QuotaError, 403, INVALID, "pin_quota_exceeded"),
    (TooLargeError, 413, INVALID, "request_too_large"),
    (TooSlowError, 408, INVALID, "request_timeout"),
    (PromptTooLongError, 400, INVALID, "context_length_exceeded"),
    (ModelError, 404, INVALID, "model_not_found"),
    (UsageError, 400, INVALID, None),
    (UnavailableError, 503, "server_error", "unavailable"),
    (MemoryError, 503, "server_error", "unavailable"),
    (StoreError, 503, "server_error", "store_unavailable"),
)


def api_error(error: Exception) -> ApiError:
    """Return the answer for an error, without anything of the code it came from."""
    if isinstance(error, ValidationError):
        return _invalid(error)
    for cls, status, kind, code in KINDS:
        if isinstance(error, cls):
            param = getattr(error, "param", None)
            return ApiError(status, kind, code, _line(error), param)
    return ApiError(500, "server_error", None, f"{type(error).__name__} in the server")


def _invalid(error: ValidationError) -> ApiError:
    """Return what is wrong with the first field that is."""
    [first, *_] = error.errors(include_url=False, include_context=False)
    # Of a union, the names of its members are no part of the path.
    place = first["loc"]
    path = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}"
        for part in place
        if isinstance(part, int) or part.isidentifier()
    ).lstrip(".")
    if first["type"] == "extra_forbidden":
        message = f"{path} is not supported"
    else:
        message = f"{path or 'the body'}: {first['msg'].splitlines()[0].lower()}"
    return ApiError(400, INVALID, None, message, path or None)


def _line(error: BaseException) -> str:
    """Return an error's message as one sentence."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
