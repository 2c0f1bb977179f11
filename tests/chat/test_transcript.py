"""A transcript is what was said, whatever happened to the process or the file."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from promptcache import StoreError, UsageError
from promptcache.chat.transcript import VERSION, Transcript, transcript_path

NO_HEAD: dict[str, Any] = {"system": None, "tools": None, "chat_template_config": None}
HEAD = {
    "system": "You narrate.\nBriefly.",
    "tools": [{"name": "dice", "sides": [6, 20]}],
    "chat_template_config": {"enable_thinking": False},
}
# Line ends of all kinds, other alphabets, half a pair of surrogates.
TEXTS = (
    "Hello",
    "a\nb\r\nc\u2028d\x85",
    "",
    "Ünïcödé 日本 🎲",
    '"}\n{',
    "\ud83d",
    "\0",
)
HOLDER = """
import sys
from pathlib import Path
from promptcache.chat.transcript import Transcript

transcript = Transcript(Path(sys.argv[1]), {"system": None})
transcript.add({"role": "user", "content": "said"})
transcript.add_text("shown")
print("open", flush=True)
sys.stdin.read()
"""
# No more than seven bytes fit, and later everything does again.
FULL_DISK = """
import resource, sys
from pathlib import Path
from promptcache import StoreError
from promptcache.chat.transcript import Transcript

path = Path(sys.argv[1])
transcript = Transcript(path, {"system": None})
transcript.add({"role": "user", "content": "said"})
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 7, most))
try:
    transcript.add_text("lost")
except StoreError:
    pass
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
transcript.add_text("kept")
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return transcript_path(tmp_path, "dungeon")


def opened(path: Path | None, **head: Any) -> Transcript:
    """Open a transcript; what of the head is not given is None."""
    return Transcript(path, {**NO_HEAD, **head})


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def reread(path: Path) -> list[dict[str, Any]]:
    """Return the messages that another process would find."""
    with opened(path) as transcript:
        return transcript.messages


def started(script: str, path: Path) -> "subprocess.Popen[str]":
    """Start a process that ends with its stdin."""
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    command = [sys.executable, "-c", script, str(path)]
    return subprocess.Popen(command, text=True, **pipes)


# What was said


def test_reopened_transcript_has_the_same_messages(path: Path) -> None:
    with opened(path, **HEAD) as transcript:
        for text in TEXTS:
            transcript.add(user(text))
            transcript.add_text(text)
            transcript.add_text(text[::-1])
            transcript.end("stop")
            transcript.note_key("k" + text[:1])
        said = transcript.messages

    with opened(path) as again:
        assert again.messages == said
        assert again.head == HEAD
        assert again.key == "k" + TEXTS[-1]
        assert again.is_ended
    assert [m["content"] for m in said[1::2]] == [t + t[::-1] for t in TEXTS]


def test_transcript_in_memory_works_the_same() -> None:
    with opened(None, system="S") as transcript:
        transcript.add(user("Hello"))
        transcript.add_text("Hi")
        transcript.end("stop")
        transcript.note_key("k")
        transcript.add(user("Why?"))
        transcript.end("interrupted")

        assert transcript.key == "k"
        assert transcript.undo()
        assert transcript.messages == [user("Hello"), assistant("Hi")]


def test_message_without_an_answer_is_not_ended(path: Path) -> None:
    with opened(path) as transcript:
        assert transcript.is_ended
        transcript.add(user("Hello"))

    with opened(path) as again:
        assert not again.is_ended
        again.add_text("Hi")
        again.end("stop")
        assert again.is_ended


def test_unfinished_answer_is_ended_as_interrupted_when_reopened(path: Path) -> None:
    with opened(path) as transcript:
        transcript.add(user("Hello"))
        transcript.add_text("Once upon")

    with opened(path) as again:
        assert again.messages == [user("Hello"), assistant("Once upon")]
        assert again.is_ended
    assert json.loads(path.read_text().splitlines()[-1]) == {"end": "interrupted"}
    assert reread(path) == [user("Hello"), assistant("Once upon")]


def test_undo_takes_back_one_turn_and_stays_undone(path: Path) -> None:
    with opened(path) as transcript:
        for number in range(3):
            transcript.add(user(str(number)))
            transcript.add_text("answer")
            transcript.end("stop")
        assert transcript.undo()

    with opened(path) as again:
        assert len(again.messages) == 4
        again.add(user("new"))
        for _ in range(3):
            assert again.undo()
        assert not again.undo()
    assert reread(path) == []


def test_undo_in_the_middle_of_an_answer_leaves_a_readable_file(path: Path) -> None:
    with opened(path) as transcript:
        transcript.add(user("Hello"))
        transcript.add_text("Once")
        transcript.undo()
        transcript.add_text(" upon")
        transcript.end("stop")

    reread(path)


class Sequences(RuleBasedStateMachine):
    """Any sequence of operations, against a plain list of messages."""

    @initialize()
    def begin(self) -> None:
        folder = Path(os.environ["PROMPTCACHE_DIR"])
        self.path = transcript_path(folder, f"random {id(self)}")
        self.path.unlink(missing_ok=True)
        self.transcript = opened(self.path)
        self.messages: list[dict[str, Any]] = []
        self.is_answering = False

    @precondition(lambda self: not self.is_answering)
    @rule(text=strategies.text(max_size=5))
    def add(self, text: str) -> None:
        self.transcript.add(user(text))
        self.messages.append(user(text))

    @rule(text=strategies.text(max_size=5))
    def add_text(self, text: str) -> None:
        self.transcript.add_text(text)
        if not self.is_answering:
            self.messages.append(assistant(""))
        self.messages[-1]["content"] += text
        self.is_answering = True

    @rule()
    def end(self) -> None:
        self.transcript.end("stop")
        if not self.is_answering:
            self.messages.append(assistant(""))
        self.is_answering = False

    @precondition(lambda self: not self.is_answering)
    @rule()
    def undo(self) -> None:
        places = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        assert self.transcript.undo() == bool(places)
        if places:
            del self.messages[places[-1] :]

    @rule(torn=strategies.binary(max_size=5).map(lambda b: b.replace(b"\n", b"")))
    def reopen(self, torn: bytes) -> None:
        self.transcript.close()
        with self.path.open("ab") as file:
            file.write(torn)
        self.transcript = opened(self.path)
        self.is_answering = False

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "messages"):
            assert self.transcript.messages == self.messages
            is_open = bool(self.messages) and self.messages[-1]["role"] == "user"
            assert self.transcript.is_ended == (not self.is_answering and not is_open)

    def teardown(self) -> None:
        self.transcript.close()


def test_any_sequence_of_operations_agrees_with_a_plain_list() -> None:
    run_state_machine_as_test(
        Sequences,
        settings=settings(max_examples=40, stateful_step_count=20, deadline=None),
    )


# Processes that die


def test_file_cut_at_any_byte_loses_at_most_the_torn_line(path: Path) -> None:
    with opened(path, **HEAD) as transcript:
        known = [(path.stat().st_size, [], True)]

        def note() -> None:
            messages = json.loads(json.dumps(transcript.messages))
            known.append((path.stat().st_size, messages, transcript.is_ended))

        for number in range(2):
            transcript.add(user(f"Ü{number}"))
            note()
            for text in ("Once", " 🎲"):
                transcript.add_text(text)
                note()
            transcript.end("stop")
            transcript.note_key("k")
            note()
        transcript.undo()
        note()
        transcript.add(user("bye"))
        note()
    content = path.read_bytes()

    for num_bytes in range(known[0][0], len(content) + 1):
        path.write_bytes(content[:num_bytes])
        expected = [state for state in known if state[0] <= num_bytes][-1]
        with opened(path) as again:
            assert again.messages == expected[1], num_bytes
            assert again.head == HEAD
            is_asked = bool(expected[1]) and expected[1][-1]["role"] == "user"
            assert again.is_ended == (not is_asked)
            again.add_text("more")
        assert reread(path)[-1] == assistant("more"), num_bytes


def test_file_cut_in_its_first_line_begins_anew_or_is_refused(path: Path) -> None:
    opened(path, **HEAD).close()
    content = path.read_bytes()

    for num_bytes in range(len(content)):
        path.write_bytes(content[:num_bytes])
        try:
            assert reread(path) == []
        except StoreError:
            assert path.read_bytes() == content[:num_bytes]


def test_killed_process_lets_go_and_loses_nothing(path: Path) -> None:
    with started(HOLDER, path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        wanted = rf"process {process.pid} .* has this conversation open"
        with pytest.raises(UsageError, match=wanted) as raised:
            opened(path)
        assert "\n" not in str(raised.value)
        process.send_signal(signal.SIGKILL)
        process.wait()

        assert reread(path) == [user("said"), assistant("shown")]


def test_second_open_is_refused_until_the_first_is_closed(path: Path) -> None:
    first = opened(path)

    for _ in range(2):
        with pytest.raises(UsageError, match="open, close it first"):
            opened(path)
    first.add(user("still works"))
    first.close()

    assert reread(path) == [user("still works")]


def test_line_that_did_not_fit_does_not_spoil_the_next(path: Path) -> None:
    with started(FULL_DISK, path) as process:
        assert process.wait() == 0

    assert reread(path) == [user("said"), assistant("kept")]


# Heads


@pytest.mark.parametrize("name", HEAD)
def test_another_head_is_refused_and_changes_nothing(path: Path, name: str) -> None:
    opened(path, **HEAD).close()
    before = path.read_bytes()
    other = {"system": "Other", "tools": [], "chat_template_config": {}}[name]

    with pytest.raises(UsageError, match=f"another {name}"):
        opened(path, **{name: other})

    assert path.read_bytes() == before
    opened(path, **{name: HEAD[name]}).close()


def test_head_is_taken_from_the_file_where_it_is_not_given(path: Path) -> None:
    opened(path, system="S").close()

    with opened(path) as again:
        assert again.head == {**NO_HEAD, "system": "S"}


# Files and names


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_nobody_else_can_read_a_transcript(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with opened(path) as transcript:
            transcript.add(user("secret"))
            modes = {p.name: p.stat().st_mode & 0o777 for p in path.parent.iterdir()}
    finally:
        os.umask(before)

    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert modes["dungeon.jsonl"] == 0o600
    assert set(modes.values()) == {0o600}


NAMES = ("../../x", "a/b", "/etc/passwd", "日本", "..", ".", "%2E", "a\\b", "x" * 200)


def test_names_are_no_paths_and_do_not_meet(tmp_path: Path) -> None:
    folder = (tmp_path / "chats").resolve()

    for name in NAMES:
        with opened(transcript_path(tmp_path, name)) as transcript:
            transcript.add(user(name))

    files = [p for p in folder.iterdir() if p.suffix == ".jsonl"]
    assert len(files) == len(NAMES)
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.parent != folder] == []
    for name in NAMES:
        assert transcript_path(tmp_path, name).resolve().parent == folder
        assert reread(transcript_path(tmp_path, name)) == [user(name)]


UNNAMES = ("", " ", "\n", "a\nb", "\0", "\ud83d", "x" * 201, "ü" * 34, "x" * 10**6)


@pytest.mark.parametrize("name", UNNAMES, ids=range(len(UNNAMES)))
def test_name_that_cannot_be_one_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a conversation") as raised:
        transcript_path(Path(), name)

    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


LINE = b'{"version": 1}\n'
FOREIGN = {
    "text": b"notes\n",
    "a list": b"[1]\n",
    "another object": b'{"name": "x"}\n',
    "binary": b"\x80\n\x00\xff\n",
    "an event that is none": LINE + b"5\n",
    "a blank line": LINE + b"\n",
    "zeros": LINE + b"\0\0\0\n",
    "text without a line end": b"notes",
    "binary without a line end": b"\x80\x00\xff",
    "text with a torn line": b"notes\nmore",
    "a version that is text": b'{"version": "1"}\n',
    "a message that is none": LINE + b'{"message": 5}\n',
    "a message without a role": LINE + b'{"message": {}}\n',
    "nesting without end": LINE + b"[" * 10**5 + b"\n",
}


def assert_refused(path: Path, content: bytes) -> None:
    """Check that opening is an error of one line, and changes nothing."""
    path.parent.mkdir()
    path.write_bytes(content)

    for _ in range(2):
        with pytest.raises(StoreError) as raised:
            opened(path)
        assert "\n" not in str(raised.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_file_that_is_no_transcript_is_refused(path: Path, content: bytes) -> None:
    assert_refused(path, content)


def test_newer_version_is_refused_untouched(path: Path) -> None:
    head = json.dumps({"version": VERSION + 1, **HEAD, "new": 1})
    assert_refused(path, f'{head}\n{{"text": "Once"}}\n'.encode())


@pytest.mark.parametrize("event", ['{"text": "On', '{"undo": {"to": 3}}\n'])
def test_newer_version_is_refused_whatever_follows(path: Path, event: str) -> None:
    assert_refused(path, f'{{"version": {VERSION + 1}}}\n{event}'.encode())
    with pytest.raises(StoreError, match="newer promptcache"):
        opened(path)


def test_chats_folder_that_is_a_file_is_one_error(path: Path) -> None:
    path.parent.write_text("")

    with pytest.raises(StoreError, match="cannot be kept"):
        opened(path)
