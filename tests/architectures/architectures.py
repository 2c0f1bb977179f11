"""Tiny random models of every architecture of mlx-lm, to test caching on each.

Nothing is downloaded: `build("qwen3_next")` makes the model from a config, and its
weights from a seed, in some milliseconds. Windows, indexers and compression are so
small that 100 tokens overflow them.
"""

import copy
import pkgutil
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

Config = dict[str, object]

# Each architecture takes the keys that it knows.
SHARED: Config = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # so that keys and values can be quantized in groups of 32
    "sliding_window": 32,
    "vocab_size": 512,
    "tie_word_embeddings": False,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "use_qk_norm": True,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_qkv_bias": False,
    # The multipliers of Granite and MiniCPM.
    "attention_multiplier": 0.18,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "dim_model_base": 64,
    "scale_depth": 1.4,
    "scale_emb": 1.0,
    # Mixtures of experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    # Latent attention and its indexer.
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "index_head_dim": 64,
    "index_n_heads": 2,
    "index_topk": 64,
    # Linear attention.
    "layer_group_size": 2,
    "group_norm_size": 2,
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    # State spaces.
    "state_size": 16,
    "ssm_state_size": 16,
    "n_groups": 1,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "time_step_rank": 4,
    "time_step_limit": [0.001, 100.0],
    "mamba_num_heads": 2,
    "mamba_n_heads": 2,
    "mamba_head_dim": 32,
    "mamba_d_head": 32,
    "mamba_d_ssm": 64,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
}

FULL: Config = {"layer_types": ["full_attention", "full_attention"]}
SLIDING: Config = {"layer_types": ["sliding_attention", "sliding_attention"]}
WINDOWED: Config = {"layer_types": ["sliding_attention", "full_attention"]}

DYNAMIC: Config = {
    # InternLM2 wants the one key, InternLM3 the other.
    "rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0},
    "max_position_embeddings": 128,
}
LONGROPE: Config = {
    "type": "longrope",
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 16,
    "long_factor": [2.0] * 16,
}
YARN: Config = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3_ROPE: Config = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
LLAMA4_ROPE: Config = {
    "rope_parameters": {
        "rope_theta": 10000.0,
        "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 64,
    }
}
ROPE_BY_TYPE: Config = {
    "rope_parameters": {
        "sliding_attention": {"rope_theta": 1000.0},
        "full_attention": {"rope_theta": 10000.0},
    }
}
DYNAMIC_BY_TYPE: Config = {
    "rope_parameters": {
        "sliding_attention": {"rope_theta": 1000.0},
        "full_attention": {
            "rope_theta": 10000.0,
            "rope_type": "dynamic",
            "factor": 2.0,
        },
    },
    "max_position_embeddings": 128,
}

DEEPSEEK_V41: Config = {
    "num_hidden_layers": 4,
    "o_groups": 2,
    "o_lora_rank": 32,
    "kv_source_layer_ids": [1, 3],
    "index_source_layer_ids": [1, 2, 3],
    "index_topk": 8,
    "compress_ratios": [0, 4, 4, 4],
    "candidate_source_layer_id": 1,
    "candidate_topk_blocks": 8,
    "candidate_block_size": 2,
}
GEMMA4: Config = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window_pattern": 2,
    "global_head_dim": 64,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 512,
}
GPT: Config = {
    "n_embd": 64,
    "n_head": 2,
    "n_layer": 2,
    "n_ctx": 1024,
    "n_positions": 1024,
    "n_inner": 128,
    "rotary_dim": 16,
}
KIMI: Config = {
    "linear_attn_config": {
        "num_heads": 2,
        "head_dim": 32,
        "short_conv_kernel_size": 4,
        "kda_layers": [1],  # counted from one
        "full_attn_layers": [2],
    },
    "model_max_length": 1024,
}
LFM2: Config = {
    "layer_types": ["conv", "full_attention"],
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "use_expert_bias": True,
    "num_dense_layers": 1,
}
LONGCAT: Config = {
    "num_layers": 2,
    "attention_method": "MLA",
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "ffn_hidden_size": 128,
    "expert_ffn_hidden_size": 32,
    "zero_expert_num": 1,
    "zero_expert_type": "identity",
}
MINIMAX_M3: Config = {
    "dense_intermediate_size": 128,
    "mlp_layer_types": ["dense", "sparse"],
    "layer_types": ["full_attention", "sparse_attention"],
    "index_n_heads": 1,
    "index_block_size": 8,
    "index_topk_blocks": 4,
}
NEMOTRON_NAS: list[Config] = [
    {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
    {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
    {"attention": {"no_op": True}, "ffn": {"replace_with_linear": True}},
]


def _text(**changes: object) -> Config:
    """Return the config of a model that wraps a text model."""
    return {"text_config": SHARED | changes}


# What the config of each model changes in the shared one.
CHANGES: dict[str, Config] = {
    "Klear": {},
    "afm7": {
        "hidden_dim": 64,
        "num_layers": 4,
        "num_kv_reuse_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
    },
    "afmoe": WINDOWED,
    "apertus": {"post_norm": True, "qk_norm": True},
    "baichuan_m1": {"conv_window": 2, "sliding_window_layers": [0]},
    "baichuan_m1/full": {"conv_window": 2, "sliding_window_layers": []},
    "baichuan_m1/sliding": {"conv_window": 2, "sliding_window_layers": [0, 1]},
    "bailing_hybrid": {},
    "bailing_moe": {},
    "bailing_moe_linear": {},
    "bailing_moe_v3": {"kda_lower_bound": -0.1},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0, "sliding_window_pattern": 2},
    "cohere2/full": {"logit_scale": 1.0, "sliding_window_pattern": 1},
    "dbrx": {
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 2,
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek": {},
    "deepseek_v2": {"rope_scaling": YARN},
    "deepseek_v3": {},
    "deepseek_v3/dynamic": DYNAMIC,
    "deepseek_v3/yarn": {"rope_scaling": YARN},
    "deepseek_v32": {},
    "deepseek_v41": DEEPSEEK_V41,
    "deepseek_v41/sliding": DEEPSEEK_V41
    | {
        "compress_ratios": [],
        "kv_source_layer_ids": [],
        "index_source_layer_ids": [],
        "candidate_source_layer_id": -1,
    },
    "deepseek_v41/uncompressed": DEEPSEEK_V41 | {"compress_ratios": [0, 1, 1, 1]},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone": {"num_layers": 2},
    "exaone4": {"sliding_window_pattern": "LG", "rope_scaling": None},
    "exaone4/full": {"sliding_window_pattern": None, "rope_scaling": None},
    "exaone_moe": WINDOWED | {"is_moe_layer": [False, True]},
    "exaone_moe/full": FULL | {"is_moe_layer": [False, True]},
    "exaone_moe/sliding": SLIDING | {"is_moe_layer": [False, True]},
    "falcon_h1": {},
    "falcon_h1/dynamic": DYNAMIC,
    "gear": {
        "num_hidden_layers": 3,
        "layer_types": ["conv_mixer", "sliding_attention", "full_attention"],
    },
    "gemma": {},
    "gemma2": {},
    "gemma3": _text(model_type="gemma3_text", sliding_window_pattern=2),
    "gemma3_text": {"sliding_window_pattern": 2},
    "gemma3_text/dynamic": DYNAMIC | {"sliding_window_pattern": 2},
    "gemma3_text/full": {"sliding_window_pattern": 1},
    "gemma3n": _text(
        model_type="gemma3n_text",
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_local_base_freq=1000.0,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=512,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        altup_num_inputs=2,
        altup_active_idx=0,
        altup_coef_clip=120.0,
        altup_correct_scale=True,
        laurel_rank=8,
        final_logit_softcapping=30.0,
    ),
    "gemma4": _text(model_type="gemma4_text", **GEMMA4),
    "gemma4_text": GEMMA4,
    "gemma4_text/sliding": GEMMA4 | {"layer_types": ["sliding_attention"] * 4},
    "gemma4_text/unshared": GEMMA4
    | {
        "num_kv_shared_layers": 0,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {"rope_scaling": None},
    "glm4_moe_lite": {},
    "glm_moe_dsa": {"rope_parameters": {"rope_theta": 10000.0}},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gpt_oss": WINDOWED,
    "gpt_oss/yarn": WINDOWED | {"rope_scaling": YARN},
    "gptj": GPT,
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "granitemoehybrid/attention": {"layer_types": ["attention", "attention"]},
    "granitemoehybrid/mamba": {"layer_types": ["mamba", "mamba"]},
    "helium": {},
    "hunyuan": {
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0},
    },
    "hunyuan_v1_dense": {},
    "internlm2": {},
    "internlm2/dynamic": DYNAMIC,
    "internlm3": {},
    "internlm3/dynamic": DYNAMIC,
    "iquestloopcoder": {"loop_window_size": 32},
    "iquestloopcoder/dynamic": DYNAMIC | {"loop_window_size": 32},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_k25": _text(),
    "kimi_k3": _text(**KIMI),
    "kimi_linear": KIMI,
    "kimi_vl": _text(),
    "laguna": WINDOWED,
    "laguna/dynamic": WINDOWED | DYNAMIC_BY_TYPE,
    "laguna/full": FULL,
    "lfm2": LFM2,
    "lfm2-vl": _text(model_type="lfm2", **LFM2),
    "lfm2_moe": LFM2,
    "lille-130m": GPT | {"n_kv_heads": 1, "block_size": 1024},
    "llama": {},
    "llama/dynamic": DYNAMIC,
    "llama/linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama/llama3": {"rope_scaling": LLAMA3_ROPE},
    "llama/longrope": {"rope_scaling": LONGROPE},
    "llama/windowed": WINDOWED,
    "llama/windowed-dynamic": WINDOWED | DYNAMIC,
    "llama/yarn": {"rope_scaling": YARN},
    "llama4": _text(
        model_type="llama4_text",
        num_hidden_layers=4,
        attention_chunk_size=32,
        floor_scale=64,
        rope_scaling=None,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        intermediate_size_mlp=128,
    ),
    "llama4_text": {"no_rope_layers": [1, 0], "intermediate_size_mlp": 128},
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": LONGCAT
    | {"ngram_vocab_size_ratio": 2, "emb_neighbor_num": 3, "emb_split_num": 2},
    "mamba": {},
    "mamba2": {"num_heads": 4},
    "mellum": WINDOWED | ROPE_BY_TYPE,
    "mellum/dynamic": WINDOWED | DYNAMIC_BY_TYPE,
    "mellum/full": FULL | ROPE_BY_TYPE,
    "mimo": {},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0],
        "sliding_window_size": 32,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 1,
        "swa_head_dim": 32,
        "swa_v_head_dim": 32,
        "swa_rope_theta": 1000.0,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "moe_layer_freq": [0, 1],
        "layernorm_epsilon": 1e-5,
    },
    "minicpm": {},
    "minicpm3": {"rope_scaling": LONGROPE},
    "minimax": {"rotary_dim": 16},
    "minimax_m3_vl": _text(**MINIMAX_M3),
    "minimax_m3_vl/full": _text(**MINIMAX_M3 | FULL),
    "ministral3": LLAMA4_ROPE,
    "ministral3/windowed": LLAMA4_ROPE | WINDOWED,
    "mistral3": _text(model_type="ministral3", **LLAMA4_ROPE),
    "mistral4": LLAMA4_ROPE,
    "mixtral": {},
    "muse_glimmer": WINDOWED,
    "muse_glimmer/full": FULL,
    "muse_glimmer/sliding": SLIDING,
    "nanbeige": {"num_loops": 2},
    "nanbeige/once": {"num_loops": 1},
    "nanochat": {},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {"num_hidden_layers": 3, "block_configs": NEMOTRON_NAS},
    "nemotron-nas/linear-first": {"block_configs": NEMOTRON_NAS[1::-1]},
    "nemotron_h": {"hybrid_override_pattern": ["M", "-", "*", "E"]},
    "olmo2": {},
    "olmo3": WINDOWED,
    "olmo3/dynamic": WINDOWED | DYNAMIC,
    "olmo_hybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_allow_neg_eigval": True,
    },
    "olmo_hybrid/linear": {
        "layer_types": ["linear_attention", "linear_attention"],
        "linear_allow_neg_eigval": True,
    },
    "olmoe": {},
    "openelm": {
        "num_transformer_layers": 2,
        "model_dim": 64,
        "num_query_heads": [2, 4],
        "num_kv_heads": [1, 2],
        "ffn_multipliers": [1.0, 2.0],
        "ffn_dim_divisor": 32,
    },
    "phi": {},
    "phi3": {},
    "phi3/longrope": {"rope_scaling": LONGROPE, "partial_rotary_factor": 1.0},
    "phi3small": {
        "vocab_size": 100352,  # it masks token ids of its own vocabulary
        "dense_attention_every_n_layers": 2,
        "blocksparse_block_size": 32,
        "blocksparse_num_local_blocks": 2,
        "blocksparse_vert_stride": 2,
        "ff_intermediate_size": 128,
        "gegelu_limit": 20.0,
        "mup_embedding_multiplier": 0.2,
        "mup_width_multiplier": 1.0,
    },
    "phimoe": {},
    "phimoe/longrope": {
        "rope_scaling": LONGROPE | {"short_mscale": 1.0, "long_mscale": 1.2}
    },
    "phixtral": {
        "num_vocab": 512,
        "model_dim": 64,
        "num_heads": 2,
        "num_layers": 2,
        "rotary_dim": 16,
    },
    "pixtral": _text(model_type="llama"),
    "plamo": {"n_shared_head": 2},
    "plamo2": {"hidden_size_per_head": 32},
    "plamo2/attention": {"hidden_size_per_head": 32, "mamba_enabled": False},
    "plamo3": {"sliding_window_pattern": 2},
    "plamo3/full": {"sliding_window_pattern": 1},
    "plamo3/sliding": {"sliding_window_pattern": 3},
    "prism_hadamard_qwen35": _text(intermediate_size=512, num_experts=0)
    | {
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {
                "path": "model.layers.0.mlp.down_proj",
                "embedding": False,
                "dtype": "float16",
                "block": 512,
            }
        ],
    },
    "qwen": {"kv_channels": 32},
    "qwen2": {},
    "qwen2/dynamic": DYNAMIC,
    "qwen2_moe": {},
    "qwen2_vl": _text(model_type="qwen2"),
    "qwen3": {},
    "qwen3/dynamic": DYNAMIC,
    "qwen3_5": _text(num_experts=0),
    "qwen3_5_moe": _text(),
    "qwen3_moe": {},
    "qwen3_next": {},
    "qwen3_next/dynamic": DYNAMIC,
    "qwen3_vl": _text(model_type="qwen3"),
    "qwen3_vl_moe": _text(model_type="qwen3_moe"),
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"],
        "attention_window_size": 32,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
    },
    "rwkv7": {
        "a_low_rank_dim": 16,
        "v_low_rank_dim": 16,
        "gate_low_rank_dim": 16,
        "decay_low_rank_dim": 16,
    },
    "seed_oss": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "solar_open": {},
    "spark2_5": WINDOWED | ROPE_BY_TYPE,
    "spark2_5/full": FULL | ROPE_BY_TYPE,
    "spark2_5/sliding": SLIDING | ROPE_BY_TYPE,
    "stablelm": {},
    "starcoder2": {},
    "step3p5": WINDOWED | {"num_attention_groups": 1, "share_expert_dim": 32},
    "step3p5/full": FULL | {"num_attention_groups": 1, "share_expert_dim": 32},
    "step3p5/sliding": SLIDING | {"num_attention_groups": 1, "share_expert_dim": 32},
    "talkie": {},
    "telechat3": {},
    "youtu_llm": {},
}

CONFIGS: dict[str, Config] = {
    name: SHARED | {"model_type": name.split("/")[0]} | changes
    for name, changes in CHANGES.items()
}

UNBUILDABLE: dict[str, str] = {
    "bitnet": "Its linear layers exist only as a Metal kernel.",
    "muse_spark": "Its norms and its rope exist only as Metal kernels.",
    "olmo": "It needs the package ai2-olmo, and fails on two tokens at once.",
}

# Larger weights make attention look at single tokens, so that a change of the others
# would not show; with smaller ones the models answer the same token again and again.
SCALE = 0.15

# Around these values a state keeps most of what it holds from token to token.
DECAYS = {
    "A_log": -2.0,
    "dt_bias": -2.0,
    "dt_proj.bias": -2.0,
    "recurrent_param": -4.0,
    "w_lora.lora.2.bias": -4.0,
}


def architectures() -> list[str]:
    """Return the modules of mlx-lm that define or import `Model` and `ModelArgs`."""
    found = []
    for module in pkgutil.iter_modules(mlx_lm.models.__path__):
        source = Path(mlx_lm.models.__path__[0], f"{module.name}.py").read_text()
        if all(
            re.search(rf"^(class|from \S+ import) .*\b{name}\b", source, re.MULTILINE)
            for name in ("Model", "ModelArgs")
        ):
            found.append(module.name)
    return found


def build(name: str, *, seed: int = 0) -> Any:
    """Return the model of this name, with random weights that the seed determines."""
    config = copy.deepcopy(CONFIGS[name])  # some architectures write into theirs
    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(config))
    parameters = sorted(tree_flatten(model.parameters()))
    model.update(tree_unflatten([(path, _random(path, v)) for path, v in parameters]))
    model.eval()
    mx.eval(model.parameters())
    return model


def _random(path: str, value: mx.array) -> mx.array:
    """Return random values for the parameter, or the parameter itself if integer."""
    if not mx.issubdtype(value.dtype, mx.floating):
        return value
    noise = mx.random.normal(value.shape)
    center = next((c for end, c in DECAYS.items() if path.endswith(end)), None)
    if center is not None:
        result = center + 0.1 * noise
    elif value.ndim > 1:
        result = SCALE * noise
    else:
        result = value + 0.1 * noise  # norms stay near one, biases near zero
    return result.astype(value.dtype)
