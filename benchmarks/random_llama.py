"""Llama models with random weights, saved as normal model folders.

They read at the speed of real ones of their shape, and answer nonsense.
"""

import json
import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs

from promptcache.models.default.download import ensure_default_model

SMOLLM2_VOCABULARY = 49_152
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

LLAMA_1B = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
}
# 128 KiB of keys and values a token in bfloat16.
LLAMA_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
}
# SmolLM2-135M's keys and values, and little else.
NARROW = {
    "hidden_size": 192,
    "num_hidden_layers": 30,
    "intermediate_size": 64,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": SMOLLM2_VOCABULARY,
}
SHARED = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}


def make_random_llama(
    folder: Path, shape: dict[str, int], dtype: mx.Dtype = mx.float32
) -> Path:
    """Save a model with SmolLM2's tokenizer; return the folder."""
    config = SHARED | shape
    folder.mkdir(parents=True)
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    embedding = model.model.embed_tokens
    # The tokenizer has no words for tokens beyond, so they get no likely logits.
    rows = mx.arange(shape["vocab_size"])[:, None] < SMOLLM2_VOCABULARY
    embedding.weight = mx.where(rows, embedding.weight, mx.zeros_like(embedding.weight))
    parameters = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(
        str(folder / "model.safetensors"), parameters, metadata={"format": "mlx"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER_FILES:
        shutil.copy(ensure_default_model() / name, folder)
    return folder
