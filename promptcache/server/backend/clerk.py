"""The clerk: notes in the store what requests reused, and lets nobody wait for it."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

from promptcache.errors import StoreError
from promptcache.server.backend.request_state import RequestState
from promptcache.server.metrics import ServingMetrics
from promptcache.store import PrefixStore
from promptcache.store.types import RequestUsage


class Clerk:
    """One thread that writes receipts and speeds into a store."""

    def __init__(self, store: PrefixStore, metrics: ServingMetrics) -> None:
        """Take where to note what was reused, and whom to tell the seconds saved."""
        self._store = store
        self._metrics = metrics
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="promptcache-clerk")

    def note(self, reading: RequestState) -> None:
        """Note what a request reused; its prompt has just been read to the end."""
        seconds = time.perf_counter() - reading.started_at - reading.load_seconds
        num_new = reading.num_tokens - reading.cached_tokens
        receipt = RequestUsage(
            reading.fingerprint,
            reading.match,
            reading.cached_tokens,
            num_new,
            reading.load_seconds,
            seconds,
        )
        # A speed among others says nothing of the model's.
        num_timed = num_new - 1 if reading.is_alone else 0
        self._pool.submit(self._write, receipt, num_timed, reading.loaded_tokens)

    def _write(self, receipt: RequestUsage, num_timed: int, num_loaded: int) -> None:
        fingerprint, store = receipt.fingerprint, self._store
        with contextlib.suppress(StoreError):
            store.usage_log.add_speed(fingerprint, num_timed, receipt.prefill_seconds)
            store.usage_log.add_load(fingerprint, num_loaded, receipt.load_seconds)
            _, saved_seconds = store.usage_log.record(receipt)
            self._metrics.save_seconds(saved_seconds)

    def close(self) -> None:
        """Finish what is to be noted."""
        self._pool.shutdown()
