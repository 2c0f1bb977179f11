"""Constraints: answers that match a JSON schema, by means of llguidance.

Tokens that would leave the grammar are masked before one is chosen.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLTokenizer

from promptcache.engine.sampling import LogitsProcessor
from promptcache.errors import UsageError

# Models that may put any white space between two tokens may never come to an end.
OPTIONS = {"whitespace_flexible": False}


class Constraints:
    """Makes constraints for one tokenizer, which takes a second the first time."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = sorted(tokenizer.eos_token_ids)
        self._vocabulary: LLTokenizer | None = None
        self._lock = threading.Lock()

    def of_schema(
        self, schema: Mapping[str, Any], *, is_thinking: bool
    ) -> LogitsProcessor:
        """Return what makes an answer JSON that matches a schema.

        Args:
            schema: The schema; an empty one is any JSON object.
            is_thinking: Whether the prompt ends inside of reasoning, which is free.

        Raises:
            UsageError: The schema is none, or not one that can be enforced.
        """
        text = json.dumps(dict(schema) or {"type": "object"})
        grammar = LLMatcher.grammar_from_json_schema(text, overrides=OPTIONS)
        vocabulary = self._vocabulary_of()
        is_wrong, messages = LLMatcher.validate_grammar_with_warnings(
            grammar, vocabulary
        )
        if is_wrong:
            reason = messages[0].splitlines()[0]
            raise UsageError(f"the JSON schema cannot be enforced: {reason}")
        matcher = LLMatcher(vocabulary, grammar)
        ends = self._tokenizer.think_end_tokens if is_thinking else ()
        return _Constraint(matcher, self._eos_ids, ends or ())

    def _vocabulary_of(self) -> LLTokenizer:
        with self._lock:
            if self._vocabulary is None:
                backend = getattr(self._tokenizer, "backend_tokenizer", None)
                if backend is None:
                    raise UsageError(
                        "response_format is not supported with this tokenizer"
                    )
                self._vocabulary = LLTokenizer(
                    backend.to_str(),
                    n_vocab=max(self._vocab_size, backend.get_vocab_size()),
                    eos_token=self._eos_ids,
                )
            return self._vocabulary


class _Constraint:
    """Masks what the grammar does not allow next, of one answer."""

    def __init__(
        self, matcher: LLMatcher, eos_ids: Sequence[int], ends: Sequence[int]
    ) -> None:
        self._matcher = matcher
        self._eos_ids = [*eos_ids]
        # What ends the reasoning before it, nothing once it has ended.
        self._ends = [*ends]
        self._num_seen: int | None = None

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Return the logits with those of other tokens at minus infinity.

        Args:
            tokens: The prompt and the answer so far, shape `(tokens,)`.
            logits: Shape `(1, vocabulary)`.
        """
        if self._num_seen is None:
            self._num_seen = tokens.shape[0]
        for token in tokens[self._num_seen :].tolist():
            self._num_seen += 1
            self._take(token, tokens)
        if self._ends:
            return logits
        if self._matcher.is_error():
            raise UsageError(f"the answer leaves its schema: {self._reason()}")
        return mx.where(self._allowed(logits.shape[-1]), logits, -float("inf"))

    def _take(self, token: int, tokens: mx.array) -> None:
        if not self._ends:
            if not self._matcher.is_stopped():
                self._matcher.consume_token(token)
            return
        assert self._num_seen is not None
        last = tokens[self._num_seen - len(self._ends) : self._num_seen]
        if last.tolist() == self._ends:
            self._ends = []

    def _allowed(self, vocab_size: int) -> mx.array:
        """Return which tokens may come next, shape `(vocabulary,)`."""
        allowed = np.zeros(vocab_size, dtype=bool)
        if self._matcher.is_stopped():
            # Nothing but the end can follow.
            allowed[self._eos_ids] = True
        else:
            packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            bits = np.unpackbits(packed, bitorder="little")[:vocab_size]
            allowed[: len(bits)] = bits
        return mx.array(allowed)

    def _reason(self) -> str:
        return (self._matcher.get_error() or "").splitlines()[0]
