"""The command as a whole: help, errors, speed, signals."""

import json
import math
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from promptcache import PrefixStore, __version__
from promptcache.segments.chain import Chain
from promptcache.segments.types import SegmentInfo
from promptcache.store.blobs.folder import BlobFolder
from promptcache_cli.main import cli
from tests.helpers import segments
from tests.helpers.blobs import write_blob
from tests.helpers.commands import assert_fails, invoke, ok, start, tree_hash

COMMANDS = [
    "batch",
    "build",
    "chat",
    "explain",
    "generate",
    "ls",
    "parity",
    "path",
    "pin",
    "prune",
    "rm",
    "serve",
    "show",
    "stats",
    "sync",
    "unpin",
    "verify",
]


# Help


def test_these_are_the_commands() -> None:
    assert sorted(cli.commands) == COMMANDS


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, flag: str) -> None:
    result = ok(command, flag)

    assert "Example:" in result.stdout
    # The summary in the list of commands has no full stop.
    assert cli.commands[command].get_short_help_str(200)[-1] not in ".…"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command: str) -> None:
    options = [p for p in cli.commands[command].params if p.param_type_name == "option"]

    assert all(getattr(option, "help", None) for option in options)


@pytest.mark.parametrize("args", [["-h"], ["--help"]])
def test_help_lists_the_commands(args: list[str]) -> None:
    result = ok(*args)

    assert result.stderr == ""
    assert all(f"\n  {command} " in result.stdout for command in COMMANDS)


def test_command_alone_shows_the_help_and_no_error() -> None:
    result = invoke()

    assert "error" not in result.output
    assert "Usage: " in result.output


def test_version_is_told() -> None:
    assert __version__ in ok("--version").stdout


# Errors


@pytest.mark.parametrize(
    "args",
    [
        ["nosuch"],
        ["ls", "--nosuch"],
        ["ls", "extra"],
        ["rm"],
        ["pin", "key"],
        ["unpin"],
        ["show"],
        ["prune", "--max-size", "10XB"],
        ["prune", "--max-size", "-1"],
        ["prune", "--older-than", "5y"],
        ["prune", "--older-than", "soon"],
        ["build", "--max-size", "10XB"],
        ["build", "-s", "@missing.txt"],
        ["build", "-f", "missing.txt"],
        ["generate", "--messages", "missing.json"],
        ["generate", "--kv-bits", "1", "Hello"],
        ["generate", "--prefill-step-size", "0", "Hello"],
        ["generate", "--max-tokens", "many", "Hello"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line_and_2(args: list[str]) -> None:
    assert_fails(invoke(*args), 2)


@pytest.mark.parametrize(
    "args",
    [
        ["show", "3f9c"],
        ["rm", "3f9c"],
        ["rm", "-n", "3f9c"],
        ["rm", ""],
        ["pin", "3f9c", "name"],
        ["unpin", "name"],
    ],
    ids=" ".join,
)
def test_unknown_key_is_one_line_and_1(args: list[str], store: PrefixStore) -> None:
    assert_fails(invoke(*args), 1, "promptcache ls")


@pytest.mark.parametrize("command", ["ls", "prune", "verify", "show x", "rm x"])
def test_store_that_is_a_file_is_one_line(tmp_path: Path, command: str) -> None:
    path = tmp_path / "file"
    path.write_text("no folder")

    assert_fails(invoke(*command.split(), "--store", path), 2, "--store")


def test_store_of_the_environment_that_is_a_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("no folder")
    monkeypatch.setenv("PROMPTCACHE_DIR", str(path))

    assert_fails(invoke("ls"), 1, str(path))


@pytest.mark.parametrize("name", ["MAX_SIZE", "MIN_FREE", "DAILY_WRITES"])
@pytest.mark.parametrize("size", ["10XB", "9" * 400 + "TB"])
def test_size_of_the_environment_that_is_none_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, store: PrefixStore, name: str, size: str
) -> None:
    monkeypatch.setenv(f"PROMPTCACHE_{name}", size)

    assert_fails(invoke("ls"), 2, f"PROMPTCACHE_{name}: ", size)


def test_store_option_wins_over_the_environment(
    tmp_path: Path, store: PrefixStore
) -> None:
    with PrefixStore(tmp_path / "other") as other:
        key = segments.save(other, segments.tokens(10))

    assert ok("ls", "-q", "--store", tmp_path / "other").stdout == f"{key}\n"
    assert ok("ls", "-q").stdout == ""


# Path


def test_path_prints_the_folder_of_the_environment(tmp_path: Path) -> None:
    assert ok("path").stdout == f"{tmp_path / 'store'}\n"


def test_path_prints_the_folder_of_the_option(tmp_path: Path) -> None:
    assert ok("path", "--store", tmp_path / "x").stdout == f"{tmp_path / 'x'}\n"


def test_path_creates_nothing(tmp_path: Path) -> None:
    before = tree_hash(tmp_path)

    ok("path")

    assert tree_hash(tmp_path) == before


def test_path_of_a_home_folder_is_the_one_that_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    PrefixStore("~/mine").close()

    ok("ls", "--store", "~/mine")

    path = Path(ok("path", "--store", "~/mine").stdout.rstrip("\n"))
    assert path == tmp_path / "mine"
    assert path.is_dir()


# Speed


NUM_PREFIXES = 1000


@pytest.fixture(scope="module")
def big_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a thousand prefixes."""
    path = tmp_path_factory.mktemp("big") / "store"
    blobs = BlobFolder(path)
    blobs.files.create()
    for i in range(NUM_PREFIXES):
        token_ids = segments.tokens(40, first=1000 * i)
        key = Chain(segments.TINY.digest, token_ids).key_at(40)
        info = SegmentInfo(
            key, segments.TINY.digest, segments.TINY, 0, 40, True, float(i)
        )
        write_blob(blobs, info, segments.encoder(token_ids)(0, 40))
    # Faster than so many saves.
    with PrefixStore(path) as store:
        assert store.rebuilt == NUM_PREFIXES
    return path


IMPORTS = """
import sys
from promptcache_cli.main import cli
try:
    cli(sys.argv[1:])
finally:
    heavy = {"mlx", "mlx_lm", "transformers", "numpy", "rich", "sqlite3", "torch"}
    print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("args", [["--help"], ["ls"], ["prune", "-n"], ["path"]])
def test_housekeeping_imports_neither_mlx_nor_transformers(
    args: list[str], store: PrefixStore
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *args], capture_output=True, text=True
    )

    assert done.returncode == 0
    modules = set(json.loads(done.stderr.splitlines()[-1].replace("'", '"')))
    assert not modules & {"mlx", "mlx_lm", "transformers", "torch"}
    assert ("sqlite3" in modules) == (args[0] in ("ls", "prune"))


@pytest.mark.alone
@pytest.mark.parametrize("args", [["--help"], ["ls"], ["ls", "--json"]], ids=" ".join)
def test_command_answers_in_time_with_a_thousand_prefixes(
    big_store: Path, tmp_path: Path, args: list[str]
) -> None:
    # With bytecode, as people run it, and as often as a busy machine needs.
    env = {
        "PROMPTCACHE_DIR": str(big_store),
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPYCACHEPREFIX": str(tmp_path),
    }
    seconds = [math.inf]
    while min(seconds) >= 0.3 and len(seconds) < 10:
        started = time.perf_counter()
        process = start(*args, env=env)
        stdout, _ = process.communicate()
        seconds.append(time.perf_counter() - started)
        assert process.returncode == 0
        assert args == ["--help"] or stdout.count("\n") >= NUM_PREFIXES

    assert min(seconds) < 0.3


# Pipes and signals


@pytest.mark.parametrize("args", [["ls"], ["ls", "--json"], ["ls", "-q"]], ids=" ".join)
def test_reader_that_has_enough_gets_no_traceback(
    big_store: Path, args: list[str]
) -> None:
    process = start(*args, env={"PROMPTCACHE_DIR": str(big_store)})
    assert process.stdout is not None
    assert process.stderr is not None

    process.stdout.readline()
    process.stdout.close()

    stderr = process.stderr.read()
    assert process.wait() in (0, 1)
    assert "Traceback" not in stderr
    assert "Exception" not in stderr


def test_interrupted_build_exits_with_130_and_one_line_and_resumes(
    model_dir: Path, tmp_path: Path
) -> None:
    prompt = "x" * 6000
    args = ["build", "-m", model_dir, "--raw", prompt]
    process = start(*args, "--prefill-step-size", "10")
    blobs = tmp_path / "store" / "blobs"
    while len(list(blobs.rglob("*.safetensors"))) < 3:
        assert process.poll() is None
        time.sleep(0.02)

    process.send_signal(signal.SIGINT)

    stdout, stderr = process.communicate()
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.strip() == "promptcache: interrupted"
    built = json.loads(ok(*args, "--json").stdout)
    assert built["num_tokens"] == 6000
    assert 30 <= built["cached_tokens"] < 6000
    assert ok("verify").exit_code == 0


def test_times_are_iso_8601(tmp_path: Path) -> None:
    with PrefixStore() as store:
        segments.save(store, segments.tokens(10))

    prefix = json.loads(ok("ls", "--json").stdout)[0]

    for name in ("created_at", "used_at"):
        moment = datetime.fromisoformat(prefix[name])
        assert abs((datetime.now(UTC) - moment).total_seconds()) < 60
