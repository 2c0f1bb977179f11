"""The writer: order, bounds, and that nothing waits for the disk but the end."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer

from promptcache import CachedGenerator, PrefixStore, PromptCacheWarning
from promptcache.kvcache import encode
from promptcache.tiers import prefix_saver
from promptcache.tiers.background_writer import BackgroundWriter
from tests.architectures import architectures
from tests.helpers import tiny

# They measure times and memory.
pytestmark = pytest.mark.alone

PROMPT = [(7 * i) % 256 for i in range(2500)]


def test_jobs_run_in_their_order_and_close_finishes_them() -> None:
    writer = BackgroundWriter()
    done: list[int] = []

    for number in range(20):
        writer.submit(lambda number=number: done.append(number), 1)
    writer.close()

    assert done == list(range(20))
    assert writer.queued_nbytes == 0


def test_submitting_waits_while_too_many_bytes_are_queued() -> None:
    writer = BackgroundWriter(max_nbytes=100)
    go_on = threading.Event()
    most = []

    def job() -> None:
        go_on.wait(10)
        most.append(writer.queued_nbytes)

    def fill() -> None:
        for _ in range(8):
            writer.submit(job, 40)

    filling = threading.Thread(target=fill)
    filling.start()
    filling.join(0.2)
    assert filling.is_alive()
    assert writer.queued_nbytes == 80
    assert not writer.has_room(40)
    assert writer.has_room(20)
    assert writer.has_room(0)
    go_on.set()
    filling.join(10)
    writer.close()

    assert len(most) == 8
    assert max(most) <= 80


def test_job_larger_than_the_bound_runs_alone() -> None:
    writer = BackgroundWriter(max_nbytes=100)
    seen: list[int] = []

    writer.submit(lambda: seen.append(writer.queued_nbytes), 60)
    writer.submit(lambda: seen.append(writer.queued_nbytes), 500)
    writer.submit(lambda: seen.append(writer.queued_nbytes), 60)
    writer.close()

    assert seen[1] == 500


class _SlowStore(PrefixStore):
    """A store whose disk takes a second for every save."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.saved_at: list[float] = []
        save = self.segments.save

        def save_slowly(*args: Any, **options: Any) -> str:
            time.sleep(1)
            key = save(*args, **options)
            self.saved_at.append(time.perf_counter())
            return key

        self.segments.save = save_slowly  # type: ignore[method-assign]


def test_first_token_does_not_wait_for_the_disk_and_the_last_one_does(
    model_dir: Path, tmp_path: Path
) -> None:
    with _SlowStore(tmp_path / "store") as store:
        with CachedGenerator.load(model_dir, store=store) as generator:
            stream = generator.stream_generate(PROMPT, 4, save=True)
            next(stream)
            first_at = time.perf_counter()
            last = list(stream)[-1]
            last_at = time.perf_counter()

        assert len(store.saved_at) == 2
        assert first_at < store.saved_at[0] - 0.9
        assert last_at > store.saved_at[-1]
        assert last.key is not None
        assert store.verify().is_sound
        assert [p.num_tokens for p in store.prefixes()] == [len(PROMPT)]


def test_failure_of_the_writer_is_one_warning_and_no_key(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CachedGenerator.load(model_dir, store=tmp_path / "store") as generator:
        assert generator.store is not None

        def fail(*args: Any, **options: Any) -> str:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(generator.store._blobs, "staged", fail)
        with pytest.warns(PromptCacheWarning, match="not saved") as record:
            responses = list(generator.stream_generate(PROMPT, 8, save=True))

        assert len(record) == 1
        assert responses[-1].key is None
        assert len(responses) == 8


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_next"])
def test_save_that_others_overtook_is_encoded_anew(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between encoding and storing, another generator stores a part of it."""
    tiny.save_tokenizer(tmp_path, tiny.CHAT_TEMPLATE)
    tokenizer, model = load_tokenizer(tmp_path), architectures.build(name)
    path, prompt = tmp_path / "store", [i % 90 for i in PROMPT[:600]]
    with (
        CachedGenerator(model, tokenizer, store=path) as generator,
        CachedGenerator(model, tokenizer, store=path) as other,
    ):
        store = generator.store
        assert store is not None
        missing = store.segments.missing
        found = []

        def overtaken(*args: Any, **options: Any) -> list[tuple[int, int]]:
            found.append(missing(*args, **options))
            if len(found) == 1:
                other.build(prompt[:300])
            return found[-1]

        monkeypatch.setattr(store.segments, "missing", overtaken)
        last = list(generator.stream_generate(prompt, 4, save=True))[-1]

        # The state of a recurrent model is taken before the last token.
        lost = int(name == "qwen3_next")
        end, forked = 600 - lost, 300 - lost
        assert found == [[(0, end)], [(forked, end)]]
        assert last.key is not None
        assert store.verify().is_sound
        assert {p.num_tokens for p in store.prefixes()} == {forked, end}
        assert generator.match([*prompt, 1]).cached_tokens == end


def test_interrupt_while_encoding_is_no_save_that_is_done(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_rows = encode.encode_rows
    calls = []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return encode_rows(*args, **options)

    with CachedGenerator.load(model_dir, store=tmp_path / "store") as generator:
        monkeypatch.setattr(prefix_saver, "encode_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(generator.stream_generate(PROMPT[:600], 8, save=True))

        assert len(calls) == 2
        assert generator.match([*PROMPT[:600], 1]).cached_tokens == 600
