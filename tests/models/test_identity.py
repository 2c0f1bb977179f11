"""A model has one identity, in whatever way it was loaded and until it changes."""

import json
import shutil
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import xxhash
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

from promptcache import CachedGenerator, ModelError, PrefixStore
from promptcache.models.identity import array_digests
from promptcache.models.identity.array_digests import ArrayDigests
from promptcache.models.identity.identity import IdentifiedModel, identify
from promptcache.models.identity.module_tree import Snapshot, describe, plain
from promptcache.models.load import load
from tests.architectures import architectures
from tests.helpers import tiny
from tests.helpers.adapters import LORA, save_adapter
from tests.helpers.commands import ok, start
from tests.helpers.marks import all_but

PROMPT = list(range(50, 90))


@pytest.fixture
def model(model_dir: Path) -> Any:
    return mlx_lm.load(str(model_dir))[0]


# One identity for all ways of loading


@pytest.mark.parametrize("options", [{}, {"lazy": True}], ids=["eager", "lazy"])
def test_folder_its_copy_and_a_model_in_hand_are_one(
    model_dir: Path, tmp_path: Path, model: Any, options: dict[str, Any]
) -> None:
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))

    expected = identify(model).parts

    assert load(model_dir, **options)[2].parts == expected
    assert load(copy, **options)[2].parts == expected


def test_model_in_hand_finds_what_another_process_has_built(
    model_dir: Path, tmp_path: Path, store: PrefixStore
) -> None:
    adapter = save_adapter(model_dir, tmp_path / "adapter", LORA)
    options = ["--raw", "Once upon a time", "-m", model_dir]
    ok("build", *options)
    process = start("build", *options, "--adapter-path", adapter)
    assert process.wait() == 0, process.communicate()

    for path in (None, str(adapter)):
        loaded = mlx_lm.load(str(model_dir), adapter_path=path)
        generator = CachedGenerator(*loaded[:2], store=store)
        match = generator.match("Once upon a time, there was")
        assert match.cached_tokens >= len(generator.render("Once upon a").token_ids)
        assert store.report(match.key or "").fingerprint.source == str(model_dir)


def test_model_that_came_from_nowhere_leaves_the_name_of_its_folder(
    model_dir: Path, model: Any, store: PrefixStore
) -> None:
    loaded = CachedGenerator.load(model_dir, store=store)
    in_hand = CachedGenerator(model, loaded.tokenizer, store=store)

    loaded.build(PROMPT)
    key = in_hand.build([*PROMPT, *PROMPT]).key

    report = store.report(key)
    assert report.fingerprint.model == model_dir.name
    assert report.fingerprint.source == str(model_dir)


def test_what_differs_is_told_of_two_models_of_one_name(
    model_dir: Path, tmp_path: Path, store: PrefixStore
) -> None:
    config = {**tiny.LLAMA, "rope_theta": 5000.0}
    other = tiny.save_model(tmp_path / "other", config, seed=3)
    for folder in (model_dir, other):
        model, tokenizer = mlx_lm.load(str(folder))[:2]
        generator = CachedGenerator(model, tokenizer, store=store)
        if folder == model_dir:
            generator.build(PROMPT)

    divergence = generator.explain(PROMPT).divergence

    assert divergence is not None
    assert divergence.culprit == "other weights and config"


def test_own_source_counts_in_whatever_folder(model_dir: Path, tmp_path: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    source = "from mlx_lm.models import llama\n\n\nclass ModelArgs(llama.ModelArgs):\n"
    source += (
        "    pass\n\n\nclass Model(llama.Model):\n    def own(self):\n        pass\n"
    )
    found = []
    for name, text in (("a", source), ("b", source), ("c", f"{source}# other\n")):
        folder = Path(shutil.copytree(model_dir, tmp_path / name))
        (folder / "model.py").write_text(text)
        changed = {**config, "model_file": "model.py"}
        (folder / "config.json").write_text(json.dumps(changed))
        found.append(load(folder, trust_remote_code=True)[2].parts)

    assert found[0] == found[1]
    differing = [part for part in found[0] if found[0][part] != found[2][part]]
    assert differing == ["implementation"]


def test_order_of_modules_does_not_matter(model: Any) -> None:
    before = identify(model)

    for module in model.modules():
        items = list(module.items())
        module.clear()
        module.update({}) if not items else dict.update(module, reversed(items))

    assert identify(model) == before


@pytest.mark.parametrize(
    ("name", "dtype"),
    all_but(
        [("gemma3n", mx.bfloat16), ("longcat_flash_ngram", mx.float32)],
        [
            ("gemma3n", mx.bfloat16),
            ("gemma3n", mx.float32),
            ("plamo3", mx.bfloat16),
            ("kimi_k3", mx.float32),
            ("longcat_flash_ngram", mx.float32),
        ],
    ),
    ids=str,
)
def test_what_models_note_while_they_run_does_not_matter(
    name: str, dtype: mx.Dtype
) -> None:
    model = architectures.build(name)
    model.set_dtype(dtype)
    identified = IdentifiedModel(model)
    before = identified.identity

    cache = make_prompt_cache(model)
    for tokens in ([1, 2, 3, 4, 5, 6, 7, 8], [9]):
        mx.eval(model(mx.array([tokens]), cache=cache))

    assert identified.identity == before
    assert identified.is_current()
    assert identify(model) == before


def test_wrapper_of_a_model_is_identified_by_what_it_wraps(model: Any) -> None:
    class Wrapper:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

    wrapper = IdentifiedModel(Wrapper())
    before = wrapper.identity

    assert before.parts["weights"] == identify(model).parts["weights"]
    assert before != identify(model)
    model.set_dtype(mx.float16)
    assert wrapper.identity != before


def test_what_is_no_module_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="no module of MLX"):
        identify(object())


def test_plain_values_are_the_same_in_every_process() -> None:
    class Odd:
        pass

    odd = {"b": {"x", "y"}, "a": [Odd(), plain, np.float32(1.5), np.arange(2)], 3: None}

    text = json.dumps(plain({"eos_token_id": 1, **odd}))

    assert "0x" not in text
    assert text == json.dumps(plain(odd))
    assert plain(np.arange(2)) != plain(np.arange(1, 3))


# Changes in memory


def replace_one(model: Any, folder: Path) -> None:
    weight = model.model.layers[1].mlp.down_proj.weight
    model.update({"model": {"embed_tokens": {"weight": -weight_of(model)}}})
    assert model.model.layers[1].mlp.down_proj.weight is weight


def weight_of(model: Any) -> mx.array:
    weight: mx.array = model.model.embed_tokens.weight
    return weight


def load_others(model: Any, folder: Path) -> None:
    other = tiny.save_model(folder / "other", tiny.LLAMA, seed=7)
    model.load_weights(str(other / "model.safetensors"))


def adapt(model: Any, folder: Path) -> None:
    from mlx_lm.utils import load_adapters

    base = tiny.save_model(folder / "base", tiny.LLAMA)
    load_adapters(model, str(save_adapter(base, folder / "adapter", LORA)))


def quantize(model: Any, folder: Path) -> None:
    nn.quantize(model, group_size=32, bits=4)


def halve(model: Any, folder: Path) -> None:
    model.set_dtype(mx.float16)


def add_lora(model: Any, folder: Path) -> None:
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 20.0, "dropout": 0.0})
    for layer in model.model.layers:
        layer.self_attn.q_proj.lora_b = mx.ones((4, 128))


def stretch(model: Any, folder: Path) -> None:
    for layer in model.model.layers:
        layer.self_attn.rope.scale = 0.25


def replace_rope(model: Any, folder: Path) -> None:
    scale_rope(model, 8.0)


def scale_rope(model: Any, factor: float) -> None:
    from mlx_lm.models.rope_utils import initialize_rope

    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    for layer in model.model.layers:
        rope = initialize_rope(32, 10000.0, False, scaling, 32768)
        layer.self_attn.rope = rope


def drop_layer(model: Any, folder: Path) -> None:
    model.model.layers.pop()


def change_argument(model: Any, folder: Path) -> None:
    model.args.tie_word_embeddings = False
    model.lm_head = nn.Linear(64, 512, bias=False)


CHANGES = [replace_one, load_others, adapt, quantize, halve, add_lora, stretch]
CHANGES += [replace_rope, drop_layer, change_argument]


@pytest.mark.parametrize(
    ("change", "memory_limit"),
    [*((change, 0) for change in CHANGES), (load_others, 10**9), (stretch, 10**9)],
)
def test_changed_model_reuses_nothing_and_leaves_what_is_there(
    model_dir: Path,
    tmp_path: Path,
    store: PrefixStore,
    change: Callable[[Any, Path], None],
    memory_limit: int,
) -> None:
    model, tokenizer = mlx_lm.load(str(model_dir))[:2]
    generator = CachedGenerator(
        model, tokenizer, store=store, save=True, memory_limit=memory_limit
    )
    tokens_of(generator, PROMPT)

    change(model, tmp_path)
    changed = tokens_of(generator, PROMPT)

    assert changed == (0, plainly(model, tokenizer))
    assert tokens_of(generator, PROMPT)[0] >= len(PROMPT) - 1
    original = CachedGenerator.load(model_dir, store=store)
    again = tokens_of(original, PROMPT)
    assert again == (len(PROMPT) - 1, plainly(original.model, tokenizer))


def tokens_of(generator: CachedGenerator, prompt: list[int], **options: Any) -> Any:
    found = list(generator.stream_generate(prompt, 8, **options))
    return found[-1].cached_tokens, [r.token for r in found]


def plainly(model: Any, tokenizer: Any, **options: Any) -> list[int]:
    found = mlx_lm.stream_generate(model, tokenizer, PROMPT, 8, **options)
    return [r.token for r in found]


@pytest.mark.parametrize("change", [load_others, stretch])
def test_changed_draft_model_reuses_nothing(
    model_dir: Path,
    tmp_path: Path,
    store: PrefixStore,
    change: Callable[[Any, Path], None],
) -> None:
    generator = CachedGenerator.load(model_dir, store=store, save=True)
    draft = generator.load_draft(model_dir)
    tokens_of(generator, PROMPT, draft_model=draft)
    assert tokens_of(generator, PROMPT, draft_model=draft)[0] == len(PROMPT) - 1

    change(draft, tmp_path)

    assert tokens_of(generator, PROMPT, draft_model=draft)[0] == 0


def test_equal_weights_are_the_same_model_again(model: Any) -> None:
    identified = IdentifiedModel(model)
    before = identified.identity

    model.update({"model": {"embed_tokens": {"weight": weight_of(model) + 0}}})
    model.train()
    model.freeze()

    assert not identified.is_current()
    assert identified.identity == before
    assert identified.is_current()


def test_ropes_that_differ_in_a_private_array_are_other_models(model: Any) -> None:
    identified = IdentifiedModel(model)
    scale_rope(model, 8.0)
    before = identified.identity

    scale_rope(model, 4.0)

    assert identified.identity != before


def test_only_what_was_replaced_is_hashed_again(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []
    batches = array_digests._batches

    def count(arrays: list[Any]) -> Any:
        hashed.append(len(arrays))
        return batches(arrays)

    monkeypatch.setattr(array_digests, "_batches", count)
    identified = IdentifiedModel(model)
    before, old = identified.identity, weight_of(model)

    model.update({"model": {"embed_tokens": {"weight": -old}}})
    assert identified.identity != before
    stretch(model, Path())
    assert identified.identity != before

    assert hashed == [len(tree_flatten(model.parameters())), 1]


def test_known_weights_are_not_hashed_when_only_an_attribute_changes(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, identity = load(model_dir)
    identified = IdentifiedModel(model, identity)
    monkeypatch.setattr(ArrayDigests, "of", None)

    stretch(model, Path())

    parts = identified.identity.parts
    assert parts["weights"] == identity.parts["weights"]
    assert parts["modules"] != identity.parts["modules"]
    assert identified.identity.name == identity.name


def test_array_changed_in_place_is_noticed_when_it_is_told(
    model_dir: Path, store: PrefixStore
) -> None:
    generator = CachedGenerator.load(model_dir, store=store, save=True)
    draft = generator.load_draft(model_dir)

    for changed, options in ((generator.model, {}), (draft, {"draft_model": draft})):
        tokens_of(generator, PROMPT, **options)
        weight_of(changed)[50:90] = 1.0
        assert tokens_of(generator, PROMPT, **options)[0] > 0
        generator.refresh_identity()
        assert tokens_of(generator, PROMPT, **options)[0] == 0


def test_nothing_is_saved_of_a_prompt_during_which_the_model_changes(
    model_dir: Path, store: PrefixStore
) -> None:
    generator = CachedGenerator.load(
        model_dir, store=store, save=True, memory_limit=10**9
    )

    stream = generator.stream_generate(PROMPT, 8, save_answer=True)
    next(stream)
    halve(generator.model, Path())
    with pytest.warns(match="not saved: the model has changed meanwhile"):
        list(stream)

    assert store.prefixes() == []
    original = CachedGenerator.load(model_dir, store=store)
    assert tokens_of(original, PROMPT)[0] == 0
    assert tokens_of(generator, PROMPT)[0] == 0


def test_build_during_which_the_model_changes_fails(
    model_dir: Path, store: PrefixStore
) -> None:
    generator = CachedGenerator.load(model_dir, store=store)

    def change(done: int, total: int) -> None:
        if done == 16:
            halve(generator.model, Path())

    with pytest.raises(ModelError, match="has changed"):
        generator.build(PROMPT, prefill_step_size=16, prompt_progress_callback=change)

    assert (
        CachedGenerator.load(model_dir, store=store).match(PROMPT).cached_tokens <= 16
    )


def test_model_that_cannot_be_identified_generates_without_the_store(
    model_dir: Path, store: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = mlx_lm.load(str(model_dir))[:2]

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(ArrayDigests, "of", fail)
    generator = CachedGenerator(model, tokenizer, store=store)
    with pytest.warns(match="cannot be identified: no memory"):
        found = tokens_of(generator, PROMPT)

    assert found == (0, plainly(model, tokenizer))


def test_old_arrays_are_not_kept(model_dir: Path) -> None:
    model, _, identity = load(model_dir)
    identified = IdentifiedModel(model, identity)
    assert identified.is_current()
    old = weakref.ref(weight_of(model))

    quantize(model, Path())
    mx.eval(model.parameters())

    assert old() is None


@pytest.mark.alone
@pytest.mark.parametrize("num_layers", [30, 64])
def test_change_is_noticed_in_under_2_ms(num_layers: int) -> None:
    from mlx_lm.utils import _get_classes

    config = {**tiny.LLAMA, "num_hidden_layers": num_layers}
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    nn.quantize(model, group_size=32, bits=4)
    snapshot = Snapshot(model, describe(model).arrays)

    def check() -> float:
        start = time.perf_counter()
        assert snapshot.is_of(model)
        return time.perf_counter() - start

    assert min(check() for _ in range(10)) < 0.002
    model.model.layers[-1].mlp.up_proj.scales = mx.zeros((1,))
    assert not snapshot.is_of(model)


# Digests of arrays


DTYPES = [mx.bfloat16, mx.float16, mx.float32, mx.uint32, mx.uint8, mx.int8, mx.bool_]


@pytest.mark.parametrize("dtype", [*DTYPES, mx.complex64, mx.int64], ids=str)
def test_digest_is_of_the_bytes_in_order(dtype: mx.Dtype) -> None:
    array = mx.random.randint(0, 100, (6, 5)).astype(dtype)
    digests = ArrayDigests(print)

    content = bytes(memoryview(mx.contiguous(array).reshape(-1).view(mx.uint8)))
    expected = xxhash.xxh3_128_digest(xxhash.xxh3_128_digest(content))

    views = [array, array.T.astype(dtype).T, mx.concatenate([array, array])[:6]]
    assert digests.of(views) == [expected] * 3
    transposed = ArrayDigests(print).of([array.T])
    assert transposed != [expected] or dtype == mx.bool_


def test_scalars_and_empty_arrays_have_digests() -> None:
    arrays = [mx.array(1.0), mx.array(2.0), mx.zeros((0, 3))]

    assert len(set(ArrayDigests(print).of(arrays))) == 3


def test_large_array_is_hashed_in_pieces_and_told_of_if_it_takes_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    array, told = mx.arange(1000), list[str]()
    monkeypatch.setattr(array_digests, "PIECE_NBYTES", 64)
    monkeypatch.setattr(array_digests, "BATCH_NBYTES", 128)
    monkeypatch.setattr(array_digests, "LONG_SECONDS", -1.0)

    first, other = ArrayDigests(told.append).of([array, array + 1])

    pieces = [bytes(memoryview(array))[i : i + 64] for i in range(0, 4000, 64)]
    expected = b"".join(map(xxhash.xxh3_128_digest, pieces))
    assert first == xxhash.xxh3_128_digest(expected) != other
    assert told == ["hashing 0.0 GB of weights"]
