"""`promptcache chat`."""

import contextlib
import fcntl
import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from promptcache.chat.transcript import Transcript, transcript_path
from tests.helpers import tiny
from tests.helpers.commands import GENERATE_FIELDS, assert_fails, invoke, ok
from tests.helpers.marks import all_but

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COMMAND = [sys.executable, "-m", "promptcache_cli", "chat"]
# Long enough to be interrupted while it is read in tiny pieces, each of them saved.
LONG = "What do you see from your window, old friend? " * 60
SLOW = ("--prefill-step-size", "16")
SECONDS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says capitals only, one a token: as text they are the same tokens.

    All other tokens' rows of its output layer are zero, and greedy sampling takes a
    capital with a logit above that.
    """
    config = {**tiny.LLAMA, "tie_word_embeddings": False}
    folder = tiny.save_model(tmp_path_factory.mktemp("models") / "llama", config)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    path = str(folder / "model.safetensors")
    weights = mx.load(path)
    head = mx.zeros_like(weights["lm_head.weight"])
    capitals = mx.array([vocabulary[letter] for letter in LETTERS])
    head[capitals] = weights["lm_head.weight"][capitals]
    mx.eval(weights)
    mx.save_safetensors(path, {**weights, "lm_head.weight": head}, {"format": "mlx"})
    return folder


@pytest.fixture(autouse=True)
def model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTCACHE_MODEL", str(folder))


@contextlib.contextmanager
def chatting(*args: str, **options: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a chat as a process of its own, which is killed in the end."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([*COMMAND, *args], **{**pipes, **options})
    with process:
        try:
            yield process
        finally:
            process.kill()


def send(process: "subprocess.Popen[bytes]", *lines: str) -> None:
    assert process.stdin is not None
    process.stdin.write("".join(f"{line}\n" for line in lines).encode())
    process.stdin.flush()


def shown(process: "subprocess.Popen[bytes]", num_bytes: int) -> bytes:
    """Read so many bytes of stdout as they come."""
    assert process.stdout is not None
    return b"".join(os.read(process.stdout.fileno(), 1) for _ in range(num_bytes))


def finish(process: "subprocess.Popen[bytes]") -> tuple[str, str]:
    """End the input; return the rest of stdout, and stderr."""
    out, err = process.communicate(timeout=SECONDS)
    return out.decode(), err.decode()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def path_of(name: str) -> Path:
    return transcript_path(Path(os.environ["PROMPTCACHE_DIR"]), name)


def written(name: str) -> int:
    """Return how many pieces of an answer have been written down, -1 before it."""
    path = path_of(name)
    content = path.read_bytes() if path.exists() else b""
    return content.count(b'"text"') if b'"message"' in content else -1


def messages(name: str) -> list[dict[str, Any]]:
    """Return what a chat that goes on would find."""
    head = {"system": None, "tools": None, "chat_template_config": None}
    with Transcript(path_of(name), head) as transcript:
        return transcript.messages


def chat(*lines: str, args: tuple[str, ...] = (), end: str = "\n") -> Any:
    """Hold a whole conversation of eight tokens an answer."""
    stdin = "\n".join(lines) + end
    return ok("chat", "--max-tokens", "8", *args, stdin=stdin)


def answers_as_json(stdout: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stdout.splitlines()]


# Lines


def test_every_line_is_a_turn_and_stdout_has_the_answers_alone() -> None:
    result = chat("Hello", "", "   ", "Why?", end="")

    assert re.fullmatch(r"[A-Z]{8}\n[A-Z]{8}\n", result.stdout)
    assert result.stderr == ""


def test_answers_are_those_of_generate(tmp_path: Path) -> None:
    stdout = chat("Hello", "Why?", args=("-s", "S")).stdout
    first, second = stdout.splitlines()

    turns = [("user", "Hello"), ("assistant", first), ("user", "Why?")]
    said = [{"role": role, "content": text} for role, text in turns]
    (tmp_path / "said.json").write_text(json.dumps(said))
    args = ("-s", "S", "--max-tokens", "8", "--no-cache")
    assert ok("generate", *args, "Hello").stdout == f"{first}\n"
    again = ok("generate", *args, "--messages", tmp_path / "said.json")
    assert again.stdout == f"{second}\n"


def test_commands_talk_on_stderr_and_are_no_turns() -> None:
    result = chat("/help", "/nonsense", "Hello", "/history", "/exit", "Never said")

    answer = result.stdout.rstrip("\n")
    assert re.fullmatch("[A-Z]{8}", answer)
    help_, rest = result.stderr.split("No command /nonsense, /help lists them\n")
    assert all(word in help_ for word in ("/help", "/history", "/undo", "/exit"))
    assert rest == f"user: Hello\nassistant: {answer}\n"


def test_undo_takes_back_a_turn_for_good() -> None:
    args = ("--name", "n")
    result = chat("/undo", "Hello", "Why?", "/undo", "/history", args=args)

    assert result.stdout.count("\n") == 2
    first = result.stdout.split()[0]
    history = f"user: Hello\nassistant: {first}\n"
    assert result.stderr == f"Nothing to take back\nTaken back\n{history}"
    again = chat("/history", args=("--name", "n", "-q"))
    assert (again.stdout, again.stderr) == ("", history)


def test_json_is_one_object_a_line_with_the_fields_of_generate() -> None:
    result = chat("Hello", "Why?", args=("--json", "-u"))

    answers = answers_as_json(result.stdout)
    assert len(answers) == 2
    for answer in answers:
        assert list(answer) == list(GENERATE_FIELDS)
        for name, kind in GENERATE_FIELDS.items():
            assert isinstance(answer[name], kind), name
    first, second = answers
    assert (first["cached_tokens"], first["generation_tokens"]) == (0, 8)
    # The last token of an answer has not been read.
    assert second["cached_tokens"] == first["prompt_tokens"] + 7
    usage = f"{second['prompt_tokens']} prompt tokens, {second['cached_tokens']} cached"
    assert result.stderr.splitlines()[1].startswith(usage)


def test_named_chat_goes_on_in_another_process_and_reads_what_is_new() -> None:
    args = ("--name", "n", "--max-tokens", "8", "--json")
    runs = []
    for line in ("Hello", "Why?"):
        with chatting(*args, "-s", "S") as process:
            send(process, line)
            out, err = finish(process)
        assert process.returncode == 0
        runs.append((*answers_as_json(out), err))

    (first, _), (second, talk) = runs
    assert second["cached_tokens"] == first["prompt_tokens"] + 7
    assert talk == "Continuing after turn 1, /history shows them all\n"
    assert [m["content"] for m in messages("n")] == [
        *("Hello", first["text"], "Why?", second["text"])
    ]
    assert len(json.loads(ok("ls", "--json").stdout)) == 1


def test_chat_that_is_not_saved_stores_nothing() -> None:
    result = chat("Hello", "Why?", args=("--json", "--no-save"))

    answers = answers_as_json(result.stdout)
    assert [answer["cached_tokens"] for answer in answers] == [0, 0]
    assert json.loads(ok("ls", "--json").stdout) == []


# Interruptions


def test_interrupt_keeps_what_was_shown_and_goes_on() -> None:
    with chatting("--name", "n", "--max-tokens", "600") as process:
        send(process, "Hello", "/history", "Why?")
        start = shown(process, 20).decode()
        process.send_signal(signal.SIGINT)
        rest, err = finish(process)

    first, second = (start + rest).splitlines()
    assert process.returncode == 0
    assert 20 <= len(first) < 600
    assert len(second) == 600
    assert err == f"user: Hello\nassistant: {first}\n"
    texts = [message["content"] for message in messages("n")]
    assert texts == ["Hello", first, "Why?", second]


def test_interrupt_of_a_json_answer_prints_what_there_is() -> None:
    with chatting("--name", "n", "--max-tokens", "600", "--json") as process:
        send(process, "Hello")
        wait_until(lambda: written("n") > 20)
        process.send_signal(signal.SIGINT)
        [answer] = answers_as_json(finish(process)[0])

    assert 20 <= answer["generation_tokens"] < 600
    assert answer["finish_reason"] is None
    assert messages("n")[-1]["content"] == answer["text"]


def test_interrupt_before_the_first_token_goes_on_with_the_next_line() -> None:
    with chatting("--name", "n", "--max-tokens", "8", *SLOW) as process:
        send(process, LONG)
        wait_until(lambda: written("n") == 0)
        # It is in the middle of a second and a half of reading.
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        send(process, "Why?", "/undo", "/undo", "Hello")
        out, err = finish(process)

    assert process.returncode == 0
    assert re.fullmatch(r"\n?[A-Z]{8}\n[A-Z]{8}\n", out)
    assert err.splitlines() == ["Stopped before the answer began", *["Taken back"] * 2]
    assert [m["content"] for m in messages("n")] == ["Hello", out.splitlines()[-1]]


@pytest.mark.parametrize("seed", all_but([0, 1], range(10)))
def test_killed_chat_has_written_down_all_that_it_has_shown(seed: int) -> None:
    moment = random.Random(seed)
    with chatting("--name", "n", "--max-tokens", "2000") as process:
        send(process, "Hello")
        start = shown(process, moment.randrange(1, 300))
        time.sleep(moment.uniform(0, 0.01))
        process.kill()
        assert process.stdout is not None
        text = (start + process.stdout.read()).decode()

    said, answer = messages("n")
    assert said["content"] == "Hello"
    # One piece may have been written down and not shown any more.
    assert answer["content"].startswith(text)
    assert len(answer["content"]) <= len(text) + 1 < 2000


def test_text_is_written_down_before_it_is_shown() -> None:
    screen, pipe = os.pipe()
    # A full pipe stops the chat where it shows its 21st token.
    filler = b"." * (fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096) - 20)
    os.write(pipe, filler)
    with chatting("--name", "n", stdout=pipe) as process:
        os.close(pipe)
        send(process, "Hello")
        wait_until(lambda: written("n") == 21)
        process.kill()
    with os.fdopen(screen, "rb") as file:
        text = file.read().removeprefix(filler).decode()

    assert len(text) == 20
    assert re.fullmatch(f"{text}[A-Z]", messages("n")[-1]["content"])


def test_message_that_a_killed_chat_has_not_answered_is_answered() -> None:
    with chatting("--name", "n", "--max-tokens", "8", *SLOW) as process:
        send(process, LONG)
        wait_until(lambda: written("n") == 0)
        process.kill()
    assert [message["role"] for message in messages("n")] == ["user"]

    result = chat(args=("--name", "n"))

    assert re.fullmatch(r"[A-Z]{8}\n", result.stdout)
    assert [m["content"] for m in messages("n")] == [LONG.strip(), result.stdout[:-1]]
    assert chat(args=("--name", "n")).stdout == ""


def test_reader_that_has_enough_ends_a_chat_silently() -> None:
    with chatting("--name", "n", "--max-tokens", "2000") as process:
        send(process, "Hello")
        text = shown(process, 20).decode()
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait(SECONDS) == 1
        assert process.stderr.read() == b""

    assert messages("n")[-1]["content"].startswith(text)


# Terminals


class Terminal:
    """A chat on a pseudo-terminal."""

    def __init__(self, *args: str, **options: Any) -> None:
        """Start it; options are `Popen`'s."""
        self._screen, inside = pty.openpty()
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), inside)
        self.process = subprocess.Popen(
            [*COMMAND, *args],
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            **{**streams, **options},
        )
        os.close(inside)

    def type(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def read_until(self, words: str, *, typing: str = "") -> str:
        """Read what is shown until some words are, typing some keys now and then.

        What is typed while the terminal gets ready for editing is lost.
        """
        text, end = b"", time.monotonic() + SECONDS
        while words.encode() not in text:
            if select.select([self._screen], [], [], 2)[0]:
                text += os.read(self._screen, 1)
                continue
            assert time.monotonic() < end, text
            self.type(typing)
        return text.decode()

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._screen)


def test_control_c_at_the_prompt_does_not_leave_and_control_d_does() -> None:
    with Terminal("--max-tokens", "8") as terminal:
        terminal.read_until("> ")
        terminal.type("half a li")
        terminal.read_until("half a li", typing="half a li")
        terminal.type("\x03")
        terminal.read_until("Ctrl-D or /exit leaves", typing="\x03")
        terminal.read_until("> ")
        terminal.type("Hello\n")
        text = terminal.read_until("> ")
        assert re.search(r"[A-Z]{8}\r\n", text)

        terminal.type("\x04")
        assert terminal.process.wait(SECONDS) == 0


def test_stdout_that_is_no_terminal_gets_no_prompts() -> None:
    with Terminal("--max-tokens", "8", stdout=subprocess.PIPE) as terminal:
        terminal.type("Hello\n\x04")
        assert terminal.process.stdout is not None
        text = terminal.process.stdout.read().decode()

    assert re.fullmatch(r"[A-Z]{8}\n", text)


# Errors


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (["--chat-template-config", "{"], 2, "JSON"),
        (["--chat-template-config", "[]"], 2, "object"),
        (["--max-tokens", "0"], 2, "--max-tokens"),
        (["--max-tokens", "-2"], 2, "--max-tokens"),
        (["--name", ""], 2, "cannot name"),
        (["--name", "a\nb"], 2, "cannot name"),
        (["-m", "/nowhere"], 1, "/nowhere"),
        (["Hello"], 2, "unexpected"),
        (["--kv-bits", "7"], 2, "kv_bits"),
    ],
)
def test_wrong_options_are_an_error_of_one_line(
    args: list[str], code: int, word: str
) -> None:
    assert_fails(invoke("chat", *args, stdin=""), code, word)


def test_message_that_cannot_be_answered_is_not_kept() -> None:
    result = invoke("chat", "--name", "n", "--kv-bits", "7", stdin="Hello\n")

    assert "kv_bits must be" in result.stderr
    assert messages("n") == []


def test_chat_with_another_head_is_refused() -> None:
    chat("Hello", args=("--name", "n", "-s", "S"))

    result = invoke("chat", "--name", "n", "-s", "Other", stdin="Hello\n")

    assert_fails(result, 2, "another system")
    assert len(messages("n")) == 2


def test_name_that_is_in_use_is_refused() -> None:
    with chatting("--name", "n") as process:
        wait_until(path_of("n").exists)

        assert_fails(invoke("chat", "--name", "n", stdin="Hello\n"), 2, "open")

        finish(process)
    assert chat("Hello", args=("--name", "n")).stdout


def test_input_that_is_no_text_is_no_traceback() -> None:
    with chatting("--max-tokens", "8") as process:
        assert process.stdin is not None
        process.stdin.write(b"\xff\xfe\nHello\n")
        err = finish(process)[1]

    assert "Traceback" not in err
