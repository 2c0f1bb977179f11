"""A request in the server: its tokens, its progress, and its client."""

import select
import socket
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Event
from typing import Any, Self, SupportsIndex, overload

from promptcache.errors import ModelError
from promptcache.kvcache.snapshot import Snapshot
from promptcache.models.loaded import LoadedModel
from promptcache.segments.chain import common_length, pack
from promptcache.segments.fingerprint import Fingerprint
from promptcache.server.backend.compat import CompletionRequest
from promptcache.tiers.prefix_cache import FetchedPrefix
from promptcache.tiers.prompt_read import PromptRead


@dataclass(eq=False, slots=True)
class RequestState:
    """How far a request has come.

    Attributes:
        read: Its prompt, and how it is read.
        model: What reads it.
        fingerprint: What its KV values depend on.
        head: How many tokens come before the first user's text, 0 if unknown.
        max_tokens: How long its answer may become.
        over: Set when nobody waits for the answer any more.
        is_sliceable: Whether a cache in memory can be taken over at any token.
        fetched: What was taken from memory or disk.
        num_read: Up to where it has been read.
        snapshots: What its cache has lost since what is stored.
        is_alone: Whether nothing else was read meanwhile.
        started_at: When it was looked up.
        load_seconds: How long it took to find and to load what was cached.
        kept_at: When it was kept last.
        saved: Done when what was last to be saved of it is stored.
        settled: Done when its answer is kept and, if it is to be, stored.
    """

    read: PromptRead
    model: LoadedModel
    fingerprint: Fingerprint
    head: int
    max_tokens: int
    over: Event
    is_sliceable: bool = True
    fetched: FetchedPrefix | None = None
    num_read: int = 0
    snapshots: list[Snapshot] = field(default_factory=list)
    is_alone: bool = True
    started_at: float = 0.0
    load_seconds: float = 0.0
    kept_at: float = 0.0
    saved: "Future[str] | None" = None
    settled: "Future[None]" = field(default_factory=Future)
    _data: bytes = b""

    @property
    def token_ids(self) -> list[int]:
        """Return the prompt."""
        return self.read.token_ids

    @property
    def num_tokens(self) -> int:
        """Return the length of the prompt."""
        return self.read.num_tokens

    @property
    def cached_tokens(self) -> int:
        """Return how many tokens were taken from memory or disk."""
        return 0 if self.fetched is None else self.fetched.cached_tokens

    @property
    def data(self) -> bytes:
        """Return the prompt's token ids, packed."""
        self._data = self._data or pack(self.token_ids)
        return self._data

    @property
    def is_read(self) -> bool:
        """Return whether nothing but the last token of the prompt is left to read."""
        return self.num_read >= self.num_tokens - 1

    def check_model(self) -> None:
        """Raise ModelError if its model is not what it was when it was asked."""
        now = self.model.fingerprint(self.read.settings)
        if now.digest != self.fingerprint.digest:
            raise ModelError("the model has changed meanwhile")

    def begin(self, fetched: FetchedPrefix | None) -> None:
        """Note what a cache holds before anything is read."""
        self.fetched = fetched
        self.num_read = self.cached_tokens
        self.kept_at = time.perf_counter()
        self.load_seconds = self.kept_at - self.started_at
        if fetched is not None and fetched.restored is not None:
            self.snapshots = [fetched.restored]

    def settle(self) -> None:
        """Be settled when what was last to be saved is stored, or at once."""

        def settle(_: object) -> None:
            if not self.settled.done():
                self.settled.set_result(None)

        if self.saved is None:
            settle(None)
        else:
            self.saved.add_done_callback(settle)

    def ends(self) -> Iterable[int]:
        """Return where what it is going to read can be taken over."""
        last = self.num_tokens - 1
        pieces = self.read.plan.pieces(self.num_read, last)
        return (end for _, end in pieces if self.read.plan.can_resume(end))

    def usable_by(self, other: "RequestState") -> int:
        """Return how much of another prompt this one is going to have read."""
        if self.fingerprint.digest != other.fingerprint.digest:
            return 0
        shared = min(common_length(self.data, other.data), other.num_tokens - 1)
        ends = [min(end, shared) if self.is_sliceable else end for end in self.ends()]
        usable = [
            self.read.plan.last_resume_point(end) for end in ends if end <= shared
        ]
        return max(usable, default=0)


class RequestTokens(list[int]):
    """Token ids of a request; a slice of them belongs to it, too."""

    def __init__(self, token_ids: Iterable[int], reading: RequestState) -> None:
        super().__init__(token_ids)
        self.reading = reading

    @overload
    def __getitem__(self, index: SupportsIndex) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> Self: ...

    def __getitem__(self, index: Any) -> Any:
        """Return one id, or a slice that knows its request."""
        item = super().__getitem__(index)
        return type(self)(item, self.reading) if isinstance(index, slice) else item


class ClientDisconnectedError(ConnectionError):
    """The client does not wait for the answer any more."""


@dataclass
class ServedRequest(CompletionRequest):
    """mlx-lm's request, with whose it is and how far it has come.

    Attributes:
        namespace: Prefixes are found only under the namespace they were saved in.
        connection: The client's socket.
        over: Set when nobody waits for the answer any more.
        tokenized: What the server made of it, or why it could not.
        reading: How far it has come, once it has been tokenized.
        error: Why it has failed.
    """

    namespace: str = ""
    connection: socket.socket | None = None
    over: threading.Event = field(default_factory=threading.Event)
    tokenized: Any = None
    reading: RequestState | None = None
    error: Exception | None = None

    @classmethod
    def of(cls, request: Any, namespace: str, connection: socket.socket | None) -> Self:
        """Return a request of mlx-lm's as one of these."""
        return cls(**vars(request), namespace=namespace, connection=connection)

    def check_connected(self) -> None:
        """Raise HungUpError if the client has closed its side."""
        if self.connection is None:
            return
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                raise ClientDisconnectedError("the client hung up")
        except (OSError, ValueError) as error:
            raise ClientDisconnectedError("the client hung up") from error
