"""Replay: recorded conversations, turn by turn, against a brute-force oracle.

    python -m benchmarks.replay ../shared/data/tau-bench/gpt-4o-airline.json

Every turn's prompt is what was said before it, cut to 4,000 tokens. What it reuses is
compared with the longest prefix that it shares with any prompt before, found by
comparing token ids with all of them.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import machine, print_table
from promptcache import CachedGenerator
from promptcache.prompts.chat import Message
from promptcache.prompts.render import RenderedPrompt

MAX_TOKENS = 4000


class Turn(NamedTuple):
    """What one turn reused.

    Attributes:
        conversation: Which one it is of.
        prompt_tokens: Length of its prompt.
        shared_tokens: How many of them begin some prompt before, but for the last one,
            which has to be read.
        cached_tokens: How many were reused.
        seconds: Time to the first token.
    """

    conversation: int
    prompt_tokens: int
    shared_tokens: int
    cached_tokens: int
    seconds: float


class Oracle:
    """Knows all prompts so far, and compares with each of them."""

    def __init__(self) -> None:
        """Know nothing."""
        self._prompts: list[np.ndarray] = []
        self.num_distinct = 0

    def shared_tokens(self, token_ids: Sequence[int]) -> int:
        """Return how many tokens a prompt shares with one before, and remember it."""
        prompt = np.array(token_ids)
        longest = max((_shared(prompt, other) for other in self._prompts), default=0)
        self._prompts.append(prompt)
        self.num_distinct += len(prompt) - longest
        return min(longest, len(prompt) - 1)


def _shared(left: np.ndarray, right: np.ndarray) -> int:
    length = min(len(left), len(right))
    different = np.flatnonzero(left[:length] != right[:length])
    return int(different[0]) if len(different) else length


def conversations(path: Path, number: int) -> list[list[Message]]:
    """Return the messages of the first conversations of a tau-bench file."""
    return [entry["traj"] for entry in json.loads(path.read_text())[:number]]


def prompts(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """Yield what was said before each answer."""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            yield messages[:i]


def cut(prompt: RenderedPrompt) -> RenderedPrompt:
    """Return a prompt without what is beyond `MAX_TOKENS`."""
    boundaries = tuple(b for b in prompt.boundaries if b < MAX_TOKENS)
    return prompt._replace(
        token_ids=prompt.token_ids[:MAX_TOKENS], boundaries=boundaries
    )


def replay(
    generator: CachedGenerator, said: Sequence[Sequence[Message]], oracle: Oracle
) -> Iterator[Turn]:
    """Answer every turn of conversations with one token, saving all prompts."""
    for number, messages in enumerate(said):
        for history in prompts(messages):
            prompt = cut(generator.render(history))
            shared = oracle.shared_tokens(prompt.token_ids)
            (last,) = generator.stream_generate(prompt, max_tokens=1, save=True)
            yield Turn(
                number,
                last.prompt_tokens,
                shared,
                last.cached_tokens,
                last.ttft_seconds,
            )


def stored_tokens(generator: CachedGenerator) -> int:
    """Return of how many tokens the store has rows, counted in its blobs' headers."""
    from safetensors import safe_open

    assert generator.store is not None
    total = 0
    for path in generator.store.path.glob("blobs/*/*.safetensors"):
        with safe_open(path, "np") as blob:
            total += blob.get_slice("token_ids").get_shape()[0]
    return total


def main() -> None:
    """Replay with the embedded default model; print a row for each conversation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--conversations", type=int, default=20)
    options = parser.parse_args()
    said = conversations(options.file, options.conversations)
    oracle, turns = Oracle(), list[Turn]()
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory() as store:
        generator = CachedGenerator.load(store=store)
        started = time.perf_counter()
        for turn in replay(generator, said, oracle):
            turns.append(turn)
        seconds = time.perf_counter() - started
        stored = stored_tokens(generator)
    headers = ["conversation", "turns", "tokens", "shared", "cached", "to first token"]
    print_table(headers, [_row(number, turns) for number in range(len(said))])
    wrong = [turn for turn in turns if turn.cached_tokens != turn.shared_tokens]
    print(
        f"\n{len(turns)} turns in {seconds:.0f} s, {len(wrong)} of them other than the "
        f"oracle says; {stored} tokens stored, {oracle.num_distinct} distinct"
    )


def _row(number: int, turns: Sequence[Turn]) -> list[Any]:
    own = [turn for turn in turns if turn.conversation == number]
    return [
        number,
        len(own),
        sum(turn.prompt_tokens for turn in own),
        sum(turn.shared_tokens for turn in own),
        sum(turn.cached_tokens for turn in own),
        f"{sum(turn.seconds for turn in own):.1f} s",
    ]


if __name__ == "__main__":
    main()
