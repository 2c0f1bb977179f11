"""Errors of the server, and what each is as an answer."""

from pydantic import ValidationError

from promptcache.errors import (
    KeyNotFoundError,
    ModelError,
    PromptCacheError,
    QuotaError,
    StoreError,
    UsageError,
)
from promptcache.server.api.errors import INVALID, ApiError, validation_error
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


class MalformedError(UsageError):
    """A body is no JSON object."""


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
    """Return an error as an answer, without anything of the code it came from."""
    if isinstance(error, ValidationError):
        return validation_error(error)
    for cls, status, kind, code in KINDS:
        if isinstance(error, cls):
            param = getattr(error, "param", None)
            return ApiError(status, kind, code, param, _line(error))
    message = f"{type(error).__name__} in the server"
    return ApiError(500, "server_error", None, None, message)


def _line(error: BaseException) -> str:
    """Return an error's message as one sentence."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
