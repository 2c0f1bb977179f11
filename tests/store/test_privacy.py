"""Nobody else reads a store, nothing is written outside it, tenants share nothing."""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from promptcache import CachedGenerator, PrefixStore
from promptcache.chat.transcript import Transcript, transcript_path
from promptcache.errors import DamagedBlobError, StoreError
from promptcache.models.default import download
from promptcache.store.blobs.folder import BlobFolder
from promptcache.store.reports import PrunePolicy
from tests.helpers.invariants import check_modes
from tests.helpers.segments import TINY, blob_path, blob_paths, save, tokens, tree_hash

PROMPT = [i % 250 for i in range(100)]


@pytest.fixture
def with_umask() -> Iterator[Callable[[int], None]]:
    before = os.umask(0o022)
    yield lambda umask: os.umask(umask) and None
    os.umask(before)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o177])
def test_modes_are_private_whatever_the_umask(
    tmp_path: Path, with_umask: Callable[[int], None], umask: int
) -> None:
    with_umask(umask)
    with PrefixStore(tmp_path / "store") as store:
        key = save(store, tokens(70))
        store.pin(key, "name")
        with store.segments.building("ab" * 16, lambda: None):
            check_modes(store.path)
        store.segments.give_up(key)
        save(store, tokens(70))

    check_modes(tmp_path / "store")


PARTS = ["blobs", "tmp", "quarantine", "index.db", "chats"]


@pytest.mark.parametrize("name", ["", *PARTS])
@pytest.mark.parametrize("bit", [0o020, 0o002])
def test_store_that_others_can_write_to_is_refused(
    tmp_path: Path, name: str, bit: int
) -> None:
    with PrefixStore(tmp_path / "store") as store:
        save(store, tokens(70))
    begin_chat(tmp_path / "store")
    path = tmp_path / "store" / name
    path.chmod(path.stat().st_mode | bit)
    before = tree_hash(tmp_path / "store")

    with pytest.raises(StoreError, match="by other users, run `chmod go-w`"):
        PrefixStore(tmp_path / "store")

    assert tree_hash(tmp_path / "store") == before


def begin_chat(store: Path) -> Path:
    """Begin a conversation in a store's folder, and return its file."""
    path = transcript_path(store, "talk")
    with Transcript(path, {"system": "secret"}) as transcript:
        transcript.add({"role": "user", "content": "said"})
    return path


@pytest.mark.parametrize("name", ["chats", "chats/talk.jsonl"])
@pytest.mark.parametrize("mode", [0o777, 0o620])
def test_conversation_that_others_can_write_to_is_refused(
    tmp_path: Path, name: str, mode: int
) -> None:
    path = begin_chat(tmp_path)
    before = path.read_bytes()
    (tmp_path / name).chmod(mode)

    with pytest.raises(StoreError, match="by other users, run `chmod go-w`"):
        begin_chat(tmp_path)

    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["chats", "chats/talk.jsonl"])
def test_conversation_does_not_follow_links(
    tmp_path: Path, outside: Path, name: str
) -> None:
    path = transcript_path(tmp_path, "talk")
    target = outside if name == "chats" else outside / "talk.jsonl"
    if name != "chats":
        path.parent.mkdir(mode=0o700)
    (tmp_path / name).symlink_to(target)

    with pytest.raises(StoreError, match="is a link, put what it leads to"):
        begin_chat(tmp_path)

    assert [p.name for p in outside.iterdir()] == ["precious"]


def test_pipe_in_place_of_a_conversation_is_not_waited_for(tmp_path: Path) -> None:
    path = transcript_path(tmp_path, "talk")
    path.parent.mkdir(mode=0o700)
    os.mkfifo(path, 0o600)

    with pytest.raises(StoreError, match="not a regular file"):
        begin_chat(tmp_path)


def test_everything_is_synced_by_what_a_mac_has_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", fcntl.F_GETFL, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda fd, call: synced.append(fd))
    monkeypatch.delattr(os, "fsync")
    begin_chat(tmp_path)
    # The folder of chats, the file in it, its first line and what was said.
    assert len(synced) == 4

    def fill(unfinished: Path) -> None:
        for name in download.FILES:
            (unfinished / name).touch()

    download.create_once(tmp_path / "model", fill, source=tmp_path / "source")
    assert len(synced) == 4 + len(download.FILES) + 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", ["", "blobs", "index.db"])
def test_store_of_somebody_else_is_refused(tmp_path: Path, name: str) -> None:
    with PrefixStore(tmp_path / "store") as store:
        save(store, tokens(70))
    os.chown(tmp_path / "store" / name, 12345, 12345)

    with pytest.raises(StoreError, match="belongs to another user, choose another"):
        PrefixStore(tmp_path / "store")


def test_generation_goes_on_without_a_store_that_is_refused(
    model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)

    with pytest.warns(UserWarning, match="going on without the store"):
        generator = CachedGenerator.load(model_dir, store=tmp_path / "open")

    assert len([*generator.stream_generate(PROMPT, 4)]) == 4
    assert not list((tmp_path / "open").iterdir())


def test_store_may_be_a_link_itself(tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir(mode=0o700)
    (tmp_path / "store").symlink_to(tmp_path / "volume")

    with PrefixStore(tmp_path / "store") as store:
        save(store, tokens(70))

    assert (tmp_path / "volume" / "index.db").exists()


# Links in a store


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that has nothing to do with the store."""
    folder = tmp_path / "outside"
    folder.mkdir(mode=0o700)
    (folder / "precious").write_text("precious")
    return folder


@pytest.mark.parametrize("name", PARTS)
def test_link_in_place_of_a_part_of_the_store_is_refused(
    tmp_path: Path, outside: Path, name: str
) -> None:
    with PrefixStore(tmp_path / "store") as store:
        save(store, tokens(70))
    begin_chat(tmp_path / "store")
    path = tmp_path / "store" / name
    path.rename(outside / name)
    path.symlink_to(outside / name)
    before = tree_hash(outside)

    with pytest.raises(StoreError, match="is a link"):
        PrefixStore(tmp_path / "store")

    assert tree_hash(outside) == before


def test_blob_that_is_a_link_is_damaged(store: PrefixStore, outside: Path) -> None:
    path = blob_path(store, save(store, tokens(70)))
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)

    (match,) = store.lookup(tokens(70), TINY).slices
    with pytest.raises(DamagedBlobError, match="a link"):
        store.segments.open_blob(match)

    assert len(store.verify(fix=True).damaged) == 1
    store.execute(store.plan_prune(PrunePolicy()))
    assert (outside / path.name).exists()
    assert (outside / "precious").exists()
    assert not list((store.path / "quarantine").iterdir())


def test_folder_of_blobs_that_is_a_link_is_not_entered(
    store: PrefixStore, outside: Path
) -> None:
    key = save(store, tokens(70))
    folder = blob_path(store, key).parent
    shutil.move(folder, outside / folder.name)
    folder.symlink_to(outside / folder.name)
    before = tree_hash(outside)

    with pytest.raises(DamagedBlobError, match="is a link"):
        BlobFolder(store.path).check(key)
    assert store.verify().missing == (key,)
    store._index.remove_leaf(key)
    with pytest.raises((StoreError, OSError)):
        save(store, tokens(70))
    store.verify(fix=True)
    save(store, tokens(70))
    store.execute(store.plan_prune(PrunePolicy(model="tiny")))

    assert tree_hash(outside) == before


@pytest.mark.parametrize("folder", ["tmp", "quarantine"])
def test_links_are_swept_and_what_they_lead_to_stays(
    store: PrefixStore, outside: Path, folder: str
) -> None:
    (store.path / folder / "file").symlink_to(outside / "precious")
    (store.path / folder / "folder").symlink_to(outside)

    store.execute(store.plan_prune(PrunePolicy()))

    assert not list((store.path / folder).iterdir())
    assert (outside / "precious").read_text() == "precious"


def test_list_of_names_that_is_a_link_is_not_read(
    store: PrefixStore, outside: Path
) -> None:
    store.pin(save(store, tokens(70)), "name")
    names = store.path / "prefixes.json"
    names.rename(outside / "names")
    names.symlink_to(outside / "names")
    (store.path / "index.db").unlink()

    with PrefixStore(store.path) as rebuilt:
        assert rebuilt.rebuilt == 1
        assert rebuilt.pins() == []


def test_pipe_in_place_of_a_blob_does_not_hang(store: PrefixStore) -> None:
    key = save(store, tokens(70))
    blob_path(store, key).unlink()
    os.mkfifo(blob_path(store, key), 0o600)
    os.mkfifo(store.path / "tmp" / "pipe", 0o600)

    assert len(store.verify(fix=True).damaged) == 1
    store.execute(store.plan_prune(PrunePolicy()))

    assert not list((store.path / "tmp").iterdir())


@pytest.mark.parametrize(
    "key", ["../../outside/precious", "/etc/passwd", "ab" * 17, ""]
)
def test_key_leads_nowhere_outside(store: PrefixStore, key: str) -> None:
    blobs = BlobFolder(store.path)

    with pytest.raises(DamagedBlobError, match="is not a blob key"):
        blobs.path(key)
    assert not blobs.exists(key)
    assert blobs.remove(key) == 0


# What is removed is gone


@pytest.mark.parametrize("deed", ["remove", "prune"])
def test_removing_really_frees_the_blocks(store: PrefixStore, deed: str) -> None:
    def blocks() -> int:
        output = subprocess.check_output(["du", "-sk", str(store.path)], text=True)
        return 1024 * int(output.split()[0])

    empty = blocks()
    key = save(store, tokens(2000), width=500)
    assert blocks() > empty + 4_000_000
    names = [path.name for path in blob_paths(store)]

    if deed == "remove":
        store.remove(key)
    else:
        store.execute(store.plan_prune(PrunePolicy(older_than=-1.0)))

    assert blocks() < empty + 200_000
    assert not [path for path in store.path.rglob("*") if path.name in names]


# Tenants


def test_second_tenants_first_request_never_hits(
    model_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "store"
    with CachedGenerator.load(model_dir, store=path, namespace="one", save=True) as one:
        one.build(PROMPT, name="secret")
        assert [*one.stream_generate(PROMPT, 2)][-1].cached_tokens > 0
    with CachedGenerator.load(model_dir, store=path, namespace="two", save=True) as two:
        first = [*two.stream_generate(PROMPT, 2)][-1]
        second = [*two.stream_generate(PROMPT, 2)][-1]
    with CachedGenerator.load(model_dir, store=path, save=False) as nobody:
        third = [*nobody.stream_generate(PROMPT, 2)][-1]

    assert (first.cached_tokens, third.cached_tokens) == (0, 0)
    assert second.cached_tokens > 0
