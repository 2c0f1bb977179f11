"""The API handler: mlx-lm's, with keys, limits, the cache's own paths and errors."""

import io
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from promptcache.printable import printable
from promptcache.server.backend.compat import APIHandler
from promptcache.server.backend.generator import CachedResponseGenerator
from promptcache.server.backend.model_provider import IdentifiedModelProvider
from promptcache.server.backend.request_state import ServedRequest
from promptcache.server.http.auth import ApiKeys
from promptcache.server.http.cache_routes import CacheApi
from promptcache.server.http.errors import (
    ApiError,
    ForbiddenError,
    NotFoundError,
    RefusedError,
    TooLargeError,
    UnauthorizedError,
    api_error,
)
from promptcache.server.http.validation import (
    BadRequestError,
    check_completion,
    parse_body,
)
from promptcache.server.metrics import CONTENT_TYPE, ServingMetrics

# As in OpenAI's paths, and mlx-lm's second one.
CHAT_PATHS = ("/v1/chat/completions", "/chat/completions")
COMPLETION_PATHS = (*CHAT_PATHS, "/v1/completions")
# Longest time in which a client sends or receives nothing.
IDLE_SECONDS = 60.0
# How long what a client still sends is read, so that it sees why it was refused.
DRAIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class ServerContext:
    """What all requests of a server share.

    Attributes:
        generator: What generates.
        provider: What has the model.
        keys: Who may use it.
        cache: Answers questions about the cache.
        metrics: What it did.
        most_nbytes: How large a request may be.
    """

    generator: CachedResponseGenerator
    provider: IdentifiedModelProvider
    keys: ApiKeys
    cache: CacheApi
    metrics: ServingMetrics
    most_nbytes: int


class ApiHandler(APIHandler):
    """Answers one request; each has a thread of its own."""

    timeout = IDLE_SECONDS

    def __init__(self, context: ServerContext, *args: Any, **kwargs: Any) -> None:
        self._context = context
        self._namespace = ""
        self._is_streaming = False
        self._headers_buffer: list[bytes] = []
        self.wfile: Any = None
        super().__init__(context.generator, *args, **kwargs)

    # Methods

    def do_POST(self) -> None:
        """Answer a completion, or a question about the cache."""
        self._handle(self._post)

    def do_GET(self) -> None:
        """Answer what needs no body."""
        self._handle(self._get)

    def _handle(self, answer: Callable[[], None]) -> None:
        """Answer, or send the error."""
        try:
            answer()
        except (ConnectionError, TimeoutError):
            # The client is gone.
            self.close_connection = True
        except Exception as error:
            failure = api_error(error)
            if failure.status >= 500:
                logging.error("%s: %r", printable(self.requestline), error)
            self._send_error(failure)

    def _post(self) -> None:
        self._authorize()
        body = parse_body(self._read_body())
        if self.path in COMPLETION_PATHS:
            self._complete(body)
            return
        cache = self._context.cache
        answers = {
            "/v1/cache/explain": cache.explain,
            "/v1/cache/pin": cache.pin,
            "/v1/cache/unpin": cache.unpin,
        }
        if self.path not in answers:
            raise NotFoundError(f"there is nothing to post to at {self.path}")
        self._check_origin()
        self._send_json(answers[self.path](self._namespace, body))

    def _get(self) -> None:
        if self.path == "/health":
            super().do_GET()
            return
        if self.path == "/metrics":
            self._authorize_metrics()
            self._send(200, CONTENT_TYPE, self._context.metrics.text())
            return
        self._authorize()
        if self.path == "/v1/cache":
            self._check_origin()
            self._send_json(self._context.cache.prefixes(self._namespace))
        else:
            super().do_GET()

    # Completions

    def _complete(self, body: dict[str, Any]) -> None:
        """Let mlx-lm answer, which reads the request again."""
        check_completion(body, is_chat=self.path in CHAT_PATHS)
        if (options := body.get("stream_options")) is not None:
            includes_usage = bool(options.get("include_usage"))
            body["stream_options"] = {"include_usage": includes_usage}
        raw = json.dumps(body).encode()
        self.rfile = io.BytesIO(raw)
        self.headers.replace_header("Content-Length", str(len(raw)))
        super().do_POST()

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        """Answer a completion for as long as its client listens."""
        served = ServedRequest.of(request, self._namespace, self.connection)
        try:
            super().handle_completion(served, stop_words)
        finally:
            served.over.set()

    def handle_models_request(self) -> None:
        """List the model that is served and those of the hub that are here."""
        served = self._context.provider.name
        listed = {"id": served, "object": "model", "created": self.created}
        name = "/".join(self.path.split("/")[3:])
        models = [m for m in [listed, *self._hub_models()] if name in ("", m["id"])]
        if name and not models:
            raise NotFoundError(f"there is no model {name}")
        self._send_json(models[0] if name else {"object": "list", "data": models})

    def _hub_models(self) -> list[dict[str, Any]]:
        """Return what mlx-lm lists, which fails where the hub's cache is empty."""
        outer, inner = self.wfile, io.BytesIO()
        self.wfile = inner
        try:
            super().handle_models_request()
            hub_models: list[dict[str, Any]] = json.loads(
                inner.getvalue().split(b"\r\n\r\n")[1]
            )["data"]
            return hub_models
        except Exception:
            return []
        finally:
            self.wfile = outer
            self._headers_buffer = []

    # Limits

    def _authorize(self) -> None:
        namespace = self._context.keys.namespace(self.headers.get("Authorization"))
        if namespace is None:
            raise UnauthorizedError("this server wants one of its API keys")
        self._namespace = namespace

    def _authorize_metrics(self) -> None:
        """Raise for those who may not know what all keys do together."""
        if not self._context.keys.opens_metrics(self.headers.get("Authorization")):
            self._authorize()
            raise ForbiddenError("/metrics is about all keys, and wants --metrics-key")

    def _check_origin(self) -> None:
        """Raise for pages that were not allowed by name: prompts are private."""
        origin = self.headers.get("Origin")
        allowed = self.response_generator.cli_args.allowed_origins
        if origin is not None and origin not in allowed:
            raise ForbiddenError("this page's origin is not one of --allowed-origins")

    def _read_body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise BadRequestError("the request needs a Content-Length")
        most = self._context.most_nbytes
        if len(length) > 15 or int(length) > most:
            raise TooLargeError(f"a request may have {most} bytes, not {length[:15]}")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError("the client hung up")
        return body

    # Answers

    def _set_completion_headers(self, status_code: int = 200) -> None:
        if status_code >= 400 and self.path != "/health":
            raise RefusedError(status_code)
        super()._set_completion_headers(status_code)

    def _set_stream_headers(self, status_code: int = 200) -> None:
        self._is_streaming = True
        super()._set_stream_headers(status_code)

    def _send_error(self, error: ApiError) -> None:
        """Send an error, however much of the answer has been sent."""
        try:
            if self._is_streaming:
                self.wfile.write(f"data: {json.dumps(error.as_json())}\n\n".encode())
                return
            # Headers of an answer may be waiting that were not sent yet.
            self._headers_buffer = []
            self._send_json(error.as_json(), status=error.status)
            self._drain()
        except OSError:
            self.close_connection = True

    def _send_json(self, value: Any, *, status: int = 200) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if not self.path.startswith("/v1/cache"):
            self._set_cors_headers()
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def _drain(self) -> None:
        """Read what is still being sent, else the client is cut off from the answer."""
        until = time.monotonic() + DRAIN_SECONDS
        self.connection.settimeout(1.0)
        if int(self.headers.get("Content-Length") or 0) > self._context.most_nbytes:
            while time.monotonic() < until and self.connection.recv(65536):
                pass

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> None:
        """Answer a malformed request, which `http.server` has refused."""
        self.path = getattr(self, "path", "")
        text = message or "malformed request"
        self._headers_buffer = []
        self._send_json(
            ApiError(int(code), "invalid_request_error", None, text).as_json(),
            status=int(code),
        )

    def log_message(self, format: str, *args: Any) -> None:
        """Log a line, without what clients say."""
        logging.info("%s %s", self.address_string(), printable(format % args))
