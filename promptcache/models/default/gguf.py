"""GGUF files of Llama models, as MLX reads them, to normal MLX model folders.

MLX's reader unpacks quantized blocks to its own matrices, with float16 scales.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from promptcache.errors import ModelError

if TYPE_CHECKING:
    import mlx.core as mx
    from tokenizers import Tokenizer

GROUP_SIZE = 32  # values that share a scale in GGUF's Q4_0, Q4_1 and Q8_0 blocks
CONTROL = 3  # token_type of special tokens, `LLAMA_TOKEN_TYPE_CONTROL` in llama.cpp
MODULE_BY_GGUF_NAME = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
METADATA_BY_OPTION = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.rope.dimension_count",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
    "max_position_embeddings": "llama.context_length",
    "vocab_size": "llama.vocab_size",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
Metadata = dict[str, Any]
Weights = dict[str, "mx.array"]


def convert_gguf(gguf: Path, folder: Path, *, dequantize: bool) -> None:
    """Write a GGUF file's model into a folder: float32, or quantized with float16.

    Raises:
        ModelError: The file is not one of a Llama model with SmolLM's tokenizer.
        OSError: The folder cannot be written.
    """
    import mlx.core as mx

    try:
        loaded = mx.load(str(gguf), return_metadata=True)
        weights, metadata = cast(tuple[Weights, Metadata], loaded)
        write_model(weights, metadata, folder, dequantize=dequantize)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ModelError(f"{gguf} holds no model that is known ({error})") from error


def write_model(
    weights: Weights, metadata: Metadata, folder: Path, *, dequantize: bool
) -> None:
    """Write the model folder for a GGUF file's weights and metadata."""
    weights = llama_weights(weights, metadata)
    weights = to_float32(weights) if dequantize else to_float16(weights)
    _write_weights(folder / "model.safetensors", weights)
    _write_json(folder / "config.json", model_config(weights, metadata))
    build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(metadata))


def _write_weights(path: Path, weights: Weights) -> None:
    import mlx.core as mx

    mx.eval(weights)
    try:
        mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})
    except RuntimeError as error:  # so MLX tells that the disk is full
        raise OSError(f"{path}: {error}") from error


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def llama_weights(weights: Weights, metadata: Metadata) -> Weights:
    """Return the weights by mlx-lm's names, with rows in its order."""
    num_heads_by_name = {
        "q_proj": _number(metadata, "llama.attention.head_count"),
        "k_proj": _number(metadata, "llama.attention.head_count_kv"),
    }
    renamed = {llama_name(name): array for name, array in weights.items()}
    for name, rows in renamed.items():
        if num_heads := num_heads_by_name.get(name.split(".")[-2]):
            renamed[name] = unpermute(rows, int(num_heads))
    return renamed


def llama_name(name: str) -> str:
    """Return mlx-lm's name for a tensor: `blk.3.attn_q.scales` is layer 3's q_proj."""
    module, kind = name.rsplit(".", 1)
    if not module.startswith("blk."):
        return f"{MODULE_BY_GGUF_NAME[module]}.{kind}"
    _, layer, module = module.split(".")
    return f"model.layers.{layer}.{MODULE_BY_GGUF_NAME[module]}.{kind}"


def unpermute(rows: "mx.array", num_heads: int) -> "mx.array":
    """Undo llama.cpp's order of the query and key rows, also of scales and biases.

    llama.cpp rotates neighbouring rows of a head as pairs, mlx-lm row *i* with row
    *i + half* (`permute` in llama.cpp's convert_hf_to_gguf.py).
    """
    num_rows, num_columns = rows.shape
    pairs = rows.reshape(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return pairs.swapaxes(1, 2).reshape(num_rows, num_columns)


def to_float32(weights: Weights) -> Weights:
    """Return the weights dequantized: all float32, without scales and biases."""
    import mlx.core as mx

    return {
        name: _dequantized(weights, module).astype(mx.float32)
        for name in weights
        if (module := name.removesuffix(".weight")) != name
    }


def _dequantized(weights: Weights, module: str) -> "mx.array":
    import mlx.core as mx

    weight = weights[f"{module}.weight"]
    if f"{module}.scales" not in weights:
        return weight
    parts = (weights[f"{module}.{kind}"] for kind in ("scales", "biases"))
    scales, biases = (part.astype(mx.float32) for part in parts)
    bits = _bits(weights, module)
    return mx.dequantize(weight, scales, biases, group_size=GROUP_SIZE, bits=bits)


def to_float16(weights: Weights) -> Weights:
    """Return the weights with float16 norms, else activations become float32."""
    import mlx.core as mx

    return {
        name: array.astype(mx.float16) if array.dtype == mx.float32 else array
        for name, array in weights.items()
    }


def _bits(weights: Weights, module: str) -> int:
    num_words: int = weights[f"{module}.weight"].shape[-1]
    num_groups: int = weights[f"{module}.scales"].shape[-1]
    return 32 * num_words // (num_groups * GROUP_SIZE)


def model_config(weights: Weights, metadata: Metadata) -> dict[str, object]:
    """Return the `config.json` of the converted weights."""
    dtype = weights["model.norm.weight"].dtype
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "torch_dtype": str(dtype).removeprefix("mlx.core."),
        **{key: _number(metadata, name) for key, name in METADATA_BY_OPTION.items()},
    }
    if quantization := quantization_config(weights):
        config["quantization"] = quantization
    return config


def quantization_config(weights: Weights) -> dict[str, object]:
    """Return mlx-lm's `quantization`: the matrices' bits, named where not 4."""
    bits_by_module = {
        module: _bits(weights, module)
        for name in weights
        if (module := name.removesuffix(".scales")) != name
    }
    named: dict[str, object] = {
        module: {"group_size": GROUP_SIZE, "bits": bits}
        for module, bits in sorted(bits_by_module.items())
        if bits != 4
    }
    return {"group_size": GROUP_SIZE, "bits": 4, **named} if bits_by_module else {}


def _number(metadata: Metadata, name: str) -> int | float:
    value = metadata[name].item()
    # Floats are float32 in the file: 9.9999997e-06 was 1e-05.
    return value if isinstance(value, int) else float(f"{value:.6g}")


def build_tokenizer(metadata: Metadata) -> "Tokenizer":
    """Return SmolLM's tokenizer: byte-level BPE that splits single digits first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if (kind := metadata["tokenizer.ggml.pre"]) != "smollm":
        raise ModelError(f"a tokenizer of kind {kind!r} cannot be converted")
    tokenizer = Tokenizer(models.BPE(**_vocabulary(metadata)))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special_tokens(metadata))
    return tokenizer


def _vocabulary(metadata: Metadata) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    return {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}


def special_tokens(metadata: Metadata) -> list[str]:
    """Return the tokens that no text is ever split into."""
    types = metadata["tokenizer.ggml.token_type"].tolist()
    tokens = zip(metadata["tokenizer.ggml.tokens"], types, strict=True)
    return [token for token, kind in tokens if kind == CONTROL]


def tokenizer_config(metadata: Metadata) -> dict[str, object]:
    """Return the `tokenizer_config.json`, with the chat template."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    tokens = metadata["tokenizer.ggml.tokens"]
    named = {
        f"{short}_token": tokens[metadata[f"tokenizer.ggml.{name}_token_id"].item()]
        for short, name in names.items()
    }
    return {
        # Transformers 5 rebuilds others, without the splitting of digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": special_tokens(metadata),
        "model_max_length": _number(metadata, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }
