"""Kept responses: conversations that a later request goes on from by their id."""

import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

MAX_NBYTES = 64 * 10**6


class KeptResponses:
    """The latest conversations of the Responses API, in memory, by namespace and id."""

    def __init__(self, max_nbytes: int = MAX_NBYTES) -> None:
        self._max_nbytes = max_nbytes
        self._nbytes = 0
        self._kept: OrderedDict[tuple[str, str], bytes] = OrderedDict()

    def keep(
        self, namespace: str, response_id: str, items: Sequence[dict[str, Any]]
    ) -> None:
        """Keep the items of a conversation; the oldest give way."""
        data = json.dumps([*items]).encode()
        self._kept[namespace, response_id] = data
        self._nbytes += len(data)
        while self._nbytes > self._max_nbytes:
            _, oldest = self._kept.popitem(last=False)
            self._nbytes -= len(oldest)

    def find(self, namespace: str, response_id: str) -> list[dict[str, Any]] | None:
        """Return the items of a conversation, None if it is not kept."""
        data = self._kept.get((namespace, response_id))
        if data is None:
            return None
        self._kept.move_to_end((namespace, response_id))
        items: list[dict[str, Any]] = json.loads(data)
        return items
