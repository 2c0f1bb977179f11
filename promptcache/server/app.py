"""The server: several APIs on one engine, with a cache that survives."""

import asyncio
import json
import os
import resource
import socket
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Self

import h11
import mlx.core as mx
import uvicorn
from mlx_lm.utils import maybe_set_recommended_wired_limit
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from promptcache import config
from promptcache.errors import UsageError
from promptcache.models.default import download
from promptcache.server.api.chat_completions import ChatAnswer, ChatRequest
from promptcache.server.api.text_completions import TextAnswer, TextRequest
from promptcache.server.auth import ApiKeys, is_loopback
from promptcache.server.cache_routes import CacheApi
from promptcache.server.completion import Completion
from promptcache.server.errors import (
    INVALID,
    ApiError,
    ForbiddenError,
    NotFoundError,
    UnauthorizedError,
)
from promptcache.server.http import (
    Doorkeeper,
    body_of,
    error_response,
    handled,
    streamed,
    whole,
)
from promptcache.server.metrics import CONTENT_TYPE, Gauges, ServingMetrics
from promptcache.server.models import Models
from promptcache.server.service import CompletionService
from promptcache.store import PrefixStore
from promptcache.store.reports import PinQuota
from promptcache.tiers import memory_limits

# A prompt of a million tokens, with its tools.
MAX_REQUEST_NBYTES = 32 * 10**6
# What one API key may pin, which eviction keeps: so many names, and its part of this
# share of the store. The rest is left to what is used.
MAX_PINS = 100
PINNED_SHARE = 2
# How long a request that is under way has when the server stops.
LAST_SECONDS = 1
# Connections that come at once.
BACKLOG = 1024
# How long a connection is kept for a next request.
KEEP_ALIVE_SECONDS = 75
# MLX tidies up in a thread's last moments, when it has been joined already, and aborts
# a process that ends before; see https://github.com/ml-explore/mlx/issues/4327.
LAST_MOMENTS_SECONDS = 0.1


class Server:
    """A server whose prompt cache is in memory and on disk.

    Attributes:
        port: Where it listens, also where any port would do.
        model: What people call the model.
    """

    def __init__(
        self,
        options: Namespace,
        *,
        store: PrefixStore | None,
        memory_limit: int | None = None,
        api_keys: tuple[str, ...] = (),
        metrics_key: str | None = None,
        pin_quota: int | None = None,
        insecure: bool = False,
        save_answers: bool = True,
        store_bits: int | None = None,
        most_nbytes: int = MAX_REQUEST_NBYTES,
        most_tokens: int | None = None,
        allowed_models: Sequence[str] = (),
        announce: Callable[[str], None] | None = None,
    ) -> None:
        """Listen, and load the model.

        Args:
            options: The options of mlx-lm's server, as `mlx_lm.server` parses them.
            store: The store, or None to keep nothing on disk. It is not closed.
            memory_limit: How many bytes of memory caches may take, else
                `PROMPTCACHE_MEMORY_LIMIT`, else an eighth of the memory.
            api_keys: Who may use it; each key has its own prefixes. Else those in
                `PROMPTCACHE_API_KEY`.
            metrics_key: What opens `/metrics`, which API keys do not, else
                `PROMPTCACHE_METRICS_KEY`.
            pin_quota: How many bytes of prefixes each key may pin, else its part of a
                half of the store; without keys any number.
            insecure: Whether others than this machine may use it without a key.
            save_answers: Whether to store answers, too.
            store_bits: In how many bits to store keys and values.
            most_nbytes: How large a request may be.
            most_tokens: How long a prompt may be, 0 for any length, None for as long
                as the model was made for.
            allowed_models: Patterns of other models that requests may name.
            announce: Called with a line for people before something takes long.

        Raises:
            UsageError: It may not listen there.
            ModelError: The model cannot be loaded.
            StoreError: The store's secret cannot be used.
        """
        self._keys = _keys(api_keys, metrics_key, store)
        _check(options, self._keys, insecure=insecure)
        if options.model in (None, download.NAME):
            options.model = config.model_name() or download.NAME
        maybe_set_recommended_wired_limit()
        _allow_many_connections()
        self._options = options
        self._store = store
        self._most_nbytes = most_nbytes
        self._memory_limit = memory_limits.cache_limit(memory_limit)
        self._socket = _listen(options.host, options.port)
        self.port: int = self._socket.getsockname()[1]
        try:
            self._models = Models(
                options,
                store,
                memory_limit=self._memory_limit,
                allowed=allowed_models,
                store_bits=store_bits,
                most_tokens=most_tokens,
                announce=announce,
            )
        except BaseException:
            self._socket.close()
            raise
        self.model = self._models.name
        self._created_at = int(time.time())
        self._metrics = ServingMetrics(self._gauges)
        self._service = CompletionService(
            self._models, options, self._metrics, save_answers=save_answers
        )
        quota = _quota(pin_quota, self._keys, store)
        self._cache = CacheApi(store, self._models, self._service, quota)
        self._uvicorn = uvicorn.Server(self._config())

    def _config(self) -> uvicorn.Config:
        return uvicorn.Config(
            self.app(),
            http=_Protocol,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=LAST_SECONDS,
            backlog=BACKLOG,
        )

    def app(self) -> Starlette:
        """Return the application, without what listens for it."""
        endpoints = {
            "POST": {
                "/v1/chat/completions": self._chat,
                "/chat/completions": self._chat,
                "/v1/completions": self._text,
                "/v1/cache/{question}": self._ask_cache,
            },
            "GET": {
                "/v1/models": self._list_models,
                "/v1/models/{name:path}": self._show_model,
                "/v1/cache": self._list_prefixes,
                "/metrics": self._tell_metrics,
                "/health": _tell_health,
            },
        }
        routes = [
            Route(path, handled(endpoint), methods=[method])
            for method, by_path in endpoints.items()
            for path, endpoint in by_path.items()
        ]
        origins = [origin for origin in self._options.allowed_origins if origin]
        doorkeeper = Middleware(Doorkeeper, host=self._options.host, origins=origins)
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

    def serve(self) -> None:
        """Answer requests until `stop` is called, or an interrupt comes."""
        asyncio.run(self._uvicorn.serve(sockets=[self._socket]))

    def stop(self) -> None:
        """Have `serve` return; to be called on another thread."""
        self._uvicorn.should_exit = True

    def close(self) -> None:
        """End what is running, and finish what is being saved."""
        self._socket.close()
        # Not for processes that do not go on.
        with self._store.patience.hurried() if self._store else nullcontext():
            self._models.close()
        time.sleep(LAST_MOMENTS_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # Endpoints

    async def _chat(self, request: Request) -> Response:
        body = ChatRequest.model_validate(await self._body(request))
        return await self._complete(request, body, ChatAnswer(body), body.completion())

    async def _text(self, request: Request) -> Response:
        body = TextRequest.model_validate(await self._body(request))
        return await self._complete(request, body, TextAnswer(body), body.completion())

    async def _complete(
        self,
        request: Request,
        body: ChatRequest | TextRequest,
        answer: ChatAnswer | TextAnswer,
        completion: Completion,
    ) -> Response:
        namespace = request.state.namespace
        client = request.client.host if request.client else "-"
        events = self._service.events(completion, namespace, client)
        if body.stream:
            return await streamed(request, events, answer.chunks, "[DONE]")
        return await whole(request, events, answer.whole)

    async def _ask_cache(self, request: Request) -> Response:
        body = await self._body(request)
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

    async def _list_prefixes(self, request: Request) -> Response:
        namespace = self._authorize(request)
        return JSONResponse(await asyncio.to_thread(self._cache.prefixes, namespace))

    async def _list_models(self, request: Request) -> Response:
        self._authorize(request)
        return JSONResponse({"object": "list", "data": [self._model_json(self.model)]})

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

    def _gauges(self) -> Gauges:
        store, served = self._store, self._models.current
        nbytes, limits, evictions = {}, {"memory": self._memory_limit}, {}
        if store is not None:
            nbytes["disk"], limits["disk"] = store.total_nbytes(), store.max_nbytes
            evictions["disk"] = store.num_evicted
        if served is None:
            return Gauges(nbytes, limits, evictions, {}, 0, 0, 0, 0)
        engine, memory = served.engine, served.engine.prefixes.memory
        nbytes["memory"], evictions["memory"] = memory.nbytes, memory.num_evicted
        prefixes = engine.prefixes
        return Gauges(
            nbytes,
            limits,
            evictions,
            prefixes.num_saves,
            prefixes.queued_nbytes,
            prefixes.num_queued,
            engine.num_active + engine.num_waiting,
            engine.num_waiting,
            engine.num_waits,
        )


async def _tell_health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _not_found(request: Request, error: Exception) -> Response:
    return error_response(NotFoundError(f"there is nothing at {request.url.path}"))


class _Protocol(H11Protocol):
    """Uvicorn's, which says in JSON why it does not understand a request."""

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request, and end the connection."""
        error = ApiError(400, INVALID, None, msg)
        body = json.dumps(error.as_json()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        reason = b"Bad Request"
        head = h11.Response(status_code=400, headers=headers, reason=reason)
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def _listen(host: str, port: int) -> socket.socket:
    """Take a port. Raises UsageError."""
    try:
        infos = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = infos[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # From now on clients may come.
        listener.listen(BACKLOG)
    except OSError as error:
        raise UsageError(f"cannot listen at {host}:{port}: {error.strerror}") from error
    return listener


def _allow_many_connections() -> None:
    """Have as many descriptors as the system allows: idle connections cost little."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (ValueError, OSError):
        # macOS says unlimited, and means 10,240.
        resource.setrlimit(resource.RLIMIT_NOFILE, (10240, most))


def _keys(
    api_keys: tuple[str, ...], metrics_key: str | None, store: PrefixStore | None
) -> ApiKeys:
    """Return the keys, with namespaces that only this store can make of them."""
    api_keys = api_keys or config.api_keys()
    metrics_key = metrics_key or config.metrics_key()
    if not api_keys:
        return ApiKeys(metrics_key=metrics_key)
    secret = os.urandom(32) if store is None else store.secret()
    return ApiKeys(api_keys, secret=secret, metrics_key=metrics_key)


def _quota(
    nbytes: int | None, keys: ApiKeys, store: PrefixStore | None
) -> PinQuota | None:
    """Return what each key may pin; None without keys, where nobody else can."""
    if nbytes is None:
        if store is None or not len(keys):
            return None
        nbytes = store.max_nbytes // PINNED_SHARE // len(keys)
    return PinQuota(MAX_PINS, nbytes)


def _check(options: Namespace, keys: ApiKeys, *, insecure: bool) -> None:
    if mx.distributed.init().size() > 1:
        raise UsageError("serve runs on one machine, start mlx_lm.server for several")
    if not (is_loopback(options.host) or len(keys) or insecure):
        raise UsageError(
            f"{options.host} can be reached from outside: give an --api-key, or "
            "--insecure to let everybody in"
        )
