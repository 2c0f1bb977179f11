"""A process that changes its directory keeps its store."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from promptcache import CachedGenerator, PrefixStore
from promptcache.chat.conversation import Conversation
from promptcache.chat.transcript import Transcript
from promptcache.errors import StoreError
from promptcache.store.reports import PrunePolicy
from tests.helpers.commands import assert_fails, invoke
from tests.helpers.segments import TINY, cached_tokens, check_match, save, tokens

OLD = tokens(70)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Begin in one directory; `next` goes to another one each time."""

    def directories() -> Iterator[int]:
        for number in range(100):
            folder = tmp_path / f"directory-{number}"
            folder.mkdir()
            monkeypatch.chdir(folder)
            yield number

    there = directories()
    next(there)
    return there


@pytest.mark.parametrize("given", ["argument", "environment"])
def test_store_with_a_relative_path_stays_where_it_was_opened(
    tmp_path: Path,
    elsewhere: Iterator[int],
    monkeypatch: pytest.MonkeyPatch,
    given: str,
) -> None:
    monkeypatch.setenv("PROMPTCACHE_DIR", "store")
    with PrefixStore("store" if given == "argument" else None) as store:
        next(elsewhere)
        key = save(store, OLD)
        next(elsewhere)
        match = store.lookup(OLD, TINY)
        next(elsewhere)
        check_match(store, match, OLD)
        next(elsewhere)
        store.pin(key, "old")
        next(elsewhere)
        store.max_nbytes = store.total_nbytes() + 100_000
        for i in range(4):
            save(store, [i, *tokens(40)], width=300)
            next(elsewhere)
        with store.segments.building(key, lambda: None):
            next(elsewhere)
        assert store.verify().is_sound
        next(elsewhere)
        store.execute(store.plan_prune(PrunePolicy(older_than=-1)))
        assert cached_tokens(store, OLD) == len(OLD)

    assert store.path == tmp_path / "directory-0" / "store"
    assert [p.name for p in tmp_path.glob("*/*")] == ["store"]


def test_generator_with_relative_paths_works_in_any_directory(
    tmp_path: Path, model_dir: Path, elsewhere: Iterator[int]
) -> None:
    shutil.copytree(model_dir, "model")
    prompt = list(range(100, 160))
    with CachedGenerator.load("model", store="store", save=True) as generator:
        next(elsewhere)
        plain = [r.token for r in generator.stream_generate(prompt, 4)]
        next(elsewhere)
        responses = list(generator.stream_generate(prompt, 4))
        next(elsewhere)
        generator.build(prompt, name="built")
        next(elsewhere)
        with Conversation(generator, name="talk") as talk:
            next(elsewhere)
            list(talk.say("word", max_tokens=2))
        source = generator.identity.source

    assert [r.token for r in responses] == plain
    assert responses[-1].cached_tokens == len(prompt) - 1
    assert source == str(tmp_path / "directory-0" / "model")
    assert {p.name for p in tmp_path.glob("*/*")} == {"model", "store"}


def test_transcript_goes_on_in_its_file(elsewhere: Iterator[int]) -> None:
    with Transcript(Path("talk.jsonl"), {"system": None}) as transcript:
        next(elsewhere)
        transcript.add({"role": "user", "content": "word"})

    with pytest.raises(FileNotFoundError):
        Path("talk.jsonl").stat()


def test_directory_that_is_gone_is_one_clear_line(
    tmp_path: Path, elsewhere: Iterator[int]
) -> None:
    os.rmdir(Path.cwd())

    with pytest.raises(StoreError, match=r"store cannot be found \(No such file"):
        PrefixStore("store")
    assert_fails(invoke("ls", "--store", "~nobody-there/x"), 1, "cannot be found")
    assert PrefixStore(tmp_path / "store").path == tmp_path / "store"
