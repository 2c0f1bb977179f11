"""A real model that says what it is told to: each token is followed by one other.

Its attention writes keys and values as in any Llama, and adds nothing to them.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
from transformers import AutoTokenizer

from tests.helpers import tiny

CONFIG = {
    **tiny.LLAMA,
    "num_hidden_layers": 1,
    "hidden_size": 128,
    "tie_word_embeddings": False,
}


def save_model(folder: Path, says: Sequence[str], chat_template: str) -> Path:
    """Save a model that answers any chat with `says`, each a token of its own."""
    tiny.save_model(folder, CONFIG)
    tiny.save_tokenizer(folder, chat_template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([*says])
    tokenizer.save_pretrained(folder)
    said = ["<|assistant|>", *says, "<|end|>"]
    ids = tokenizer.convert_tokens_to_ids(said)
    _have_it_say(folder, dict(pairwise(ids)))
    return folder


def _have_it_say(folder: Path, next_id_by_id: Mapping[int, int]) -> None:
    file = str(folder / "model.safetensors")
    weights = mx.load(file)
    silent = [name for name in weights if "o_proj" in name or "down_proj" in name]
    weights |= {name: mx.zeros_like(weights[name]) for name in silent}
    embeddings = weights["model.embed_tokens.weight"]
    head = mx.zeros_like(weights["lm_head.weight"])
    for token_id, next_id in next_id_by_id.items():
        head[next_id] = head[next_id] + embeddings[token_id]
    weights["lm_head.weight"] = head
    mx.save_safetensors(file, weights, {"format": "mlx"})
