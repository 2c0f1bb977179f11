"""The server: mlx-lm's, composed with a cache that survives."""

import logging
import os
import socket
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any, Self

import mlx.core as mx
from mlx_lm.utils import maybe_set_recommended_wired_limit

from promptcache import config
from promptcache.errors import ModelError, UsageError
from promptcache.models.default import download
from promptcache.server.backend.compat import describe, incompatibilities
from promptcache.server.backend.generator import CachedResponseGenerator
from promptcache.server.backend.model_provider import IdentifiedModelProvider
from promptcache.server.backend.prompt_cache import ServerPromptCache
from promptcache.server.http.auth import ApiKeys, is_loopback
from promptcache.server.http.cache_routes import CacheApi
from promptcache.server.http.handler import ApiHandler, ServerContext
from promptcache.store import PrefixStore
from promptcache.store.reports import PinQuota
from promptcache.tiers import memory_limits

# A prompt of a million tokens, with its tools.
MAX_REQUEST_NBYTES = 32 * 10**6
# What one API key may pin, which eviction keeps: so many names, and its part of this
# share of the store. The rest is left to what is used.
MAX_PINS = 100
PINNED_SHARE = 2
# MLX tidies up in a thread's last moments, when it has been joined already, and aborts
# a process that ends before; see https://github.com/ml-explore/mlx/issues/4327.
LAST_MOMENTS_SECONDS = 0.1


class Server:
    """An OpenAI-compatible server whose prompt cache is in memory and on disk.

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
            announce: Called with a line for people before something takes long.

        Raises:
            UsageError: It may not listen there, or mlx-lm's server is another one.
            ModelError: The model cannot be loaded.
            StoreError: The store's secret cannot be used.
        """
        keys = _keys(api_keys, metrics_key, store)
        _check(options, keys, insecure=insecure)
        limit = memory_limits.cache_limit(memory_limit)
        # Has mlx-lm tell what running requests take.
        options.prompt_cache_bytes = limit
        if options.model in (None, download.NAME):
            options.model = config.model_name() or download.NAME
        maybe_set_recommended_wired_limit()
        provider = IdentifiedModelProvider(
            options, store_bits=store_bits, most_tokens=most_tokens, announce=announce
        )
        self.model = provider.name
        self._store = store
        self._http = _listen(options.host, options.port)
        self.port: int = self._http.server_address[1]
        self._cache = ServerPromptCache(
            store, memory_limit=limit, save_answers=save_answers
        )
        self._generator = CachedResponseGenerator(provider, self._cache)
        provider.ready.wait()
        if provider.error is not None or provider.model is None:
            self.close()
            raise provider.error or ModelError(f"{provider.name} cannot be loaded")
        cache_api = CacheApi(store, provider, _quota(pin_quota, keys, store))
        site = ServerContext(
            self._generator, provider, keys, cache_api, self._cache.metrics, most_nbytes
        )
        self._http.RequestHandlerClass = partial(ApiHandler, site)

    def serve(self) -> None:
        """Answer requests until `stop` is called, or an interrupt comes."""
        self._http.serve_forever(poll_interval=0.1)

    def stop(self) -> None:
        """Have `serve` return; to be called on another thread."""
        self._http.shutdown()

    def close(self) -> None:
        """End what is running, and finish what is being saved."""
        self._http.server_close()
        # Not for processes that do not go on.
        with self._store.patience.hurried() if self._store else nullcontext():
            self._generator.stop_and_join()
            self._cache.close()
        time.sleep(LAST_MOMENTS_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _HttpServer(ThreadingHTTPServer):
    # Connections that come at once; five are the default.
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        logging.info("%s: the connection broke", client_address)


def _listen(host: str, port: int) -> _HttpServer:
    """Take a port. Raises UsageError."""
    try:
        infos = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, *_, address = infos[0]
        server = type("_Server", (_HttpServer,), {"address_family": family})
        http: _HttpServer = server(address, ApiHandler)
        return http
    except OSError as error:
        raise UsageError(f"cannot listen at {host}:{port}: {error.strerror}") from error


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
    if found := [*incompatibilities()]:
        raise UsageError(f"promptcache does not know this server: {describe(found)}")
    if mx.distributed.init().size() > 1:
        raise UsageError("serve runs on one machine, start mlx_lm.server for several")
    if not (is_loopback(options.host) or len(keys) or insecure):
        raise UsageError(
            f"{options.host} can be reached from outside: give an --api-key, or "
            "--insecure to let everybody in"
        )
