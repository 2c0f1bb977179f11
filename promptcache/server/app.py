"""The application: the paths of the server, and what answers them."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from promptcache.server.api import (
    chat_completions,
    messages,
    responses,
    text_completions,
)
from promptcache.server.api.chat_completions import ChatAnswer, ChatRequest
from promptcache.server.api.errors import (
    ApiError,
    anthropic_error,
    openai_error,
)
from promptcache.server.api.message_answer import MessageAnswer
from promptcache.server.api.messages import MessageRequest, TokenCountRequest
from promptcache.server.api.response_answer import ResponseAnswer
from promptcache.server.api.responses import ResponseRequest
from promptcache.server.api.text_completions import TextAnswer, TextRequest
from promptcache.server.auth import ApiKeys
from promptcache.server.cache_routes import CacheApi
from promptcache.server.completion import Completion, Event, Finished, Progress
from promptcache.server.errors import (
    ForbiddenError,
    NotFoundError,
    UnauthorizedError,
)
from promptcache.server.http import (
    Answer,
    Doorkeeper,
    body_of,
    error_response,
    handled,
    streamed,
    while_connected,
    whole,
)
from promptcache.server.kept_responses import KeptResponses
from promptcache.server.metrics import CONTENT_TYPE, ServingMetrics
from promptcache.server.models import Models
from promptcache.server.openapi import describe
from promptcache.server.service import CompletionService


class Application:
    """Answers requests, each in the namespace of its key."""

    def __init__(
        self,
        models: Models,
        service: CompletionService,
        cache: CacheApi,
        keys: ApiKeys,
        metrics: ServingMetrics,
        most_nbytes: int,
    ) -> None:
        """Take what answers.

        Args:
            models: The models that may be asked for.
            service: Runs completions.
            cache: Answers questions about the cache.
            keys: Who may use it.
            metrics: What it did.
            most_nbytes: How large a request may be.
        """
        self._models = models
        self._service = service
        self._cache = cache
        self._keys = keys
        self._metrics = metrics
        self._most_nbytes = most_nbytes
        self._created_at = int(time.time())
        self._responses = KeptResponses()

    def asgi(self, host: str, origins: Sequence[str]) -> Starlette:
        """Return it as an ASGI application.

        Args:
            host: Where it listens.
            origins: The origins of web pages that may ask.
        """
        posts = {
            "/v1/chat/completions": self._chat,
            "/chat/completions": self._chat,
            "/v1/completions": self._text,
            "/v1/responses": self._respond,
            "/v1/messages": self._message,
            "/v1/messages/count_tokens": self._count_tokens,
            "/v1/cache/{question}": self._ask_cache,
        }
        gets = {
            "/v1/models": self._list_models,
            "/v1/models/{name:path}": self._show_model,
            "/v1/cache": self._list_prefixes,
            "/openapi.json": _describe,
            "/metrics": self._tell_metrics,
            "/health": _tell_health,
        }
        routes = [
            Route(path, handled(endpoint, _error_form(path)), methods=[method])
            for method, endpoints in (("POST", posts), ("GET", gets))
            for path, endpoint in endpoints.items()
        ]
        doorkeeper = Middleware(Doorkeeper, host=host, origins=origins)
        cors = Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
        return Starlette(
            routes=routes,
            middleware=[doorkeeper, *([cors] if origins else [])],
            exception_handlers={404: _not_found, 405: _not_found},
        )

    async def _chat(self, request: Request) -> Response:
        body = ChatRequest.model_validate(await self._body(request))
        completion = chat_completions.completion_of(body)
        return await self._complete(
            request, completion, ChatAnswer(body), stream=body.stream
        )

    async def _text(self, request: Request) -> Response:
        body = TextRequest.model_validate(await self._body(request))
        completion = text_completions.completion_of(body)
        return await self._complete(
            request, completion, TextAnswer(body), stream=body.stream
        )

    async def _message(self, request: Request) -> Response:
        body = MessageRequest.model_validate(await self._body(request))
        _log_left_out(body.left_out_tools)
        completion = messages.completion_of(body)
        return await self._complete(
            request, completion, MessageAnswer(body), stream=body.stream
        )

    async def _count_tokens(self, request: Request) -> Response:
        body = TokenCountRequest.model_validate(await self._body(request))
        completion = messages.completion_of(body)
        num_tokens = await self._service.num_tokens(completion)
        return JSONResponse(messages.token_count(num_tokens))

    async def _respond(self, request: Request) -> Response:
        body = ResponseRequest.model_validate(await self._body(request))
        _log_left_out(body.left_out_tools)
        namespace, before = request.state.namespace, body.previous_response_id
        if before is not None:
            items = self._responses.find(namespace, before)
            if items is None:
                raise NotFoundError(f"response {before} is not kept here")
            body = responses.joined(body, items)
        answer = ResponseAnswer(body)

        def keep(events: Sequence[Event]) -> None:
            if body.store:
                # What was streamed is told again as a whole.
                response = ResponseAnswer(body, response_id=answer.id).whole(events)
                items = responses.conversation_items(body, response)
                self._responses.keep(namespace, answer.id, items)

        completion = responses.completion_of(body)
        return await self._complete(
            request, completion, answer, stream=body.stream, on_end=keep
        )

    async def _complete(
        self,
        request: Request,
        completion: Completion,
        answer: Answer,
        *,
        stream: bool,
        on_end: Callable[[Sequence[Event]], None] | None = None,
    ) -> Response:
        client = request.client.host if request.client else "-"
        namespace = request.state.namespace
        events = self._service.events(completion, namespace, client)
        if on_end is not None:
            events = _noted(events, on_end)
        if stream:
            return await streamed(request, events, answer)
        return JSONResponse(await whole(request, events, answer))

    async def _ask_cache(self, request: Request) -> Response:
        body = await self._body(request)
        if request.path_params["question"] == "warm":
            return await self._warm(request, body)
        answers = {
            "explain": self._cache.explain,
            "pin": self._cache.pin,
            "unpin": self._cache.unpin,
        }
        question = answers.get(request.path_params["question"])
        if question is None:
            raise NotFoundError(f"there is nothing to post to at {request.url.path}")
        told = await asyncio.to_thread(question, request.state.namespace, body)
        return JSONResponse(told)

    async def _warm(self, request: Request, body: dict[str, Any]) -> Response:
        """Read and keep a prompt, and answer nothing."""
        chat = ChatRequest.model_validate(body)
        completion = replace(
            chat_completions.completion_of(chat), max_tokens=1, num_answers=1
        )
        client = request.client.host if request.client else "-"
        events = self._service.events(completion, request.state.namespace, client)
        async for event in while_connected(request, events):
            if isinstance(event, Finished):
                usage = event.usage
        told = {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
        }
        return JSONResponse(told)

    async def _list_prefixes(self, request: Request) -> Response:
        namespace = self._authorize(request)
        return JSONResponse(await asyncio.to_thread(self._cache.prefixes, namespace))

    async def _list_models(self, request: Request) -> Response:
        self._authorize(request)
        return JSONResponse(
            {"object": "list", "data": [self._model_json(self._models.name)]}
        )

    async def _show_model(self, request: Request) -> Response:
        self._authorize(request)
        name = request.path_params["name"]
        # Raises ModelError for one that is not served.
        self._models.key_of(name)
        return JSONResponse(self._model_json(name))

    def _model_json(self, name: str) -> dict[str, Any]:
        current = self._models.current
        return {
            "id": name,
            "object": "model",
            "created": self._created_at,
            "owned_by": "promptcache",
            "context_length": current.most_tokens if current else None,
        }

    async def _tell_metrics(self, request: Request) -> Response:
        authorization = request.headers.get("authorization")
        if not self._keys.opens_metrics(authorization):
            if self._keys.namespace(authorization) is None:
                raise UnauthorizedError("present a key as Authorization: Bearer KEY")
            raise ForbiddenError("the metrics are about all keys: --metrics-key")
        text = await asyncio.to_thread(self._metrics.text)
        return Response(text, media_type=CONTENT_TYPE)

    async def _body(self, request: Request) -> dict[str, Any]:
        request.state.namespace = self._authorize(request)
        return await body_of(request, self._most_nbytes)

    def _authorize(self, request: Request) -> str:
        """Return the namespace of a request's key. Raises UnauthorizedError."""
        presented = request.headers.get("authorization")
        if presented is None and (key := request.headers.get("x-api-key")) is not None:
            presented = f"Bearer {key}"
        namespace = self._keys.namespace(presented)
        if namespace is None:
            raise UnauthorizedError("present a key as Authorization: Bearer KEY")
        return namespace


def _error_form(path: str) -> Callable[[ApiError], dict[str, Any]]:
    """Return the form in which the clients of a path expect errors."""
    return anthropic_error if path.startswith("/v1/messages") else openai_error


async def _noted(
    events: AsyncIterator[Event], on_end: Callable[[Sequence[Event]], None]
) -> AsyncIterator[Event]:
    """Yield events, and hand over all of them with the last, before it is told."""
    happened: list[Event] = []
    async for event in events:
        if not isinstance(event, Progress):
            happened.append(event)
        if isinstance(event, Finished):
            on_end(happened)
        yield event


def _log_left_out(tools: Sequence[str]) -> None:
    if tools:
        logging.info("left out, as they are not functions: %s", ", ".join(tools))


async def _describe(request: Request) -> Response:
    return JSONResponse(describe(version("promptcache")))


async def _tell_health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _not_found(request: Request, error: Exception) -> Response:
    return error_response(NotFoundError(f"there is nothing at {request.url.path}"))
