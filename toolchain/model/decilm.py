"""A checkpoint in DeciLM's form, which servers read without a plugin: config, tensors, and the config class it needs.

``model_type`` is ``nemotron-nas`` and the architecture ``DeciLMForCausalLM``: Llama's layers, each with an entry in
``block_configs`` that leaves out attention or FFN (``no_op``) or says how wide the FFN is. vLLM takes the width from
``intermediate_size`` as it is. llama.cpp's converter knows ``ffn_mult`` alone, which it rounds up to a multiple of 256;
so that is written only where llama.cpp then computes the same. Where it is missing, the converter stops.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from toolchain.architecture.families import FAMILIES, NEMOTRON_NAS
from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import Checkpoint, TensorInfo, dtype_name
from toolchain.errors import SenteiError
from toolchain.json_files import read_json_object
from toolchain.model.loading import check_complete

ARCHITECTURE = "DeciLMForCausalLM"
CONFIG_CLASS_FILE = "configuration_decilm.py"
AUTO_MAP = {"AutoConfig": "configuration_decilm.DeciLMConfig"}
_COPIED_KEYS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "original_max_position_embeddings", "rms_norm_eps", "rope_parameters",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
# To the next multiple of this both vLLM and llama.cpp's converter round a width that is given as ffn_mult.
_FFN_MULTIPLE = 256


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A tensor of this form: some rows of a stored one, which may be all.

    Attributes:
        source: Name of the stored tensor.
        start: The first row.
        shape: Of the rows.
        dtype: As stored.
    """

    source: str
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        """Reads them."""
        return checkpoint.read(self.source)[self.start : self.start + self.shape[0]].contiguous()


@dataclass(frozen=True, kw_only=True)
class NasForm:
    """A checkpoint in this form.

    Attributes:
        config: ``config.json``.
        tensors: What each tensor is in the checkpoint, by its name in this form.
        llama_cpp_obstacle: Why llama.cpp cannot have it, in words; ``None`` if it can.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Rows]
    llama_cpp_obstacle: str | None


def config_class_source() -> bytes:
    """The file that ``trust_remote_code`` makes a server run. sentei writes and compares it, and never runs it."""
    return Path(__file__).with_name(CONFIG_CLASS_FILE).read_bytes()


def is_nemotron_nas(directory: Path) -> bool:
    """Whether a directory holds a model in this form."""
    try:
        return read_json_object(directory / "config.json").get("model_type") == NEMOTRON_NAS
    except SenteiError:
        return False


def nas_form(checkpoint: Checkpoint) -> NasForm:
    """Expresses a checkpoint in this form; reads no weights.

    Raises:
        SenteiError: The form has no place for something that the model computes, or layer 0 has no attention.
    """
    where, family = f"{checkpoint.directory}:", checkpoint.family
    if family.unlike_llama:
        fitting = ", ".join(sorted(name for name, each in FAMILIES.items() if not each.unlike_llama))
        raise SenteiError(
            f"{where} model_type {family.model_type!r} has {family.unlike_llama}, for which {ARCHITECTURE} has no "
            "place.",
            f"Serve it with the plugin (sentei export vllm). This form fits {fitting}.",
        )
    if not checkpoint.layout[0].attention:
        raise SenteiError(
            f"{where} layer 0 has no attention, and in vLLM's {ARCHITECTURE} the residual stream begins with it.",
            "Put it back (in plan.json, layer 0, attention: keep; then sentei apply), prune with --protect "
            "attention:0, or serve with the plugin (sentei export vllm).",
        )
    config = check_complete(checkpoint).config
    # Only what the family's config class declares: of anything else in config.json Transformers takes no notice.
    known = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}
    # Which Qwen2's does not declare, and its attention follows all the same.
    known["head_dim"] = getattr(config, "head_dim", None)
    if known["hidden_act"] != "silu":
        raise SenteiError(
            f"{where} hidden_act is {known['hidden_act']!r}, and {ARCHITECTURE} computes 'silu' alone.",
            "Serve it with the plugin (sentei export vllm).",
        )
    tensors = dict(_tensors(checkpoint, tied=config.tie_word_embeddings))
    written = _config(checkpoint, known, tensors)
    obstacle = _llama_cpp_obstacle(written, checkpoint.layout)
    written["block_configs"] = [_block(layer, written, with_ffn_mult=obstacle is None) for layer in checkpoint.layout]
    return NasForm(config=written, tensors=tensors, llama_cpp_obstacle=obstacle)


def _tensors(checkpoint: Checkpoint, *, tied: bool) -> Iterator[tuple[str, Rows]]:
    family = checkpoint.family
    for name, info in checkpoint.tensors.items():
        # Transformers does not read a second copy of tied embeddings.
        if tied and name == "lm_head.weight":
            continue
        module, _, kind = name.rpartition(".")
        layer, _, within = module.removeprefix(f"{family.layers}.").partition(".")
        if within not in family.fused:
            yield name, Rows(source=name, start=0, shape=info.shape, dtype=info.dtype)
            continue
        parts, start = family.fused[within], 0
        for part, rows in zip(parts, _split(checkpoint, f"{family.layers}.{layer}", within, info), strict=True):
            shape = (rows, *info.shape[1:])
            yield (
                f"{family.layers}.{layer}.{part}.{kind}",
                Rows(source=name, start=start, shape=shape, dtype=info.dtype),
            )
            start += rows


def _split(checkpoint: Checkpoint, layer: str, module: str, info: TensorInfo) -> list[int]:
    """Rows of each part of a fused projection: queries as many as ``o_proj`` takes in, the others alike."""
    num_parts = len(checkpoint.family.fused[module])
    first = info.shape[0] // num_parts
    if module.startswith(f"{checkpoint.family.attention}."):
        first = checkpoint.tensors[f"{layer}.{checkpoint.family.attention}.o_proj.weight"].shape[1]
    return [first] + [(info.shape[0] - first) // (num_parts - 1)] * (num_parts - 1)


def _config(checkpoint: Checkpoint, known: Mapping[str, Any], tensors: Mapping[str, Rows]) -> dict[str, Any]:
    """Everything but ``block_configs``."""

    def has_bias(projection: str) -> bool:
        return any(name.endswith(f".{projection}.bias") for name in tensors)

    return {key: known[key] for key in _COPIED_KEYS if known.get(key) is not None} | {
        "architectures": [ARCHITECTURE],
        "model_type": NEMOTRON_NAS,
        "auto_map": AUTO_MAP,
        "dtype": dtype_name(checkpoint.dtype),
        # As in NVIDIA's own: no one number is right, and Transformers' Llama stops at it.
        "intermediate_size": None,
        "head_dim": known.get("head_dim") or known["hidden_size"] // known["num_attention_heads"],
        # vLLM takes the first for o_proj, and the second for the other three.
        "attention_bias": has_bias("o_proj"),
        "qkv_bias": has_bias("q_proj"),
        "mlp_bias": has_bias("down_proj"),
        **_window(known),
    }


def _window(known: Mapping[str, Any]) -> dict[str, Any]:
    """The sliding window, and which layers it is for where that is not all of them."""
    if known.get("sliding_window") is None:
        return {}
    kinds = known.get("layer_types") or ()
    if set(kinds) == {"full_attention"}:
        return {}
    mixed = {"layer_types": list(kinds)} if len(set(kinds)) > 1 else {}
    return {"sliding_window": known["sliding_window"], **mixed}


def _block(layer: LayerLayout, config: Mapping[str, Any], *, with_ffn_mult: bool) -> dict[str, dict[str, Any]]:
    width = layer.intermediate_size
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    ffn: dict[str, Any] = {"no_op": not width, "replace_with_linear": False, "intermediate_size": width or None}
    if with_ffn_mult:
        # A multiple of 256 survives the inexact division: what comes out too small is rounded up again.
        ffn["ffn_mult"] = 3 * width / (2 * config["hidden_size"]) if width else None
    return {
        "attention": {
            "no_op": not layer.attention,
            "replace_with_linear": False,
            "n_heads_in_group": group if layer.attention else None,
        },
        "ffn": ffn,
    }


def _llama_cpp_obstacle(config: Mapping[str, Any], layout: Sequence[LayerLayout]) -> str | None:
    """What llama.cpp would leave out or get wrong without a word."""
    uneven = [index for index, layer in enumerate(layout) if layer.intermediate_size % _FFN_MULTIPLE]
    # llama.cpp goes on to the next layer where it finds no FFN, without adding what attention has put out, and in the
    # last layer without picking the tokens that logits are asked for.
    lost = [index for index, layer in enumerate(layout) if not layer.intermediate_size and layer.attention]
    rope = config["rope_parameters"]
    if lost or not layout[-1].intermediate_size:
        return f"layer {min([*lost, len(layout) - 1])} has no FFN, and llama.cpp would lose what goes through it"
    if config.get("sliding_window"):
        return f"llama.cpp's code for this form knows no sliding window (here {config['sliding_window']})"
    if rope["rope_type"] not in ("default", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"llama.cpp's converter leaves out this form's rope_parameters (rope_type {rope['rope_type']!r})"
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        return (
            f"llama.cpp's converter takes hidden_size / num_attention_heads for head_dim, which is {config['head_dim']}"
        )
    if uneven:
        width = layout[uneven[0]].intermediate_size
        return (
            f"llama.cpp's converter rounds FFN widths up to multiples of {_FFN_MULTIPLE}, and layer {uneven[0]} has "
            f"{width} ({len(uneven)} such layers; prune with --align {_FFN_MULTIPLE})"
        )
    return None
