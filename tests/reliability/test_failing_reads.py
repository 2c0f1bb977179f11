"""A disk that cannot be read costs what is cached, never a generation."""

import contextlib
import errno
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from promptcache import CachedGenerator, PrefixStore, PromptCacheWarning
from promptcache.errors import StoreError
from promptcache.store.blobs.folder import BlobFolder
from promptcache.store.reports import PrunePolicy
from tests.helpers.commands import invoke
from tests.helpers.invariants import check_invariants
from tests.helpers.segments import TINY, publish, save, tokens
from tests.helpers.steps import failing, looks_of

OTHER, HEAD = list(range(10, 60)), list(range(100, 140))
PROMPT = [*HEAD, *range(60, 80)]


@contextlib.contextmanager
def ignored_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptCacheWarning)
        yield


# Of equal looks the last one: others find trouble where a saver catches anything.
@pytest.mark.parametrize(
    ("code", "every"), [(errno.EIO, 2), (errno.EACCES, 7), (errno.EMFILE, 7)]
)
def test_failure_of_any_look_at_the_store_never_breaks_a_generation(
    model_dir: Path, tmp_path: Path, code: int, every: int
) -> None:
    filled, folder = tmp_path / "filled", tmp_path / "store"
    with CachedGenerator.load(model_dir, store=filled) as generator:
        plain = [r.token for r in generator.stream_generate(PROMPT, 3, save=False)]
        generator.build(OTHER)
        generator.build(HEAD)
    with PrefixStore(filled) as store:
        # Something has to be evicted for what is saved.
        limit = store.total_nbytes() + 40_000

    def generate() -> int:
        """Reuse one part of a prompt and save the other; return how much was reused."""
        with CachedGenerator(
            generator.model,
            generator.tokenizer,
            store=folder,
            max_nbytes=limit,
            save=True,
            identity=generator.identity,
        ) as other:
            responses = list(other.stream_generate(PROMPT, 3))
        assert [r.token for r in responses] == plain
        return responses[-1].cached_tokens

    shutil.copytree(filled, folder)
    reused: list[int] = []
    looks = looks_of(lambda: reused.append(generate()), folder)
    assert reused == [len(HEAD)]
    with PrefixStore(folder) as store:
        assert {p.num_tokens for p in store.prefixes()} == {len(PROMPT), len(HEAD)}

    broken = []
    numbers = sorted({look: number for number, look in enumerate(looks, 1)}.values())
    assert len(numbers) > 50
    for number in numbers[::every]:
        shutil.rmtree(folder)
        shutil.copytree(filled, folder)
        with failing(number, code, below=folder), ignored_warnings():
            try:
                generate()
            except Exception as error:
                broken.append((looks[number - 1], error))
        if number % 10 == 1:
            check_invariants(folder)
    assert not broken, f"{len(broken)} of {len(numbers)}: {broken}"


def look_everywhere(folder: Path) -> None:
    """Ask a store for all that it can tell."""
    with PrefixStore(folder) as store:
        for part in store.lookup(tokens(70), TINY).slices:
            store.segments.open_blob(part)
        store.segments.nearby(tokens(60), TINY)
        for prefix in store.prefixes():
            store.report(prefix.key)
        store.plan_prune(PrunePolicy(max_nbytes=0))
        store.verify(fix=True)
        store.total_nbytes()


def test_failure_of_any_look_is_an_error_of_the_store_that_loses_nothing(
    tmp_path: Path,
) -> None:
    filled, folder = tmp_path / "filled", tmp_path / "store"
    with PrefixStore(filled) as store:
        store.pin(save(store, tokens(70)), "old")
        publish(BlobFolder(filled), [1, 2])
        (filled / "quarantine" / "bad").touch()
        (filled / "tmp" / "left").touch()
    shutil.copytree(filled, folder)
    looks = looks_of(lambda: look_everywhere(folder), folder)
    numbers = sorted({look: number for number, look in enumerate(looks, 1)}.values())

    for number in numbers[::3]:
        shutil.rmtree(folder)
        shutil.copytree(filled, folder)
        with (
            failing(number, errno.EIO, below=folder),
            contextlib.suppress(StoreError),
        ):
            look_everywhere(folder)
        with PrefixStore(folder) as store:
            assert store.lookup(tokens(70), TINY).cached_tokens == 70, looks[number - 1]
            assert [entry.name for entry in store.pins()] == ["old"]


@pytest.mark.parametrize("command", [["ls"], ["prune", "-y"], ["verify"], ["stats"]])
def test_failure_of_any_look_is_one_line_of_a_command(
    tmp_path: Path, command: list[str]
) -> None:
    with PrefixStore(tmp_path) as store:
        save(store, tokens(70))
    call = [*command, "--store", str(tmp_path)]
    looks = looks_of(lambda: invoke(*call), tmp_path)

    for number in range(1, len(looks) + 1, 5):
        with failing(number, errno.EIO, below=tmp_path):
            result = invoke(*call)
        assert result.exit_code in (0, 1)
        assert result.stderr.count("promptcache: error: ") == result.exit_code
        assert "Traceback" not in result.stderr
