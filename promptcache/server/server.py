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
from typing import Self

import h11
import mlx.core as mx
import uvicorn
from mlx_lm.utils import maybe_set_recommended_wired_limit
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from promptcache import config
from promptcache.errors import UsageError
from promptcache.models.default import download
from promptcache.server.api.errors import INVALID, ApiError, openai_error
from promptcache.server.app import Application
from promptcache.server.auth import ApiKeys, is_loopback
from promptcache.server.cache_routes import CacheApi
from promptcache.server.metrics import Gauges, ServingMetrics
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
        keys = _keys(api_keys, metrics_key, store)
        _check(options, keys, insecure=insecure)
        if options.model in (None, download.NAME):
            options.model = config.model_name() or download.NAME
        maybe_set_recommended_wired_limit()
        _allow_many_connections()
        self._store = store
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
        quota = _quota(pin_quota, keys, store)
        app = self._application(options, keys, quota, most_nbytes, save_answers)
        asgi = app.asgi(options.host, options.allowed_origins)
        self._uvicorn = uvicorn.Server(_uvicorn_config(asgi))

    def _application(
        self,
        options: Namespace,
        keys: ApiKeys,
        quota: PinQuota | None,
        most_nbytes: int,
        save_answers: bool,
    ) -> Application:
        metrics = ServingMetrics(self._gauges)
        service = CompletionService(
            self._models, options, metrics, save_answers=save_answers
        )
        cache = CacheApi(self._store, self._models, service, quota)
        return Application(self._models, service, cache, keys, metrics, most_nbytes)

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


def _uvicorn_config(app: Starlette) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_Protocol,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_SECONDS,
        backlog=BACKLOG,
    )


class _Protocol(H11Protocol):
    """Uvicorn's, which says in JSON why it does not understand a request."""

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request, and end the connection."""
        error = ApiError(400, INVALID, None, None, msg)
        body = json.dumps(openai_error(error)).encode()
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
