"""API errors: what went wrong, in OpenAI's format."""

from typing import Any, NamedTuple

from promptcache.errors import (
    KeyNotFoundError,
    ModelError,
    PromptCacheError,
    QuotaError,
    StoreError,
    UsageError,
)
from promptcache.server.backend.generator import PromptTooLongError
from promptcache.server.backend.model_provider import UnavailableError


class UnauthorizedError(PromptCacheError):
    """No key was presented, or a wrong one."""


class TooLargeError(PromptCacheError):
    """A request has more bytes than the server takes."""


class NotFoundError(PromptCacheError):
    """There is nothing at this path."""


class ForbiddenError(PromptCacheError):
    """A page of another origin may not ask for this."""


class RefusedError(Exception):
    """mlx-lm's server answers with an error; its context says why."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class ApiError(NamedTuple):
    """An error as the answer to a request.

    Attributes:
        status: The HTTP status.
        kind: OpenAI's type of it.
        code: Its code, or None.
        message: One sentence.
    """

    status: int
    kind: str
    code: str | None
    message: str

    def as_json(self) -> dict[str, Any]:
        """Return it in OpenAI's format."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": None,
                "code": self.code,
            }
        }


# The first that fits.
KINDS: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (UnauthorizedError, 401, "invalid_request_error", "invalid_api_key"),
    (ForbiddenError, 403, "invalid_request_error", "forbidden"),
    (NotFoundError, 404, "invalid_request_error", "not_found"),
    (KeyNotFoundError, 404, "invalid_request_error", "not_found"),
    (QuotaError, 403, "invalid_request_error", "pin_quota_exceeded"),
    (TooLargeError, 413, "invalid_request_error", "request_too_large"),
    (PromptTooLongError, 400, "invalid_request_error", "context_length_exceeded"),
    (ModelError, 404, "invalid_request_error", "model_not_found"),
    (UsageError, 400, "invalid_request_error", None),
    (UnavailableError, 503, "server_error", "unavailable"),
    (StoreError, 503, "server_error", "store_unavailable"),
)


def api_error(error: Exception) -> ApiError:
    """Return the answer for an error, without anything of the code it came from."""
    if isinstance(error, RefusedError):
        return _refused(error)
    for cls, status, kind, code in KINDS:
        if isinstance(error, cls):
            return ApiError(status, kind, code, _line(error))
    return ApiError(500, "server_error", None, f"{type(error).__name__} in the server")


def _refused(error: RefusedError) -> ApiError:
    """Return why mlx-lm refuses a request."""
    reason = error.__context__
    if isinstance(reason, tuple(cls for cls, *_ in KINDS)):
        assert isinstance(reason, Exception)
        return api_error(reason)
    if isinstance(reason, MemoryError):
        return ApiError(503, "server_error", "unavailable", "memory is short")
    # It says 404 for all that a chat template or a tokenizer raises.
    status = error.status if reason is None else 400
    message = _line(reason) if reason is not None else "there is nothing here"
    return ApiError(status, "invalid_request_error", None, message)


def _line(error: BaseException) -> str:
    """Return an error's message as one sentence."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
