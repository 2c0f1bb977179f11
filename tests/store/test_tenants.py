"""Tenants: what is asked in a namespace is answered as if no other existed."""

import json
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from promptcache import (
    CachedGenerator,
    Conversation,
    KeyNotFoundError,
    PinQuota,
    PromptCacheWarning,
    QuotaError,
    StoreError,
    UsageError,
)
from promptcache.errors import PromptCacheError
from promptcache.segments.fingerprint import Fingerprint, make_fingerprint
from promptcache.segments.types import PromptOrigin
from promptcache.server.auth import ApiKeys
from promptcache.store import PrefixStore
from promptcache.store.index import events
from promptcache.store.reports import MAX_NAME_LENGTH, Prefix, PrunePolicy
from promptcache.store.types import NearbyPrefixes, RequestUsage
from tests.helpers import workers
from tests.helpers.commands import assert_fails, invoke
from tests.helpers.segments import save, tokens
from tests.helpers.strategies import prompts

ANNA, BERT = "anna", "bert"
NAMES = ("narrator", "keeper", "0", "anna/narrator")
SYSTEM = "You are the keeper of a lighthouse at the end of the world."


def of(namespace: str, weights: str = "a") -> Fingerprint:
    """Return the fingerprint of a model in a namespace."""
    parts = {"weights": weights, "config": "c", "namespace": namespace}
    return make_fingerprint(parts, model=f"tiny {weights}")


# The property


class Deed(NamedTuple):
    """Something that a tenant does."""

    tenant: str
    kind: str
    prompt: list[int]
    weights: str
    name: str
    origin: PromptOrigin


origins = st.builds(
    PromptOrigin,
    template=st.sampled_from(["t1", "t2"]),
    config=st.sampled_from([{}, {"thinking": True}]),
    system=st.sampled_from(["", "s"]),
    tools=st.sampled_from([(), (("look", "1"),)]),
    head=st.integers(0, 40),
)
# The chance that two tenants share the beginnings of prompts, names and all is high.
deeds = st.builds(
    Deed,
    tenant=st.sampled_from([ANNA, BERT]),
    kind=st.sampled_from(["save", "save", "save", "pin", "unpin", "remove", "use"]),
    prompt=prompts(max_tokens=70),
    weights=st.sampled_from("ab"),
    name=st.sampled_from(NAMES),
    origin=origins,
)


def do(store: PrefixStore, deed: Deed) -> object:
    """Do it, and return what the tenant is told of it."""
    namespace, model = deed.tenant, of(deed.tenant, deed.weights)
    key = store.segments.key_of(deed.prompt, model)
    if deed.kind == "save":
        save(store, deed.prompt, model)
        store.segments.set_origin(key, deed.origin)
        return key
    if deed.kind == "pin":
        quota = PinQuota(2, 10**6)
        return store.pin(key, deed.name, namespace=namespace, quota=quota)
    if deed.kind == "unpin":
        return store.unpin(deed.name, namespace=namespace)
    if deed.kind == "use":
        match = store.lookup(deed.prompt[:-1], model)
        new = len(deed.prompt) - match.cached_tokens
        store.usage_log.add_speed(model, 100 + new, 1.0)
        return store.usage_log.record(
            RequestUsage(model, match, match.cached_tokens, new, 0.1, 0.2)
        )
    return len(store.remove(store.resolve(key, namespace=namespace).key).removals)


def answers(store: PrefixStore, asked: Sequence[Deed], namespace: str) -> list[object]:
    """Return all that a tenant can find out."""
    told: list[object] = [
        store.prefixes(namespace=namespace),
        store.pins(namespace=namespace),
        store.usage(namespace=namespace),
    ]
    for deed in asked:
        model = of(namespace, deed.weights)
        key = store.segments.key_of(deed.prompt, model)
        told += [
            store.lookup(deed.prompt, model),
            store.segments.nearby(deed.prompt, model, deed.origin),
            store.usage_log.estimate(model, 100),
            store.listed_at(key) is None,
        ]
        for wanted in (deed.name, key, key[:1], key[:3]):
            told.append(told_of(lambda w=wanted: store.resolve(w, namespace=namespace)))
    return [timeless(answer) for answer in told]


def told_of(ask: Callable[[], object]) -> object:
    """Return an answer, or the error in its place."""
    try:
        return ask()
    except PromptCacheError as error:
        return type(error), str(error)


def timeless(answer: Any) -> Any:
    """Return an answer without the times of day in it, whose digits blobs have, too."""
    if isinstance(answer, list):
        return [timeless(item) for item in answer]
    if isinstance(answer, Prefix):
        return replace(answer, created_at=0.0, used_at=0.0, nbytes=0)
    if isinstance(answer, NearbyPrefixes) and answer.eviction is not None:
        return replace(answer, eviction=answer.eviction._replace(removed_at=0.0))
    return answer


def lived(told_to: str, done: Sequence[Deed], asked: Sequence[Deed]) -> list[object]:
    """Return all that a tenant was told in a store in which this was done."""
    with TemporaryDirectory() as folder, PrefixStore(Path(folder, "store")) as store:
        told = []
        for deed in done:
            result = told_of(lambda deed=deed: do(store, deed))
            if deed.tenant == told_to:
                told.append(timeless(result))
        return told + answers(store, asked, told_to)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(deeds, min_size=4, max_size=14), st.lists(deeds, max_size=2))
def test_tenant_is_answered_as_if_no_other_existed(
    done: list[Deed], guesses: list[Deed]
) -> None:
    # Whoever wants to know what another one has asks for what is close to it.
    others = [deed for deed in done if deed.tenant == ANNA]
    near = [deed._replace(prompt=[*deed.prompt[:-1], 7]) for deed in others]
    asked = [*others, *near, *guesses]

    beside_another = lived(BERT, done, asked)
    alone = lived(BERT, [deed for deed in done if deed.tenant == BERT], asked)

    assert beside_another == alone


def num_steps(store: PrefixStore, ask: Callable[[], object]) -> int:
    """Return how many steps SQLite takes to answer."""
    count = 0

    def step() -> None:
        nonlocal count
        count += 1

    connection = store._index.database._connection
    connection.set_progress_handler(step, 1)
    ask()
    connection.set_progress_handler(None, 1)
    return count


def test_answers_take_no_longer_with_others(store: PrefixStore) -> None:
    prompt, own = tokens(100), of(BERT)
    origin = PromptOrigin("t", system="s")
    key = save(store, prompt, own)
    store.segments.set_origin(key, origin)

    def steps() -> list[int]:
        questions = [
            lambda: store.segments.nearby([*prompt[:90], 5], own, origin),
            lambda: store.prefixes(namespace=BERT),
            lambda: store.resolve(key[:6], namespace=BERT),
            lambda: store.pins(namespace=BERT),
            lambda: store.usage(namespace=BERT),
        ]
        return [num_steps(store, ask) for ask in questions]

    def add_others(number: int) -> None:
        # Before and after its own rows in every table.
        for namespace in ("anna", "zoe"):
            other = of(namespace, str(number))
            key = save(store, [number, *prompt], other)
            store.segments.set_origin(key, origin)
            store.pin(key, f"name {number}")
            match = store.lookup([number, *prompt], other)
            store.usage_log.record(RequestUsage(other, match, 100, 1, 0.1, 0.2))
            store.remove(save(store, [*prompt, number], other))

    add_others(0)
    beside_two = steps()
    for number in range(1, 6):
        add_others(number)

    assert steps() == beside_two


def test_what_others_lose_makes_nobody_forget_an_eviction(
    store: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MAX_EVICTIONS", 20)
    store.remove(save(store, tokens(100), of(BERT)))
    theirs = save(store, tokens(100), of(ANNA))
    noted = store._index.history

    for end in range(23):
        noted.note_eviction(theirs, {end: theirs}, "makes room", now=1.0)

    around = store.segments.nearby(tokens(100), of(BERT))
    assert around.eviction is not None and around.eviction.reason == "removed"
    ends = [eviction.end for _, eviction in noted.evictions(of(ANNA).digest)]
    assert ends == [*range(22, 2, -1)]


# Names


def test_name_means_a_prefix_in_each_namespace(store: PrefixStore) -> None:
    keys = {n: save(store, tokens(40), of(n)) for n in ("", ANNA, BERT)}
    for namespace, key in keys.items():
        store.pin(key, "narrator", namespace=namespace)

    found = {n: store.resolve("narrator", namespace=n).key for n in keys}
    named = {p.full_name: p.key for p in store.prefixes()}
    store.unpin("narrator", namespace=ANNA)

    assert found == keys
    assert named == {
        "narrator": keys[""],
        "anna/narrator": keys[ANNA],
        "bert/narrator": keys[BERT],
    }
    assert {pin.namespace for pin in store.pins()} == {"", BERT}
    assert store.pins(namespace=ANNA) == []


def test_owner_means_own_names_and_others_in_full(store: PrefixStore) -> None:
    theirs = save(store, tokens(40), of(ANNA))
    store.pin(theirs, "narrator", namespace=ANNA)

    with pytest.raises(KeyNotFoundError):
        store.resolve("narrator")
    with pytest.raises(KeyNotFoundError):
        store.unpin("narrator")

    assert store.resolve("anna/narrator").key == theirs
    assert store.report(theirs[:8]).prefix.full_name == "anna/narrator"
    own = save(store, tokens(40), of(""))
    store.pin(own, "anna/narrator")
    assert store.resolve("anna/narrator").key == own
    assert store.unpin("anna/narrator").key == own
    assert store.unpin("anna/narrator").key == theirs


def test_key_of_another_namespace_is_not_found(store: PrefixStore) -> None:
    theirs = save(store, tokens(40), of(ANNA))

    for ask in (store.resolve, store.report):
        with pytest.raises(KeyNotFoundError):
            ask(theirs, namespace=BERT)
    with pytest.raises(KeyNotFoundError):
        store.pin(theirs, "mine", namespace=BERT)


@pytest.mark.parametrize("loses", ["index.db", "blobs"])
def test_names_are_kept_by_namespace(tmp_path: Path, loses: str) -> None:
    with PrefixStore(tmp_path / "store") as store:
        for namespace in ("", ANNA, BERT):
            key = save(store, tokens(40), of(namespace))
            store.pin(key, "narrator", namespace=namespace)
        before = store.pins()
        if loses == "blobs":
            lost = store.resolve("narrator", namespace=ANNA)
            assert store.segments.give_up(lost.key) == ["anna/narrator"]
            before = [pin for pin in before if pin.namespace != ANNA]
    (tmp_path / "store/index.db").unlink()

    with PrefixStore(tmp_path / "store") as store:
        assert store.rebuilt
        assert store.pins() == before


def test_generators_name_and_explain_in_their_namespace(
    model_dir: Path, store: PrefixStore
) -> None:
    anna, bert = (
        CachedGenerator.load(model_dir, store=store, namespace=n) for n in (ANNA, BERT)
    )
    nothing = bert.explain([{"role": "user", "content": SYSTEM}]).verdict
    theirs = anna.build(system=SYSTEM, name="narrator")

    explained = bert.explain([{"role": "user", "content": SYSTEM}]).verdict
    near = bert.explain([{"role": "system", "content": SYSTEM[:40]}])
    own = bert.build(system=SYSTEM, name="narrator")

    assert explained == nothing
    assert near.divergence is not None and near.divergence.kind == "nothing cached"
    assert theirs.key != own.key
    assert store.resolve("anna/narrator").key == theirs.key
    assert store.resolve("bert/narrator").key == own.key


def test_conversations_of_one_name_are_apart(
    model_dir: Path, store: PrefixStore
) -> None:
    said = {}
    for namespace in ("", ANNA, BERT):
        generator = CachedGenerator.load(model_dir, store=store, namespace=namespace)
        with Conversation(generator, name="story", system=namespace) as talk:
            assert talk.num_turns == 0
            list(talk.say(f"I am {namespace}", max_tokens=2))
    for namespace in ("", ANNA, BERT):
        generator = CachedGenerator.load(model_dir, store=store, namespace=namespace)
        with Conversation(generator, name="story") as talk:
            said[namespace] = talk.messages[-2]["content"]

    assert said == {n: f"I am {n}" for n in said}


def test_commands_name_others_in_full(store: PrefixStore) -> None:
    theirs = save(store, tokens(40), of(ANNA))
    store.pin(theirs, "narrator", namespace=ANNA)

    def run(*args: str) -> Result:
        return invoke(*args, "--store", store.path)

    [listed] = json.loads(run("ls", "--json").stdout)

    assert "anna/narrator" in run("ls").stdout
    assert (listed["name"], listed["namespace"]) == ("narrator", ANNA)
    assert_fails(run("unpin", "narrator"), 1, "narrator")
    assert_fails(run("rm", "-y", "narrator"), 1, "narrator")
    assert run("rm", "-y", "anna/narrator").stdout.strip() == theirs


# Quotas and lengths


def test_quota_holds_by_number_and_size(store: PrefixStore) -> None:
    keys = [save(store, [i, *tokens(100)], of(ANNA), width=50) for i in range(4)]
    nbytes = [store.resolve(key).nbytes for key in keys]
    quota = PinQuota(num_pins=2, nbytes=sum(nbytes[:3]))

    store.pin(keys[0], "a", namespace=ANNA, quota=quota)
    store.pin(keys[1], "b", namespace=ANNA, quota=quota)
    with pytest.raises(QuotaError, match="no more than 2 prefixes"):
        store.pin(keys[2], "c", namespace=ANNA, quota=quota)
    # A name that moves, and another name, take no more than before.
    store.pin(keys[2], "b", namespace=ANNA, quota=quota)
    store.pin(keys[2], "c", namespace=ANNA, quota=quota)
    with pytest.raises(QuotaError, match="would be pinned and 1 B may be, unpin"):
        store.pin(keys[0], "z", namespace=ANNA, quota=PinQuota(9, 1))

    assert {pin.name for pin in store.pins()} == {"a", "c"}
    names = json.loads((store.path / "prefixes.json").read_text())
    assert {entry["name"] for entry in names} == {"a", "c", None}


def test_quota_counts_ancestors_once_and_not_others(store: PrefixStore) -> None:
    base = save(store, tokens(1000), of(ANNA), width=20)
    first, second = (
        save(store, [*tokens(1000), i], of(ANNA), width=20) for i in (7, 8)
    )
    store.pin(save(store, tokens(1000), of(BERT), width=20), "big")
    total = sum(store._blobs.nbytes(key) for key in (base, first, second))

    store.pin(first, "a", quota=PinQuota(9, total))
    store.pin(second, "b", quota=PinQuota(9, total))
    with pytest.raises(QuotaError):
        store.pin(second, "c", quota=PinQuota(9, total - 1))

    assert {pin.name for pin in store.pins(namespace=ANNA)} == {"a", "b"}


def test_long_names_are_refused(
    store: PrefixStore, model_dir: Path, tmp_path: Path
) -> None:
    key = save(store, tokens(40), of(""))
    longest, name = "n" * MAX_NAME_LENGTH, "n" * (MAX_NAME_LENGTH + 1)
    manifest = tmp_path / "promptcache.toml"
    manifest.write_text(f'[prompts.{name}]\nsystem = "You."\n')

    assert store.pin(key, longest).name == longest
    with pytest.raises(UsageError, match="too long for a name, use up to 128 char"):
        store.pin(key, name)
    assert_fails(invoke("pin", key, name, "--store", store.path), 2, "too long")
    assert_fails(invoke("sync", manifest, "--store", store.path), 2, "too long")
    with (
        CachedGenerator.load(model_dir, store=store) as generator,
        pytest.raises(UsageError, match="too long"),
    ):
        generator.build(system=SYSTEM, name=name)


# The secret


def test_namespace_of_a_key_comes_from_the_stores_secret(tmp_path: Path) -> None:
    namespaces = []
    for name in ("one", "two", "one"):
        with PrefixStore(tmp_path / name) as store:
            keys = ApiKeys(["hunter2"], secret=store.secret())
            namespaces.append(keys.namespace("Bearer hunter2"))

    assert namespaces[0] == namespaces[2] != namespaces[1]


def test_secret_is_private_counted_and_no_garbage(store: PrefixStore) -> None:
    before = store.total_nbytes()
    umask = os.umask(0)
    secret = store.secret()
    os.umask(umask)
    after = store.total_nbytes()

    store.execute(store.plan_prune(PrunePolicy(max_nbytes=0)))
    store.verify(fix=True)

    path = store.path / "secret"
    assert path.read_bytes() == secret == store.secret()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert before + len(secret) == after


def test_secret_is_made_once_by_many_processes(tmp_path: Path) -> None:
    folder = tmp_path / "store"

    told = workers.finish([workers.start("make_secret", folder) for _ in range(4)])

    assert set(told) == {f"{(folder / 'secret').read_bytes().hex()}\n"}


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 33])
def test_damaged_secret_is_told(store: PrefixStore, content: bytes) -> None:
    (store.path / "secret").write_bytes(content)

    with pytest.raises(StoreError, match="secret is damaged, remove it"):
        store.secret()


def test_secret_that_others_could_write_is_refused(store: PrefixStore) -> None:
    store.secret()
    (store.path / "secret").chmod(0o666)

    with pytest.raises(StoreError, match="can be written to by other users"):
        store.secret()


def test_secret_that_cannot_be_kept_is_one_of_the_process(
    store: PrefixStore, tmp_path: Path
) -> None:
    (store.path / "secret").symlink_to(tmp_path / "elsewhere")

    with pytest.warns(PromptCacheWarning, match="secret cannot be kept"):
        secrets = [store.secret() for _ in range(2)]

    assert len({*secrets}) == 2
    assert not (tmp_path / "elsewhere").exists()
