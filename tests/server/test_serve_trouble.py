"""The server when the disk is in trouble: a request in flight gets its answer."""

import contextlib
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.helpers.marks import all_but
from tests.helpers.served import wait_until
from tests.helpers.serving import Messages, Server, ask, running, system_and

SYSTEM = "You are the narrator of a long story about a lighthouse. " * 12
# Pieces of a few tokens take long enough for something to happen meanwhile.
SLOWLY = ("--prefill-step-size", "8", "--memory-limit", "64MB")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32M", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def answers_meanwhile(
    server: Server, messages: Messages, happen: Callable[[], object]
) -> Any:
    """Ask, let something happen while it is read, and return the answer."""
    answers: list[Any] = []

    def run() -> None:
        answers.append(ask(server.client(), messages))

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: server.metric("active_requests") == 1)
    happen()
    assert thread.is_alive(), "it was over before anything happened"
    thread.join(60)
    return answers[0]


class Expected(NamedTuple):
    """A prompt, how it is answered where nothing is wrong, and the store by then."""

    messages: Messages
    text: str
    store: Path


@pytest.fixture(scope="module")
def expected(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    store = tmp_path_factory.mktemp("sound") / "store"
    messages = system_and(SYSTEM * 4, "Hello")
    with running(model_dir, *SLOWLY, store=store) as server:
        return Expected(messages, ask(server.client(), messages).text, store)


@pytest.fixture
def sound(expected: Expected, tmp_path: Path) -> Path:
    """A copy of the store where that was answered."""
    return Path(shutil.copytree(expected.store, tmp_path / "sound"))


def test_answer_comes_when_the_disk_fills(
    model_dir: Path, small_disk: Path, expected: Expected
) -> None:
    messages, text, _ = expected

    def fill() -> None:
        other = small_disk / "other"
        with contextlib.suppress(OSError), other.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    with running(model_dir, *SLOWLY, store=small_disk / "store") as server:
        answer = answers_meanwhile(server, messages, fill)
        again = ask(server.client(), messages)

        assert server.metric("saves_total", result="failed") > 0
        assert any("not saved" in line for line in server.said)
        assert not any("Traceback" in line for line in server.said)

    assert answer.text == again.text == text
    assert again.prefilled_tokens == 1


def test_answer_comes_when_the_store_turns_read_only(
    model_dir: Path, small_disk: Path, expected: Expected
) -> None:
    messages, text, _ = expected
    unfinished = small_disk / "store" / "tmp"

    def turn_read_only() -> None:
        # Where new blobs are written; what is open already could not be mounted so.
        for options in (
            ["--bind", unfinished, unfinished],
            ["-o", "remount,ro,bind", unfinished],
        ):
            subprocess.run(["mount", *options], check=True)

    try:
        with running(model_dir, *SLOWLY, store=small_disk / "store") as server:
            answer = answers_meanwhile(server, messages, turn_read_only)
            again = ask(server.client(), messages)

            assert server.metric("saves_total", result="failed") > 0
            assert any("not saved" in line for line in server.said)
            assert not any("Traceback" in line for line in server.said)
    finally:
        subprocess.run(["umount", "-l", unfinished], check=True)

    assert answer.text == again.text == text
    assert again.prefilled_tokens == 1


@pytest.mark.parametrize("damage", all_but(["flip"], ["flip", "cut", "remove"]))
def test_answer_comes_when_a_blob_is_damaged(
    model_dir: Path, expected: Expected, sound: Path, damage: str
) -> None:
    messages, text, _ = expected
    for blob in (sound / "blobs").rglob("*.safetensors"):
        data = bytearray(blob.read_bytes())
        data[-100] ^= 1
        blob.write_bytes(data if damage == "flip" else data[: len(data) // 2])
        if damage == "remove":
            blob.unlink()

    with running(model_dir, *SLOWLY, store=sound) as server:
        answers = [ask(server.client(), messages) for _ in range(2)]

        assert any("cannot be used" in line for line in server.said)
        assert not any("Traceback" in line for line in server.said)

    assert [answer.text for answer in answers] == [text, text]
    assert answers[0].cached_tokens == 0
    assert answers[1].prefilled_tokens == 1


def test_server_without_a_writable_store_answers(
    model_dir: Path,
    expected: Expected,
    sound: Path,
    mount_read_only: Callable[[Path], Path],
) -> None:
    messages, text, _ = expected

    with running(model_dir, *SLOWLY, store=mount_read_only(sound)) as (server):
        answers = [ask(server.client(), messages) for _ in range(2)]
        other = ask(server.client(), system_and(f"Another {SYSTEM}", "Hello"))

    assert [answer.text for answer in answers] == [text, text]
    assert answers[0].prefilled_tokens == 1
    assert other.completion_tokens > 0
