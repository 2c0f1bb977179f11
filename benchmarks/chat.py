"""Chat: bytes on disk after each of 50 turns, and restoring what they left.

    python -m benchmarks.chat --turns 50

A random model with SmolLM2's keys and values and little else answers; every turn is
saved with its answer. For comparison the same cache is saved with mlx-lm after each
turn, in a file of its own. What was restored at the end is compared byte for byte.
"""

import argparse
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import mlx_lm
from mlx_lm.models.cache import KVCache, save_prompt_cache

from benchmarks import restore
from benchmarks.harness import (
    NBYTES_PER_TOKEN,
    Measurement,
    blobs_of,
    check_close,
    check_equal,
    checksum,
    fresh_cache,
    narrate,
    nbytes_of,
    options_parser,
    report,
    save_cache,
    shrink,
    write_json,
)
from benchmarks.random_llama import NARROW, SMOLLM2_VOCABULARY, make_random_llama
from promptcache import CachedGenerator
from promptcache.kvcache.kv_quantization import KVSettings
from promptcache.models.prefill_plan import PrefillPlan
from promptcache.store import PrefixStore
from promptcache.tiers.disk_tier import restore_prefix

TURN_TOKENS, ANSWER_TOKENS = 80, 16
# Every so many turns the answer is compared with plain mlx-lm's, and a line printed.
CHECKED_TURNS = 10
STORED = "promptcache, all files"
ROWS = "keys and values of the last turn"
WHOLE = "mlx-lm's files, one for each turn"


class Turn(NamedTuple):
    """Bytes after a turn: in the store, of its rows, and in mlx-lm's file of it."""

    stored_nbytes: int
    rows_nbytes: int
    file_nbytes: int


class Chat:
    """A conversation that grows by `TURN_TOKENS` a turn.

    Attributes:
        saved: The tokens that were saved with the last turn.
    """

    def __init__(self, folder: Path) -> None:
        """Make a model and a store in a folder."""
        model = make_random_llama(folder / "model", NARROW)
        self._folder = folder
        self._generator = CachedGenerator.load(model, store=self.path, save=True)
        self.fingerprint = self._generator.fingerprint()
        self._random = random.Random(0)
        self._token_ids: list[int] = []
        self.saved: list[int] = []
        self._num_turns = 0

    @property
    def path(self) -> Path:
        """Return the folder of the store."""
        return self._folder / "store"

    def take_turn(self) -> Turn:
        """Say something, be answered, and return what is on the disk then."""
        num_new = TURN_TOKENS * (self._num_turns + 1) - ANSWER_TOKENS
        num_new -= len(self._token_ids)
        self._token_ids += self._random.choices(range(SMOLLM2_VOCABULARY), k=num_new)
        answer = self._answer()
        self._num_turns += 1
        # The last token has not been read.
        self.saved = [*self._token_ids, *answer[:-1]]
        self._token_ids += answer
        rows_nbytes = len(self.saved) * NBYTES_PER_TOKEN
        return Turn(self._stored_nbytes(), rows_nbytes, self._file_nbytes())

    def _answer(self) -> list[int]:
        """Answer and save. Raises AssertionError if it is not what mlx-lm answers."""
        responses = list(
            self._generator.stream_generate(
                self._token_ids, ANSWER_TOKENS, save_answer=True
            )
        )
        check_equal("cached tokens", responses[0].cached_tokens, len(self.saved))
        answer = [response.token for response in responses]
        if self._num_turns % CHECKED_TURNS == CHECKED_TURNS - 1:
            plain = list(
                mlx_lm.stream_generate(
                    self._generator.model,
                    self._generator.tokenizer,
                    self._token_ids,
                    max_tokens=ANSWER_TOKENS,
                )
            )
            check_equal("answer", answer, [response.token for response in plain])
            logprobs, expected = (
                [r.logprobs[r.token].item() for r in run] for run in (responses, plain)
            )
            check_close("logprobs", logprobs, expected)
        return answer

    def _stored_nbytes(self) -> int:
        return nbytes_of([f for f in self.path.rglob("*") if f.is_file()])

    def _file_nbytes(self) -> int:
        """Return how big mlx-lm's file of this turn is, without keeping it."""
        file = self._folder / "turn.safetensors"
        save_prompt_cache(str(file), self.cache())
        nbytes = file.stat().st_size
        file.unlink()
        return nbytes

    def cache(self) -> list[KVCache]:
        """Return a cache that has read what was saved."""
        store, cache = self._generator.store, fresh_cache()
        assert store is not None
        resumed = restore_prefix(
            store,
            self.fingerprint,
            cache,
            self.saved,
            plan=PrefillPlan(),
            kv=KVSettings(),
        )
        check_equal("rows restored", resumed.match.cached_tokens, len(self.saved))
        shrink(cache, len(self.saved))
        return cache

    def close(self) -> None:
        """Close the store."""
        self._generator.close()


def size_measurements(turns: Sequence[Turn]) -> Iterator[Measurement]:
    """Yield three lines for each turn."""
    files_nbytes = 0
    for number, turn in enumerate(turns, start=1):
        files_nbytes += turn.file_nbytes
        rows = turn.rows_nbytes
        for what, nbytes in {
            STORED: turn.stored_nbytes,
            ROWS: rows,
            WHOLE: files_nbytes,
        }.items():
            ratios = {} if what == ROWS else {ROWS: nbytes / rows}
            yield Measurement({"turn": number, "what": what}, "B", [nbytes], ratios)


def restore_cases(chat: Chat, folder: Path) -> list[restore.Case]:
    """Return what the chat left, and the same rows in one segment."""
    cache, num_tokens = chat.cache(), len(chat.saved)
    one_folder = folder / "one"
    with PrefixStore(one_folder) as store:
        save_cache(store, chat.fingerprint, chat.saved, cache, cut_at=[num_tokens])
    files = blobs_of(one_folder)
    one = restore.Case(
        restore.labels(num_tokens, "promptcache", len(files)),
        "promptcache",
        num_tokens,
        files,
        checksum(cache, num_tokens),
        [*chat.saved, *restore.SUFFIX],
        one_folder,
        chat.fingerprint,
    )
    files = blobs_of(chat.path)
    labels = restore.labels(num_tokens, "promptcache", len(files))
    return [one, replace(one, labels=labels, files=files, store=chat.path)]


def run(options: argparse.Namespace) -> tuple[list[Measurement], list[Measurement]]:
    """Chat, then restore; return sizes and speeds."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        chat, turns = Chat(folder), []
        for number in range(options.turns):
            if number % CHECKED_TURNS == 0:
                narrate(f"chat: turn {number + 1} of {options.turns}")
            turns.append(chat.take_turn())
        cases = restore_cases(chat, folder)
        chat.close()
        speeds = restore.measurements(cases, options.trials, against=[0])
    return list(size_measurements(turns)), speeds


def main() -> None:
    """Measure and print two tables."""
    parser = options_parser(__doc__, trials=5)
    parser.add_argument("--turns", type=int, default=50)
    options = parser.parse_args()
    sizes, speeds = run(options)
    shown = [m for m in sizes if int(m.labels["turn"]) % CHECKED_TURNS == 0]
    report("chat", shown or sizes, file=None)
    print()
    report("chat", speeds, file=None)
    if options.json is not None:
        write_json("chat", sizes, options.json)
        speeds_file = options.json.with_stem(f"{options.json.stem}-restore")
        write_json("chat-restore", speeds, speeds_file)


if __name__ == "__main__":
    main()
