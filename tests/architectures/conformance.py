"""Conformance: every architecture of mlx-lm, built in one process, resumed in another.

For each tiny random model of `architectures` one process stores prefixes
and ends; a second one opens the store, continues and compares with a cold run that is
cut at the same places: token ids, logits, and how many tokens went through the model.
`python -m tests.architectures.conformance --write docs/models.md`
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

from promptcache import CachedGenerator
from promptcache.engine.prefill import prefill, read_pieces
from promptcache.kvcache import encode, snapshot
from promptcache.kvcache.kv_quantization import KVSettings
from promptcache.models.length_dependence import length_dependence
from promptcache.models.loaded import LoadedModel
from promptcache.models.settings import Settings
from promptcache.prompts.render import RenderedPrompt
from tests.architectures import architectures, models_page

# Windows are 32 tokens wide, so that all of these overflow them.
LENGTHS = (100, 300, 700)
FORKS = (1, 31, 32, 33, 48, 63, 64, 65, 99)
STEP_SIZE = 64
# Of a process.
MIN_CONFIGURATIONS = 16
SUFFIX_TOKENS = 24
ANSWER_TOKENS = 16
# Of an answer that is saved: longer than a window, so that it is captured on the way.
SAVED_ANSWER_TOKENS = 48
FIRST_TOKEN, LAST_TOKEN = 5, 500
# Seeds of the suffixes that are asked and stored, alone and with the answer, and of
# one that is new.
ASKED, ANSWERED, NEW = 7, 9, 8


class Tokenizer:
    """As much of a tokenizer as token ids need: no text and no end."""

    eos_token_ids: frozenset[int] = frozenset()

    class detokenizer:
        """Turns every token into nothing."""

        last_segment = ""

        @staticmethod
        def add_token(token: int) -> None:
            """Take a token."""

        @staticmethod
        def finalize() -> None:
            """Take no more."""


class CountingModel:
    """A model that counts the tokens it reads."""

    def __init__(self, model: Any) -> None:
        """Take the model."""
        self._model = model
        self.num_read = 0

    def __call__(self, tokens: mx.array, *args: Any, **kwargs: Any) -> Any:
        """Read tokens, shape `(1, tokens)`."""
        self.num_read += tokens.shape[1]
        return self._model(tokens, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Run(NamedTuple):
    """What a generation gave, and how many tokens went through the model."""

    tokens: list[int]
    logprobs: list[np.ndarray]
    cached_tokens: int
    num_read: int


@dataclass
class Trial:
    """One comparison of a warm with a cold run.

    Attributes:
        kind: `end` of a stored prefix, `fork` inside it, `again` for a prompt asked
            twice, or `answer` for one that goes on from a saved answer.
        stored: How many tokens the two prompts share.
        expected: How many of them have to be reused.
        cached_tokens: How many were.
        num_read: How many tokens of the prompt went through the model.
        num_tokens: Length of the prompt.
        same_tokens: Whether all tokens of the answer are the same.
        difference: Largest difference of a log-probability.
        mlx_lm_difference: The same with mlx-lm's own file in place of the store, None
            if it cannot be loaded.
    """

    kind: str
    stored: int
    expected: int
    cached_tokens: int
    num_read: int
    num_tokens: int
    same_tokens: bool
    difference: float
    mlx_lm_difference: float | None = None

    @property
    def is_hit(self) -> bool:
        """Return whether it reused what it had to, and read no more than the rest."""
        rest = self.num_tokens - self.expected
        return self.cached_tokens == self.expected and self.num_read == rest


@dataclass
class Result:
    """What came of one configuration.

    Attributes:
        name: Its name in `architectures`.
        classes: How many parts of each cache class it has, and how they are treated.
        row_nbytes: Bytes that a token takes.
        checkpoint_nbytes: Bytes that a checkpoint takes.
        length_dependence: Why values depend on the length, or "".
        trials: The comparisons.
    """

    name: str
    classes: dict[str, int]
    row_nbytes: int
    checkpoint_nbytes: int
    length_dependence: str
    trials: list[Trial]

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Self:
        """Return a result from JSON."""
        trials = [Trial(**trial) for trial in fields.pop("trials")]
        return cls(trials=trials, **fields)

    @property
    def needs_checkpoints(self) -> bool:
        """Return whether rows alone do not restore it."""
        return self.checkpoint_nbytes > 0

    @property
    def hits_at_end(self) -> bool:
        """Return whether every stored prefix was reused to its end."""
        return all(t.cached_tokens == t.stored for t in self.trials if t.kind == "end")

    @property
    def is_right(self) -> bool:
        """Return whether every trial gave a cold run's tokens for the least reading."""
        return all(t.same_tokens and t.is_hit for t in self.trials)

    @property
    def difference(self) -> float:
        """Return the largest difference of any trial."""
        return max(trial.difference for trial in self.trials)


def token_ids(num_tokens: int, seed: int) -> list[int]:
    """Return random token ids."""
    random = np.random.default_rng(seed)
    return [int(i) for i in random.integers(FIRST_TOKEN, LAST_TOKEN, num_tokens)]


class Subject:
    """One configuration: its model, a generator on the store, and its prompts."""

    def __init__(
        self, name: str, folder: Path, lengths: Sequence[int] = LENGTHS
    ) -> None:
        """Build the model; the same name gives the same weights."""
        model = architectures.build(name)
        self.name = name
        self.lengths = lengths
        self.model = CountingModel(model)
        self.generator = CachedGenerator(
            self.model,
            wrapped(Tokenizer()),
            store=folder,
            max_nbytes=1 << 40,
            # What is read from disk is what is tried.
            memory_limit=0,
        )
        self.plan = LoadedModel(model).plan(Settings(step_size=STEP_SIZE))

    def close(self) -> None:
        """Close the store."""
        self.generator.close()

    def stored(self, length: int) -> RenderedPrompt:
        """Return what is stored of a length: the start of prompts."""
        return RenderedPrompt(token_ids(length, length), is_prefix=True)

    def continued(self, length: int, position: int, *, seed: int) -> RenderedPrompt:
        """Return a prompt that shares a stored one's first tokens and goes on."""
        ids = self.stored(length).token_ids[:position]
        return RenderedPrompt([*ids, *token_ids(SUFFIX_TOKENS, seed)], (position,))

    def build(self) -> None:
        """Store every prefix, and a prompt with its end."""
        for length in self.lengths:
            self.generator.build(self.stored(length), prefill_step_size=STEP_SIZE)
            self.run(self.continued(length, length, seed=ASKED), save=True)
        self.run(self.answered(), SAVED_ANSWER_TOKENS, save=True, save_answer=True)

    def answered(self) -> RenderedPrompt:
        """Return the prompt that is stored with its answer."""
        return self.continued(self.lengths[0], self.lengths[0], seed=ANSWERED)

    def run(
        self, prompt: RenderedPrompt, max_tokens: int = ANSWER_TOKENS, **options: Any
    ) -> Run:
        """Answer a prompt."""
        before = self.model.num_read
        answer = list(
            self.generator.stream_generate(
                prompt, max_tokens=max_tokens, prefill_step_size=STEP_SIZE, **options
            )
        )
        return Run(
            [response.token for response in answer],
            [np.array(response.logprobs.astype(mx.float32)) for response in answer],
            answer[-1].cached_tokens,
            # Every token of the answer but the last is read, too.
            self.model.num_read - before - (len(answer) - 1),
        )

    def check(self) -> Result:
        """Resume everywhere and compare."""
        dependence = length_dependence(self.model)
        kept = self.kept()
        return Result(
            name=self.name,
            classes=kept.classes,
            row_nbytes=kept.row_nbytes,
            checkpoint_nbytes=kept.checkpoint_nbytes,
            length_dependence="" if dependence is None else dependence.reason,
            trials=[
                *self._ends(),
                *self._again(),
                *self._forks(kept),
                *self._answers(kept),
            ],
        )

    def _ends(self) -> Iterator[Trial]:
        """Go on after every stored prefix."""
        for length in self.lengths:
            prompt = self.continued(length, length, seed=NEW)
            trial = self._trial("end", prompt, length, self._last_cut(length))
            trial.mlx_lm_difference = self._mlx_lm_difference(prompt.token_ids, length)
            yield trial

    def _again(self) -> Iterator[Trial]:
        """Ask what was asked and stored: the last token is left to read."""
        for length in self.lengths:
            prompt = self.continued(length, length, seed=ASKED)
            num_tokens = len(prompt.token_ids)
            stored = self.plan.last_kept(num_tokens, KVSettings())
            yield self._trial("again", prompt, stored, min(stored, num_tokens - 1))

    def _forks(self, kept: "Kept") -> Iterator[Trial]:
        """Part from a stored prefix in the middle, where any token will do."""
        if kept.checkpoint_nbytes:
            return
        for position in FORKS:
            prompt = self.continued(self.lengths[0], position, seed=NEW)
            yield self._trial("fork", prompt, position, self._last_cut(position))

    def _answers(self, kept: "Kept") -> Iterator[Trial]:
        """Go on from the end of a saved answer, and from inside it."""
        asked = self.answered().token_ids
        cold = self.run(
            self.answered(), SAVED_ANSWER_TOKENS, reuse=False, save=False
        ).tokens
        # Its last token has not been read.
        for length in (SAVED_ANSWER_TOKENS - 1, SAVED_ANSWER_TOKENS // 2):
            stored = len(asked) + length
            ids = [*asked, *cold[:length], *token_ids(SUFFIX_TOKENS, NEW)]
            is_kept = self.plan.is_sliceable(len(asked) + SAVED_ANSWER_TOKENS - 1)
            is_whole = length == SAVED_ANSWER_TOKENS - 1 or not kept.checkpoint_nbytes
            # Without its answer a prompt is kept as it is when nothing is answered.
            prompt = self.plan.last_kept(len(asked), KVSettings())
            expected = stored if is_kept and is_whole else self._last_cut(prompt)
            yield self._trial("answer", RenderedPrompt(ids), stored, expected)

    def _last_cut(self, position: int) -> int:
        """Return the last position up to one at which a run may take over."""
        while not self.plan.can_resume(position):
            position -= 1
        return position

    def _trial(
        self, kind: str, prompt: RenderedPrompt, stored: int, expected: int
    ) -> Trial:
        """Answer a prompt cold and warm."""
        cold = self.run(prompt, reuse=False, save=False)
        warm = self.run(prompt, save=False)
        return Trial(
            kind=kind,
            stored=stored,
            expected=expected,
            cached_tokens=warm.cached_tokens,
            num_read=warm.num_read,
            num_tokens=len(prompt.token_ids),
            same_tokens=cold.tokens == warm.tokens,
            difference=largest_difference(cold.logprobs, warm.logprobs),
        )

    def kept(self) -> "Kept":
        """Return what is kept of a prefix of this model."""
        ids = token_ids(self.lengths[0], 1)
        cache = make_prompt_cache(self.model)
        pieces = read_pieces(
            self.model, cache, ids, start=0, end=len(ids), plan=self.plan
        )
        captures = [snapshot.capture(cache, p.start, p.stop) for p in pieces]
        rows = encode.encode_rows(cache, captures, ids, 0, len(ids))
        state = encode.encode_checkpoint(captures[-1])
        layout = captures[-1].layout.values()
        classes = Counter(f"{part.class_name} {part.kind}" for part in layout)
        return Kept(
            dict(classes),
            _nbytes(rows) // len(ids),
            _nbytes(state) if captures[-1].needs_checkpoint else 0,
        )

    def _mlx_lm_difference(self, prompt: list[int], length: int) -> float | None:
        """Return how much mlx-lm's own file changes the logits, None if it fails."""
        cache = make_prompt_cache(self.model)
        prefill(self.model, cache, prompt, start=0, end=length, plan=self.plan)
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "cache.safetensors")
            try:
                save_prompt_cache(file, cache)
                loaded = load_prompt_cache(file)
                mx.eval([layer.state for layer in loaded])
            except Exception:
                # A class that mlx-lm saves and cannot load.
                return None
        rest = mx.array([prompt[length:]])
        left, right = (self.model(rest, cache=c)[0] for c in (cache, loaded))
        return largest_difference([np.array(left)], [np.array(right)])


class Kept(NamedTuple):
    """What is kept of a prefix."""

    classes: dict[str, int]
    row_nbytes: int
    checkpoint_nbytes: int


def _nbytes(segment: Any) -> int:
    tensors = [tensor for tensor in segment.tensors if tensor.name != "token_ids"]
    return sum(tensor.data.nbytes for tensor in tensors)


def wrapped(tokenizer: Tokenizer) -> Any:
    """Return it as mlx-lm's tokenizer, which a generator would otherwise make of it."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    class Wrapped(TokenizerWrapper):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        detokenizer = property(lambda self: tokenizer.detokenizer)

    return Wrapped()


def largest_difference(
    left: Sequence[np.ndarray], right: Sequence[np.ndarray]
) -> float:
    """Return the largest difference of two lists of arrays."""
    return max(
        float(np.max(np.where(a == b, 0, np.abs(a - b))))
        for a, b in zip(left, right, strict=True)
    )


def build_all(names: Sequence[str], folder: Path, lengths: Sequence[int]) -> None:
    """Store the prefixes of some configurations."""
    for name in names:
        subject = Subject(name, folder, lengths)
        subject.build()
        subject.close()


def check_all(
    names: Sequence[str], folder: Path, lengths: Sequence[int]
) -> Iterator[Result]:
    """Resume the prefixes of some configurations."""
    for name in names:
        subject = Subject(name, folder, lengths)
        yield subject.check()
        subject.close()


def run(names: Sequence[str], lengths: Sequence[int] = LENGTHS) -> list[Result]:
    """Store prefixes in some processes, and resume them in others."""
    # To start one takes as long as some configurations.
    num_workers = min(os.cpu_count() or 1, -(-len(names) // MIN_CONFIGURATIONS))
    chunks = [names[i::num_workers] for i in range(num_workers)]
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder, str(i)) for i in range(num_workers)]
        _run_workers("--build", chunks, folders, lengths)
        printed = _run_workers("--check", chunks, folders, lengths)
    results = [
        Result.of(json.loads(line)) for out in printed for line in out.split("\n")
    ]
    return sorted(results, key=lambda result: result.name)


def _run_workers(
    step: str,
    chunks: Sequence[Sequence[str]],
    folders: Sequence[Path],
    lengths: Sequence[int],
) -> list[str]:
    """Run a step in a process for each chunk of names; return what they print."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.architectures.conformance"]
    # With another BLAS, rounding depends on where a prompt is cut: models that differ
    # in the last bits would hide those that differ by a mistake.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    workers = [
        subprocess.Popen(
            [*command, *names, step, folder, "--lengths", *map(str, lengths)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for names, folder in zip(chunks, folders, strict=True)
    ]
    printed = [worker.communicate()[0].strip() for worker in workers]
    if any(worker.returncode for worker in workers):
        raise RuntimeError(f"a process of the step {step} failed")
    return printed


def main() -> None:
    """Run all processes, print what failed, and write the documentation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(architectures.CONFIGS))
    parser.add_argument("--write", type=Path, help="The page to write")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        build_all(options.names, options.build, options.lengths)
    elif options.check:
        for result in check_all(options.names, options.check, options.lengths):
            print(json.dumps(asdict(result)), flush=True)
    else:
        results = run(options.names, options.lengths)
        if options.write:
            text = options.write.read_text()
            options.write.write_text(models_page.page(text, results))
        sys.exit(not _is_told_right(results))


def _is_told_right(results: Sequence[Result]) -> bool:
    """Print what came out, and return whether nothing was wrong."""
    for result in results:
        for trial in result.trials:
            if not (trial.same_tokens and trial.is_hit):
                print(f"{result.name} is wrong: {trial}")
    num_hits = sum(result.hits_at_end for result in results)
    print(f"{num_hits} of {len(results)} resume at the end of what was stored")
    return all(result.is_right for result in results)


if __name__ == "__main__":
    main()
