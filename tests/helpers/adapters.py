"""LoRA adapters of tiny models."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

LORA = {
    "fine_tune_type": "lora",
    "num_layers": 2,
    "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0},
}


def save_adapter(model_dir: Path, folder: Path, config: dict[str, Any]) -> Path:
    """Save a LoRA adapter with random weights."""
    model = mlx_lm.load(str(model_dir))[0]
    model.freeze()
    linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"])
    mx.random.seed(4)
    weights = {
        name: mx.random.normal(array.shape)
        for name, array in tree_flatten(model.trainable_parameters())
    }
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
