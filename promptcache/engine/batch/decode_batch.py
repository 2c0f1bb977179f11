"""The batch: answers of several requests, decoded together on mlx-lm's batch."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import mlx.core as mx
from mlx_lm.generate import GenerationBatch, StopSequences, generation_stream

from promptcache.engine.decode import CLEAR_CACHE_TOKENS, Step
from promptcache.engine.sampling import LogitsProcessor, Sampler, greedy
from promptcache.kvcache.classes import evaluate

Member = TypeVar("Member", bound=Hashable)
# Members end when they are told to.
NO_END = 2**31


@dataclass(frozen=True, slots=True)
class Joining(Generic[Member]):
    """What a batch has to know of a request that joins it.

    Attributes:
        member: Who it is.
        cache: One mlx-lm cache object a layer, each of which can be merged.
        token_ids: The tokens that the cache holds.
        token: The one after them, which it has not read.
        sampler: From log-probabilities, shape `(1, vocabulary)`, to a token.
        logits_processors: Called with all tokens so far and the logits.
    """

    member: Member
    cache: Sequence[Any]
    token_ids: Sequence[int]
    token: int
    sampler: Sampler
    logits_processors: Sequence[LogitsProcessor] = ()


class DecodeBatch(Generic[Member]):
    """Decodes a token for each of its members in one pass of the model.

    The caches of those who join are copied into the batch's; nothing writes to them
    any more.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._batch = GenerationBatch.empty(model, greedy)
        # In the order of the batch's rows; None for those who have left since.
        self._members: list[Member | None] = []
        self._num_steps = 0

    def __len__(self) -> int:
        return len(self.members)

    def __contains__(self, member: Member) -> bool:
        return member in self._members

    @property
    def members(self) -> list[Member]:
        """Return who is in it."""
        return [member for member in self._members if member is not None]

    @property
    def nbytes(self) -> int:
        """Return the size of its caches."""
        return sum(layer.nbytes for layer in self._batch.prompt_cache)

    def join(self, joining: Sequence[Joining[Member]]) -> None:
        """Take in requests; their next tokens come with the next step."""
        self._drop_those_who_left()
        layers = zip(*(each.cache for each in joining), strict=True)
        with mx.stream(generation_stream):
            batch = GenerationBatch(
                self._model,
                [0] * len(joining),
                mx.array([each.token for each in joining]),
                [layer[0].merge([*layer]) for layer in layers],
                [[*each.token_ids] for each in joining],
                [each.sampler for each in joining],
                greedy,
                [tuple(each.logits_processors) for each in joining],
                [StopSequences()] * len(joining),
                [NO_END] * len(joining),
            )
            self._batch.extend(batch)
        self._members += [each.member for each in joining]

    def step(self) -> list[tuple[Member, Step]]:
        """Return the next token of every member."""
        self._drop_those_who_left()
        with mx.stream(generation_stream):
            responses = self._batch.next()
        self._num_steps += 1
        if self._num_steps % CLEAR_CACHE_TOKENS == 0:
            mx.clear_cache()
        steps = (Step(response.token, response.logprobs) for response in responses)
        return [*zip(self.members, steps, strict=True)]

    def cache_of(self, member: Member) -> tuple[list[Any], int]:
        """Return a copy of a member's cache, and how many tokens that has read."""
        index = self._members.index(member)
        with mx.stream(generation_stream):
            cache = self._batch.extract_cache(index)
            evaluate(cache)
            return cache, len(self._batch.tokens[index])

    def leave(self, member: Member) -> None:
        """Go on without a member."""
        if member in self._members:
            self._members[self._members.index(member)] = None

    def _drop_those_who_left(self) -> None:
        """Make room, once for all who have left since the last step."""
        if None not in self._members:
            return
        keep = [i for i, member in enumerate(self._members) if member is not None]
        if not keep:
            return self.clear()
        self._members = [*self.members]
        with mx.stream(generation_stream):
            self._batch.filter(keep)

    def clear(self) -> None:
        """Go on without any member."""
        self._members.clear()
        self._batch = GenerationBatch.empty(self._model, greedy)
