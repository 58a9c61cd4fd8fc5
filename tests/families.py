"""Random narrow models of every family at several shapes, and the demo model's weights in other families' form."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from toolchain.checkpoint.directory import copy_companions, open_checkpoint, write_config, write_weights

_COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 256, "initializer_range": 0.2,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MULTI_HEAD = {"num_key_value_heads": 4}
_TIED = {"tie_word_embeddings": True}
_OWN_HEAD_DIM = {"head_dim": 16}  # of 32 / 4 = 8
_BIASES = {"attention_bias": True, "mlp_bias": True}
# Windows far shorter than the tests' sequences, and layers of both kinds: sliding, full, sliding, full.
_ALTERNATING = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}
_SCALINGS: Mapping[str, Mapping[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip
_GRANITE = {
    "embedding_multiplier": 3.0, "logits_scaling": 2.5, "residual_multiplier": 0.4, "attention_multiplier": 0.2,
}  # fmt: skip
_LONG_ROPE = {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    },
}  # fmt: skip


def _scaled(kind: str) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **_SCALINGS[kind]}}


# Every shape that a family's published models have, or that its config allows and could go wrong.
VARIANTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "llama": {
        "grouped": {},
        "biased-tied": _BIASES | _TIED,
        "multi-head": _MULTI_HEAD | _OWN_HEAD_DIM,
        **{kind: _scaled(kind) for kind in _SCALINGS},
    },
    "mistral": {"grouped": {"sliding_window": None}, "sliding-tied": _OWN_HEAD_DIM | _TIED | {"sliding_window": 6}},
    "qwen2": {
        "grouped": {},
        "tied-multi-head": _TIED | _MULTI_HEAD,
        "own-head-dim": _OWN_HEAD_DIM,
        "alternating": {"use_sliding_window": True, **_ALTERNATING},
    },
    "qwen3": {
        "grouped": _OWN_HEAD_DIM,
        "biased-tied": {"head_dim": 8, "attention_bias": True} | _TIED | _MULTI_HEAD,
        "alternating": {"head_dim": 8, "use_sliding_window": True, **_ALTERNATING},
    },
    "phi3": {
        "grouped": {},
        "sliding-tied": _TIED | _MULTI_HEAD | {"sliding_window": 6},
        "longrope": _LONG_ROPE,
    },
    "granite": {"grouped": _GRANITE, "biased-tied": _GRANITE | _BIASES | _TIED | _MULTI_HEAD},
    "gemma3_text": {
        "alternating": {"head_dim": 16, "query_pre_attn_scalar": 16, **_ALTERNATING},
        "biased-untied": {
            "head_dim": 8, "query_pre_attn_scalar": 8, "attention_bias": True, "tie_word_embeddings": False,
            "final_logit_softcapping": 5.0, "sliding_window": 6,
        },
    },
}  # fmt: skip
EVERY_VARIANT = [(family, variant) for family, variants in VARIANTS.items() for variant in variants]


def make_family_pico(directory: Path, family: str, variant: str, **overrides: object) -> None:
    """Writes a random model in float32; norms and biases are random too, or nothing would show that they are there."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(_COMMON | VARIANTS[family][variant] | overrides))
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(directory)


def reexpress(source: Path, directory: Path, family: str) -> None:
    """Writes a Llama's weights as another family that computes the same: Mistral, Qwen2 or Phi-3."""
    llama = open_checkpoint(source)
    tensors: dict[str, torch.Tensor] = {}
    for name in llama.tensors:
        module = name.removesuffix(".weight")
        tensor = llama.read(name)
        if family == "phi3" and module.endswith((".q_proj", ".gate_proj")):
            first, rest, fused = ("q", "kv", "qkv") if module.endswith(".q_proj") else ("gate", ("up",), "gate_up")
            others = [llama.read(name.replace(f".{first}_proj", f".{other}_proj")) for other in rest]
            tensors[name.replace(f".{first}_proj", f".{fused}_proj")] = torch.cat([tensor, *others])
        elif family != "phi3" or not module.endswith((".k_proj", ".v_proj", ".up_proj")):
            tensors[name] = tensor
            if family == "qwen2" and module.endswith((".q_proj", ".k_proj", ".v_proj")):
                tensors[f"{module}.bias"] = torch.zeros(len(tensor), dtype=tensor.dtype)
    config = _config_as(dict(llama.config), family)
    directory.mkdir()
    write_config(directory, config)
    write_weights(directory, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}, tensors.__getitem__)
    copy_companions(source, directory)


def _config_as(llama: dict[str, Any], family: str) -> dict[str, Any]:
    plain = AutoConfig.for_model(family).to_dict()
    shared = {key: value for key, value in llama.items() if key in plain and key not in ("model_type", "architectures")}
    if "per_layer_config" in llama:
        shared["per_layer_config"] = llama["per_layer_config"]
    own: dict[str, dict[str, Any]] = {
        "mistral": {"sliding_window": None, "head_dim": llama.get("head_dim")},
        "qwen2": {"use_sliding_window": False, "layer_types": None},
        "phi3": {"original_max_position_embeddings": llama["max_position_embeddings"], "sliding_window": None},
    }
    architecture = {"mistral": "Mistral", "qwen2": "Qwen2", "phi3": "Phi3"}[family]
    pruned = "Pruned" if "per_layer_config" in llama else ""
    return shared | own[family] | {"model_type": family, "architectures": [f"{pruned}{architecture}ForCausalLM"]}
