"""What is found to be volatile in a text, and what is not."""

import random
import string
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptcache.explain.volatile_text import KINDS, find_volatile


def found_in(text: str) -> list[tuple[str, str]]:
    return [(volatile.kind, volatile.text) for volatile in find_volatile(text)]


DATES = [
    "2026-11-22",
    "2026/11/22",
    "2026.11.22",
    "22.11.2026",
    "5.3.2026",
    "11/22/2026",
    "22/11/2026",
    "November 22, 2026",
    "november 22, 2026",
    "22 Nov 2026",
    "22-Nov-2026",
    "Nov 22 2026",
    "Nov. 22, 2026",
    "Sunday, November 22",
    "Sunday, November 22, 2026",
    "Sun, 22 Nov 2026",
    "Sunday 2026-11-22",
    "Sunday, the 22nd of November",
    "22nd of November 2026",
]
TIMES = [
    "15:04",
    "00:00",
    "15:04:05",
    "15:04:05.123",
    "9:04:05",
    "3:04 PM",
    "3:04pm",
    "3:04 p.m.",
    "15:00:00 EST",
    "15:04 UTC",
    "15:04+01:00",
    "2026-11-22T10:33:05Z",
    "2026-11-22T10:33:05.123456+01:00",
    "2026-11-22 10:33",
    "20261122T103305Z",
    "2024-05-15 15:00:00 EST",
    "November 22, 2026 at 3:04 PM",
    "Sunday, November 22, 2026, 15:04",
    "Sun Nov 22 10:33:05 2026",
    "Sun Nov 22 10:33:05 UTC 2026",
    "Nov 22 10:33:05",
]
UUIDS = [
    "123e4567-e89b-12d3-a456-426614174000",
    "123E4567-E89B-12D3-A456-426614174000",
]
RANDOM_IDS = [
    "4d2a233ef5bce2c0",
    "4D2A233EF5BCE2C0",
    "0x7f3a2b1c9d8e4f60",
    "4d2a233ef5bce2c0ca6ae662894a8a77",
]
HOSTNAMES = ["mymac.local", "nas.home.lan", "db-1.internal"]
DIRECTORIES = [
    "/home/ann",
    "/home/ann/my-work/x.py",
    "/Users/bob/src",
    "C:\\Users\\bob\\src",
    "C:\\\\Users\\\\bob\\\\src",
]
COUNTERS = [
    "Turn #12",
    "turn=12",
    "request #123",
    "attempt: 2",
    "iteration: 7",
    "Session: 41",
    "run #9",
    "PID 1234",
    "pid=1234",
    "process id 1234",
]
VOLATILES = [
    *(("date", text) for text in DATES),
    *(("time", text) for text in TIMES),
    *(("UUID", text) for text in UUIDS),
    *(("random id", text) for text in RANDOM_IDS),
    *(("hostname", text) for text in HOSTNAMES),
    *(("working directory", text) for text in DIRECTORIES),
    *(("counter", text) for text in COUNTERS),
]


@pytest.mark.parametrize("frame", ["{}", "Foo {} bar.", '"{}",', "({})", "x\n{}\nx"])
@pytest.mark.parametrize(("kind", "text"), VOLATILES)
def test_volatile_text_is_found(kind: str, text: str, frame: str) -> None:
    assert found_in(frame.format(text)) == [(kind, text)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_cases(kind: str) -> None:
    assert kind in dict(VOLATILES)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("timestamp: 1763800000", "time", "1763800000"),
        ("now=1763800000123", "time", "1763800000123"),
        ("Unix time is 1763800000.25", "time", "1763800000.25"),
        ('"epoch": 1763800000', "time", "1763800000"),
        ("Time in seconds: 1763800000", "time", "1763800000"),
        ("uuid: 123e4567e89b12d3a456426614174000", "UUID", "123e4567e89b12d3"),
        ("commit 8ea5d22", "random id", "8ea5d22"),
        ("Recent commits:\n8ea5d22 Add it", "random id", "8ea5d22"),
        ("sha: 8ea5d22f", "random id", "8ea5d22f"),
        ("rev 8ea5d22", "random id", "8ea5d22"),
        ("build #8ea5d22", "random id", "8ea5d22"),
        ("hostname: foo", "hostname", "foo"),
        ('"hostname": "foo-1",', "hostname", "foo-1"),
        ("host=foo.local", "hostname", "foo.local"),
        ("cwd: /x", "working directory", "/x"),
        ("Working directory: /x/y.z.", "working directory", "/x/y.z"),
        ("The current working directory is `/x`.", "working directory", "/x"),
        ("pwd=~/x", "working directory", "~/x"),
        ("cwd: C:\\src", "working directory", "C:\\src"),
        ("Today is November 22.", "date", "November 22"),
    ],
)
def test_cue_reveals_volatile_text(text: str, kind: str, value: str) -> None:
    [volatile] = find_volatile(text)

    assert (volatile.kind, volatile.text[: len(value)]) == (kind, value)


@pytest.mark.parametrize(
    "text",
    [
        "Cutting Knowledge Date: December 2023",
        "Knowledge cutoff: 2024-06",
        "Knowledge cutoff: 2024-06-30",
        "Your knowledge base was last updated on 2023-10-01.",
        "2026",
        "May 5",
        "Monday",
        "Sun 5",
        "gpt-4o-2024-08-06",
        "claude-sonnet-4-5-20250929",
        "2024-08-01-preview",
        "version 2026.1",
        "John 3:16",
        "16:9 or 1:1",
        "1:05",
        "25:61",
        "a[10:20]",
        "main.py:12:34",
        "00:11:22:33:44:55",
        "call 1763800000",
        "time 12345",
        "123e4567e89b1",
        "deadbeefdeadbeef",
        "1234567890123456",
        "0123456789abcdef",
        "commit defaced",
        "5.502637941390276e-05",
        "8ea5d22",
        "getUserDetailsFromReservation",
        "call_function2",
        "call_getUserDetailsFromReservation",
        "file_20240101",
        "Qwen3-235B-A22B-Instruct-2507-FP8",
        "sha256WithRSAEncryption",
        string.ascii_letters + string.digits + "+/",
        "https://example.com/watch/dQw4w9WgXcQabc123XYZabcd9",
        "/usr/lib/python3.11/site-packages",
        "antidisestablishmentarianism",
        "localhost:8080",
        "host: localhost",
        "hostname=localhost",
        "{'http://hostname': 'foo.example:4012'}",
        "def f(hostname: str)",
        '"hostname": "The name of the machine"',
        "settings.local.json",
        "threading.local()",
        "api.example.com/home/page",
        "/home/",
        "/Users/{id}",
        "rule 3",
        "section 4",
        "chapter 2",
        "Step 1: say hello",
        "step 3",
        "run 3 tests",
        "turn 90 degrees",
        "message 5",
        "attempt 1.5",
        "5 tokens",
    ],
)
def test_lasting_text_is_not_found(text: str) -> None:
    assert find_volatile(text) == []
    assert find_volatile(f"foo {text} bar") == []


def test_cutoff_does_not_hide_the_date() -> None:
    prompt = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n"

    assert found_in(prompt) == [("date", "26 Jul 2024")]


def test_finds_are_in_order_of_the_text() -> None:
    prompt = "turn: 3, cwd: /x, on 2026-11-22 (4d2a233ef5bce2c0)"

    kinds = [volatile.kind for volatile in find_volatile(prompt)]

    assert kinds == ["counter", "working directory", "date", "random id"]


def test_hostname_is_found_as_whole_word_in_any_case() -> None:
    prompt = "box Box.example.com user@BOX inbox box-2 boxes"

    found = find_volatile(prompt, hostnames=["box", ""])

    assert [(v.start, v.text) for v in found] == [(0, "box"), (4, "Box"), (25, "BOX")]


def test_longer_hostname_wins() -> None:
    [found] = find_volatile("on box.example", hostnames=["box", "box.example"])

    assert found.text == "box.example"


def test_localhost_is_no_hostname() -> None:
    assert find_volatile("at localhost", hostnames=["localhost"]) == []


@pytest.mark.parametrize(
    ("prompt", "path"),
    [
        ("in /srv/game", "/srv/game"),
        ("in /srv/game/.", "/srv/game/"),
        ("see file:///srv/game/a.py.", "/srv/game/a.py"),
        ("'/srv/game/a b'", "/srv/game/a"),
        ("in /srv/game.", "/srv/game"),
        ("in /my work/x", "/my work/x"),
    ],
)
def test_directory_is_found_with_what_it_begins(prompt: str, path: str) -> None:
    [found] = find_volatile(prompt, directories=["/srv/game/", "/my work", "/", ""])

    assert (found.kind, found.text) == ("working directory", path)


@pytest.mark.parametrize("path", ["/srv/gameframe", "/srv/game-2", "/a/srv/game"])
def test_other_path_is_not_found(path: str) -> None:
    assert find_volatile(path, directories=["/srv/game"]) == []


VOLATILE_TEXTS = st.sampled_from([text for _, text in VOLATILES])
# Pieces of patterns find overlaps that plain text has not.
PIECES = VOLATILE_TEXTS | st.text(max_size=5) | st.sampled_from([" ", "-", "/", ":"])
TEXTS = st.lists(PIECES, max_size=12).map("".join)


@settings(deadline=None)
@given(TEXTS)
def test_finds_are_ordered_slices_that_do_not_overlap(text: str) -> None:
    found = find_volatile(text, hostnames=["Foo"], directories=["/home"])

    end = 0
    for volatile in found:
        assert volatile.kind in KINDS
        assert end <= volatile.start < volatile.end <= len(text)
        assert volatile.text == text[volatile.start : volatile.end]
        end = volatile.end


def prose(num_chars: int) -> str:
    """Return words, numbers and volatile text."""
    rng = random.Random(0)
    words = [text for _, text in VOLATILES] + 9 * ["the", "model", "16:9", "a-b", "7\n"]
    return " ".join(rng.choices(words, k=num_chars // 4))[:num_chars]


@pytest.mark.alone
@pytest.mark.parametrize(
    "text",
    [
        prose(200_000),
        "1" * 100_000,
        "a-" * 50_000,
        "a." * 50_000,
        "0123456789abcdef" * 5000,
        "0123456789abcdef" * 5000 + "g",
        " " * 100_000,
        "/" * 100_000,
        "\\" * 100_000,
        "/home/a" * 20_000,
        "cwd: " * 30_000,
        "hostname: " + "a." * 50_000,
        "commit:  " * 20_000,
        "2026-11-" * 20_000,
        "turn " * 30_000,
        "1," * 50_000,
        "12:" * 30_000,
        "Aa1/" * 30_000,
    ],
    ids=lambda text: text[:12],
)
def test_search_takes_linear_time(text: str) -> None:
    started_at = time.perf_counter()

    find_volatile(text, hostnames=["box"], directories=["/work"])

    # A tenth of it on an idle machine.
    assert time.perf_counter() - started_at < 3


def test_import_is_cheap() -> None:
    module = "promptcache.explain.volatile_text"
    heavy = "{'mlx', 'click', 'sqlite3', 'numpy'}"
    code = f"import sys, {module}; print({heavy} & set(sys.modules))"

    process = subprocess.run([sys.executable, "-c", code], capture_output=True)

    assert process.stdout.strip() == b"set()"
