"""A split costs no hit and changes no token, whatever a model keeps."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from promptcache import CachedGenerator, PrefixStore
from promptcache.segments.chain import pack
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import Match
from tests.helpers import tiny
from tests.helpers.commands import ok
from tests.helpers.invariants import check_invariants
from tests.helpers.runs import cold, ids, largest_difference, run

SHARED = ids(50, seed=11)
SECRET = [*SHARED, *ids(60, seed=12)]
PIRATE = [*SHARED, *ids(40, seed=13)]
FORK = [*SHARED, *ids(9, seed=14)]

# The window of gemma3 is 32 tokens, and the head has 50.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (tiny.LLAMA, {}),
    "llama, 8 bits": (tiny.LLAMA, {"kv_bits": 8}),
    "gemma3": (tiny.GEMMA3, {}),
    "gemma3, stored in 8 bits": (tiny.GEMMA3, {"store_bits": 8}),
    "qwen3_next": (tiny.QWEN3_NEXT, {}),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def model(family: str) -> Path:
        config = FAMILIES[family][0]
        folder = root / str(config["model_type"])
        return folder if folder.exists() else tiny.save_model(folder, config)

    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_warm_is_the_same_after_a_split(
    make: Callable[[str], Path], store: PrefixStore, family: str
) -> None:
    options = FAMILIES[family][1]
    generator = CachedGenerator.load(make(family), store=store)
    key = generator.build(SECRET, **options).key
    generator.build(PIRATE, **options)
    prompts = ([*PIRATE, 7, 8], PIRATE, FORK)
    before = [run(generator, prompt, **options) for prompt in prompts]

    report = store.remove(key)

    assert report.freed_nbytes > 0
    check_invariants(store)
    after = [run(generator, prompt, **options) for prompt in prompts]
    for left, right in zip(before, after, strict=True):
        assert right.last.cached_tokens == left.last.cached_tokens
        assert right.tokens == left.tokens
        assert largest_difference(left.logprobs, right.logprobs) == 0
    if family != "qwen3_next":
        assert after[-1].last.cached_tokens == 50
        assert run(generator, SECRET, **options).last.cached_tokens == 50
    if not options:
        assert after[-1].tokens == cold(generator, FORK).tokens


def test_split_between_the_match_and_the_load_costs_neither_hit_nor_blob(
    generator: CachedGenerator,
    model_dir: Path,
    store: PrefixStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = generator.build(SECRET).key
    generator.build(PIRATE)
    lookup = store.lookup
    matches: list[Match] = []

    def lookup_then_split(
        token_ids: Sequence[int], fingerprint: Fingerprint, **options: Any
    ) -> Match:
        matches.append(lookup(token_ids, fingerprint, **options))
        if len(matches) == 1:
            with PrefixStore(store.path) as other:
                other.remove(key)
        if len(matches) == 2:
            # The rest of the secret gets the key that all of it had.
            with CachedGenerator.load(model_dir, store=store.path) as another:
                assert another.build(SECRET).key == key
        return matches[-1]

    monkeypatch.setattr(store, "lookup", lookup_then_split)

    warm = run(generator, [*PIRATE, 7])

    assert warm.last.cached_tokens == len(PIRATE)
    assert {m.cached_tokens for m in matches} == {len(PIRATE)}
    assert store.verify().quarantined == ()
    check_invariants(store)


def test_build_name_and_remove_a_secret_as_people_do(
    model_dir: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("The launch code is 7361-4402, tell nobody. " * 8)
    model = ("-m", model_dir)
    ok("build", "-s", f"@{secret}", "--name", "secret", *model)
    ok("build", "-s", "You are a pirate.", "--name", "pirate", *model)
    tokenizer = CachedGenerator.load(model_dir).tokenizer
    code = pack(tokenizer.encode("7361-4402"))
    folder = tmp_path / "store"
    assert holding(folder, code)

    told = ok("rm", "secret", "--yes").stderr

    assert told.startswith("Removed 1, freed ") and "freed 0 B" not in told
    assert holding(folder, code) == []
    assert ok("ls", "-q").stdout.count("\n") == 1
    usage = ok("generate", "-s", "You are a pirate.", "Ahoy", "-u", *model).stderr
    assert ", 20 cached" in usage


def holding(folder: Path, data: bytes) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if data in path.read_bytes()]
