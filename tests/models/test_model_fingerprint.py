"""The fingerprint changes when KV values could change, and only then."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.tuner.utils import linear_to_lora_layers

from promptcache import CachedGenerator, ModelError, PrefixStore
from promptcache.models.settings import DEFAULT_SETTINGS, Settings
from tests.helpers import tiny
from tests.helpers.adapters import LORA, save_adapter


@pytest.fixture
def copy_dir(model_dir: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(model_dir, folder)
    return folder


@pytest.fixture
def digest(store: PrefixStore) -> Callable[..., str]:
    """Return a function that loads a folder and fingerprints it."""

    def fingerprint(
        folder: Path, settings: Settings = DEFAULT_SETTINGS, **options: Any
    ) -> str:
        generator = CachedGenerator.load(folder, store=store, **options)
        return generator.fingerprint(settings).digest

    return fingerprint


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# Folders


def test_copy_touched_and_moved_has_the_same_fingerprint(
    model_dir: Path, copy_dir: Path, tmp_path: Path, digest: Callable[..., str]
) -> None:
    expected = digest(model_dir)

    assert digest(copy_dir) == expected
    for path in copy_dir.iterdir():
        os.utime(path, (1, 1))
    assert digest(copy_dir) == expected
    moved = copy_dir.rename(tmp_path / "elsewhere")
    assert digest(moved) == expected


def test_one_changed_byte_of_the_weights_changes_it(
    copy_dir: Path, digest: Callable[..., str]
) -> None:
    before = digest(copy_dir)
    path = copy_dir / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1

    path.write_bytes(data)

    assert digest(copy_dir) != before


@pytest.mark.parametrize(
    ("values", "is_changed"),
    [
        ({"rope_theta": 20000.0}, True),
        ({"rms_norm_eps": 1e-6}, True),
        ({"transformers_version": "9.9"}, False),
        ({"_name_or_path": "somewhere/else"}, False),
        ({"eos_token_id": 3}, False),
    ],
    ids=str,
)
def test_config_values_change_it_if_they_matter(
    copy_dir: Path,
    digest: Callable[..., str],
    values: dict[str, Any],
    is_changed: bool,
) -> None:
    before = digest(copy_dir)

    change_config(copy_dir, **values)

    assert (digest(copy_dir) != before) is is_changed


def test_tokenizer_and_template_do_not_matter(
    copy_dir: Path, digest: Callable[..., str]
) -> None:
    before = digest(copy_dir)

    tiny.save_tokenizer(copy_dir, "another {{ template }}")

    assert digest(copy_dir) == before


def test_adapter_changes_it(
    model_dir: Path, tmp_path: Path, digest: Callable[..., str]
) -> None:
    adapter = save_adapter(model_dir, tmp_path / "one", LORA)
    copied = save_adapter(model_dir, tmp_path / "two", LORA)
    scaled = save_adapter(
        model_dir,
        tmp_path / "three",
        {**LORA, "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.0}},
    )

    adapted = digest(model_dir, adapter_path=adapter)

    assert adapted != digest(model_dir)
    assert adapted == digest(model_dir, adapter_path=copied)
    assert adapted != digest(model_dir, adapter_path=scaled)


def test_model_with_an_adapter_finds_nothing_of_the_model_without(
    model_dir: Path, tmp_path: Path, store: PrefixStore
) -> None:
    adapter = save_adapter(model_dir, tmp_path / "adapter", LORA)
    prompt = list(range(50, 90))
    CachedGenerator.load(model_dir, store=store).build(prompt)
    adapted = CachedGenerator.load(model_dir, store=store, adapter_path=adapter)

    responses = list(adapted.stream_generate(prompt, 12))

    expected = mlx_lm.stream_generate(adapted.model, adapted.tokenizer, prompt, 12)
    assert responses[-1].cached_tokens == 0
    assert [r.token for r in responses] == [r.token for r in expected]


@pytest.mark.parametrize("missing", ["nowhere", "empty"])
def test_adapter_that_is_not_there_is_a_model_error(
    model_dir: Path, tmp_path: Path, store: PrefixStore, missing: str
) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(ModelError, match="adapter"):
        CachedGenerator.load(model_dir, store=store, adapter_path=tmp_path / missing)


def test_quantization_of_keys_and_values_changes_it(
    model_dir: Path, digest: Callable[..., str]
) -> None:
    settings = [
        DEFAULT_SETTINGS,
        Settings.of(kv_bits=8, kv_group_size=32, quantized_kv_start=0),
        Settings.of(kv_bits=4, kv_group_size=32, quantized_kv_start=0),
        Settings.of(kv_bits=8, kv_group_size=64, quantized_kv_start=0),
        Settings.of(kv_bits=8, kv_group_size=32, quantized_kv_start=100),
    ]

    digests = [digest(model_dir, wanted) for wanted in settings]

    assert len(set(digests)) == len(settings)


def test_settings_without_bits_are_one(
    model_dir: Path, digest: Callable[..., str]
) -> None:
    without = Settings.of(kv_bits=None, kv_group_size=32, quantized_kv_start=0)

    assert digest(model_dir, without) == digest(model_dir)


def test_namespace_changes_it(model_dir: Path, digest: Callable[..., str]) -> None:
    assert digest(model_dir, namespace="tenant") != digest(model_dir)


def test_dtype_changes_it(
    model_dir: Path, store: PrefixStore, digest: Callable[..., str]
) -> None:
    model, tokenizer = mlx_lm.load(str(model_dir))[:2]
    model.set_dtype(mx.float16)

    halved = CachedGenerator(model, tokenizer, store=store).fingerprint().digest

    model.set_dtype(mx.float32)
    assert CachedGenerator(model, tokenizer, store=store).fingerprint().digest != halved


# Models that came from no folder


@pytest.fixture
def wrapped(store: PrefixStore) -> Callable[..., str]:
    def fingerprint(model: Any, tokenizer: Any) -> str:
        return CachedGenerator(model, tokenizer, store=store).fingerprint().digest

    return fingerprint


def test_equal_models_without_a_folder_are_one(
    model_dir: Path, copy_dir: Path, wrapped: Callable[..., str]
) -> None:
    left, right = mlx_lm.load(str(model_dir))[:2], mlx_lm.load(str(copy_dir))[:2]

    assert wrapped(*left) == wrapped(*right)


def test_one_changed_weight_changes_a_model_without_a_folder(
    model_dir: Path, wrapped: Callable[..., str]
) -> None:
    model, tokenizer = mlx_lm.load(str(model_dir))[:2]
    before = wrapped(model, tokenizer)
    weight = model.model.layers[1].mlp.down_proj.weight

    weight[0, 0] = weight[0, 0] + 1e-3

    assert wrapped(model, tokenizer) != before


def test_arguments_change_a_model_without_a_folder(
    model_dir: Path, copy_dir: Path, wrapped: Callable[..., str]
) -> None:
    change_config(copy_dir, rope_theta=20000.0)
    left, right = mlx_lm.load(str(model_dir))[:2], mlx_lm.load(str(copy_dir))[:2]

    assert wrapped(*left) != wrapped(*right)


def test_lora_scale_changes_a_model_without_a_folder(
    model_dir: Path, wrapped: Callable[..., str]
) -> None:
    def adapted(scale: float) -> str:
        model, tokenizer = mlx_lm.load(str(model_dir))[:2]
        mx.random.seed(0)
        linear_to_lora_layers(model, 2, {"rank": 4, "scale": scale, "dropout": 0.0})
        return wrapped(model, tokenizer)

    assert adapted(20.0) == adapted(20.0)
    assert adapted(20.0) != adapted(10.0)


def test_training_mode_does_not_matter(
    model_dir: Path, wrapped: Callable[..., str]
) -> None:
    model, tokenizer = mlx_lm.load(str(model_dir))[:2]
    before = wrapped(model, tokenizer)

    model.eval()
    model.freeze()

    assert wrapped(model, tokenizer) == before


def test_model_without_a_folder_runs_warm(model_dir: Path, store: PrefixStore) -> None:
    model, tokenizer = mlx_lm.load(str(model_dir))[:2]
    generator = CachedGenerator(model, tokenizer, store=store)
    prompt = list(range(50, 90))

    generator.build(prompt)
    warm = list(generator.stream_generate(prompt, 12))

    expected = mlx_lm.stream_generate(model, tokenizer, prompt, 12)
    assert warm[-1].cached_tokens == 39
    assert [r.token for r in warm] == [r.token for r in expected]


def test_bare_tokenizer_of_transformers_can_be_wrapped(
    model_dir: Path, store: PrefixStore
) -> None:
    model, tokenizer = mlx_lm.load(str(model_dir))[:2]
    bare = CachedGenerator(model, tokenizer._tokenizer, store=store)

    text = bare.generate("Hello", max_tokens=8)

    expected = mlx_lm.generate(
        model, tokenizer._tokenizer, prompt="Hello", max_tokens=8
    )
    assert text == expected


# Loading


@pytest.mark.parametrize(
    "wanted", ["/no/such/model", "./nowhere", "~/nowhere", "a/b/c"]
)
def test_model_that_is_not_there_is_a_model_error(
    store: PrefixStore, wanted: str
) -> None:
    with pytest.raises(ModelError, match="not found"):
        CachedGenerator.load(wanted, store=store)


def test_folder_without_a_model_is_a_model_error(
    tmp_path: Path, store: PrefixStore
) -> None:
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        CachedGenerator.load(tmp_path, store=store)

    assert "\n" not in str(error.value)


def test_environment_names_the_model(
    model_dir: Path, store: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMPTCACHE_MODEL", str(model_dir))

    generator = CachedGenerator.load(store=store)

    assert generator.fingerprint().source == str(model_dir)
    assert generator.fingerprint().model == model_dir.name
