"""Served requests: what a client asks for, and whether it still listens."""

import select
import socket
import threading
from dataclasses import dataclass, field
from typing import Any, Self

from promptcache.server.mlx_lm_server import CompletionRequest
from promptcache.server.served_prompt import Reading


class HungUpError(ConnectionError):
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
    reading: Reading | None = None
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
                raise HungUpError("the client hung up")
        except (OSError, ValueError) as error:
            raise HungUpError("the client hung up") from error
