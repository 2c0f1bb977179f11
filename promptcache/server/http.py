"""HTTP: requests, checked and authorized, and their answers."""

import asyncio
import ipaddress
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from promptcache.printable import printable
from promptcache.server.api.errors import ApiError, openai_error
from promptcache.server.auth import is_loopback
from promptcache.server.completion import Event
from promptcache.server.errors import (
    ForbiddenError,
    MalformedError,
    TooLargeError,
    TooSlowError,
    api_error,
)

# Longest time in which a client sends nothing of its request, and in all.
IDLE_SECONDS = 60.0
BODY_SECONDS = 600.0
# Larger bodies are parsed beside the event loop.
SMALL_NBYTES = 10**5


class Answer(Protocol):
    """An answer in the form of one of the APIs."""

    def encode(self, event: Event) -> list[bytes]:
        """Return the messages of a stream that tell of an event."""

    def encode_error(self, error: ApiError) -> list[bytes]:
        """Return the messages that end a stream with an error."""

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """Return the answer of all its events."""


class Doorkeeper:
    """Refuses web pages and rebound names, on every path.

    A page on the web can send requests to this machine, with an `Origin` that says so;
    one whose name was made to mean this machine sends that name as `Host`.
    """

    def __init__(self, app: ASGIApp, *, host: str, origins: Sequence[str]) -> None:
        self._app = app
        self._is_local = is_loopback(host)
        self._origins = {*origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            self._check(headers)
        except ForbiddenError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        if self._is_local and host and not _is_this_machine(host):
            raise ForbiddenError("this server is not called by that name")
        origin = headers.get(b"origin")
        if origin is None or "*" in self._origins:
            return
        if origin.decode("latin-1") not in self._origins:
            raise ForbiddenError("pages of this origin may not ask: --allowed-origins")


def _is_this_machine(host: str) -> bool:
    """Return whether a `Host` header names this machine itself."""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    name = name.strip("[]")
    if name.endswith(".localhost"):
        return True
    try:
        return is_loopback(name) or ipaddress.ip_address(name).is_unspecified
    except ValueError:
        return False


ErrorForm = Callable[[ApiError], dict[str, Any]]


def error_response(error: Exception, form: ErrorForm = openai_error) -> Response:
    """Return the answer for an error, in the form of an API."""
    failure = api_error(error)
    return JSONResponse(form(failure), status_code=failure.status)


def handled(
    endpoint: Callable[[Request], Awaitable[Response]], form: ErrorForm
) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint whose errors are answers in the form of an API."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            response = error_response(error, form)
            if response.status_code >= 500:
                line = f"{request.method} {request.url.path}"
                logging.error("%s: %s", printable(line), printable(repr(error)))
            return response

    return answer


async def body_of(request: Request, most_nbytes: int) -> dict[str, Any]:
    """Return the JSON object that is a request's body.

    Raises:
        MalformedError: It is none.
        TooLargeError: It has more bytes.
        TooSlowError: It comes too slowly.
        ClientDisconnect: The client is gone.
    """
    raw = bytearray()
    chunks = request.stream()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                chunk = await asyncio.wait_for(anext(chunks, None), IDLE_SECONDS)
                if chunk is None:
                    break
                raw += chunk
                if len(raw) > most_nbytes:
                    raise TooLargeError(
                        f"a request may have {most_nbytes} bytes, this one has more"
                    )
    except TimeoutError as error:
        raise TooSlowError("the request does not come") from error
    if len(raw) <= SMALL_NBYTES:
        return _parsed(raw)
    return await asyncio.to_thread(_parsed, raw)


def _parsed(raw: bytes | bytearray) -> dict[str, Any]:
    try:
        body = json.loads(raw.decode())
    except RecursionError as error:
        raise MalformedError("the body is nested too deeply") from error
    except ValueError as error:
        raise MalformedError(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise MalformedError("the body must be a JSON object")
    return body


async def while_connected(
    request: Request, events: AsyncIterator[Event]
) -> AsyncIterator[Event]:
    """Yield events until the client hangs up; the rest is then cancelled.

    Raises ClientDisconnect.
    """
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        while True:
            upcoming = asyncio.ensure_future(anext(events, None))
            await asyncio.wait({upcoming, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not upcoming.done():
                upcoming.cancel()
                await asyncio.wait({upcoming})
                raise ClientDisconnect
            event = upcoming.result()
            if event is None:
                return
            yield event
    finally:
        gone.cancel()
        await events.aclose()  # type: ignore[attr-defined]


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def whole(
    request: Request, events: AsyncIterator[Event], answer: Answer
) -> dict[str, Any]:
    """Return the whole answer when it is complete."""
    return answer.whole([event async for event in while_connected(request, events)])


async def streamed(
    request: Request, events: AsyncIterator[Event], answer: Answer
) -> Response:
    """Return an answer that is sent as it comes, as server-sent events.

    Raises what goes wrong before anything could be sent.
    """
    connected = while_connected(request, events)
    first = await anext(connected)

    async def messages() -> AsyncIterator[bytes]:
        try:
            for message in answer.encode(first):
                yield message
            async for event in connected:
                for message in answer.encode(event):
                    yield message
        except ClientDisconnect:
            return
        except Exception as error:
            failure = api_error(error)
            if failure.status >= 500:
                logging.error("%s: %s", request.url.path, printable(repr(error)))
            for message in answer.encode_error(failure):
                yield message

    return StreamingResponse(
        messages(),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache"},
    )
