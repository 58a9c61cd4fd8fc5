"""The model families sentei knows: one entry each, data only.

Everything that depends on the family (weight names, what a neuron's removal cuts, what a removed attention takes along)
stands here and nowhere else. Standard library only: the vLLM plugin imports this module.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from toolchain.architecture.layout import positive
from toolchain.errors import SenteiError


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a family keeps its feed-forward network (FFN) and attention.

    Names are relative to a decoder layer, ``{layers}.{index}.``; weights are ``[out, in]`` as in ``nn.Linear``.

    Attributes:
        model_type: As in ``config.json``.
        architecture: The Transformers class of the causal language model.
        layers: Name of the list of decoder layers.
        attention: The attention submodule.
        attention_output: Projection out of attention.
        attention_norms: The norms that go with attention: the one before it and, where there is one, the one after it.
        ffn: The FFN submodule.
        ffn_norms: The norms that go with the FFN, likewise.
        ffn_inputs: Projections into the FFN: a neuron is one *row* of each weight (and one entry of each bias).
        ffn_input_parts: Into how many parts, stacked one below the other, each of them is fused: a neuron is one row in
            each part.
        ffn_output: Projection out of the FFN: a neuron is one *column* of its weight.
        residual_factor: Key in ``config.json`` of a number by which attention and FFN are multiplied before they are
            added to the residual stream.
        final_norm: The norm between the last decoder layer and the head.
        norm_offset: What norms add to their weight.
        logits_divisor: Key in ``config.json`` of a number that the head's output is divided by.
        logits_softcap: Key of a number ``c``, which may be null: the head's output ``x`` becomes ``c * tanh(x / c)``.
        not_in_vllm: Keys that change what Transformers' class computes, and that vLLM's class (0.25 to 0.33) does not
            follow; see :func:`check_vllm_follows`.
        needs_bos: Whether the model was trained with a beginning-of-sequence (BOS) token before every text and falls
            apart without it: sentei then puts it before each window and question. Otherwise the tokenizer decides.
        fused: Projections of a layer that stack several of Llama's, by name, with these in order.
        unlike_llama: What the family computes that Llama does not, in words; empty if biases, sliding windows and
            fused projections are all that sets it apart.
    """

    model_type: str
    architecture: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    attention_output: str = "self_attn.o_proj"
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    ffn: str = "mlp"
    ffn_norms: tuple[str, ...] = ("post_attention_layernorm",)
    ffn_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    ffn_input_parts: int = 1
    ffn_output: str = "mlp.down_proj"
    residual_factor: str | None = None
    final_norm: str = "model.norm"
    norm_offset: float = 0.0
    logits_divisor: str | None = None
    logits_softcap: str | None = None
    not_in_vllm: tuple[str, ...] = ()
    needs_bos: bool = False
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unlike_llama: str = ""

    @property
    def pruned_architecture(self) -> str:
        """The name pruned checkpoints carry in ``architectures``, so that no stock class claims them."""
        return f"Pruned{self.architecture}"

    @property
    def attention_parts(self) -> tuple[str, ...]:
        """All submodules of a layer that are gone when its attention is removed."""
        return (self.attention, *self.attention_norms)

    @property
    def ffn_parts(self) -> tuple[str, ...]:
        """All submodules of a layer that are gone when its FFN is removed whole."""
        return (self.ffn, *self.ffn_norms)

    @property
    def norms_outputs(self) -> bool:
        """Whether norms stand between attention or FFN and the residual stream."""
        return len(self.ffn_norms) > 1

    def neuron_side(self, tensor: str) -> tuple[int, int] | None:
        """How a tensor of a layer counts neurons.

        Args:
            tensor: Its name, relative to the layer.

        Returns:
            The dimension that holds them and how many entries a neuron has there; ``None`` if it holds none.
        """
        module, _, kind = tensor.rpartition(".")
        if module in self.ffn_inputs:
            return 0, self.ffn_input_parts
        if module == self.ffn_output and kind == "weight":
            return 1, 1
        return None


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="llama", architecture="LlamaForCausalLM"),
        Family(model_type="mistral", architecture="MistralForCausalLM"),
        Family(model_type="qwen2", architecture="Qwen2ForCausalLM", not_in_vllm=("layer_types", "head_dim")),
        Family(
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            not_in_vllm=("layer_types", "attention_bias"),
            unlike_llama="norms on queries and keys",
        ),
        Family(
            model_type="phi3",
            architecture="Phi3ForCausalLM",
            ffn_inputs=("mlp.gate_up_proj",),
            ffn_input_parts=2,
            fused={
                "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
            },
        ),
        Family(
            model_type="granite",
            architecture="GraniteForCausalLM",
            residual_factor="residual_multiplier",
            logits_divisor="logits_scaling",
            unlike_llama="factors on embeddings, attention scores, residual stream and logits",
        ),
        Family(
            model_type="gemma3_text",
            architecture="Gemma3ForCausalLM",
            attention_norms=("input_layernorm", "post_attention_layernorm"),
            ffn_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
            norm_offset=1.0,
            logits_softcap="final_logit_softcapping",
            needs_bos=True,
            unlike_llama="norms behind attention and FFN and on queries and keys, GELU, and scaled embeddings",
        ),
    )
}

# The model_type of the form that servers without the plugin read; see toolchain/model/decilm.py.
NEMOTRON_NAS = "nemotron-nas"

# Keys by which a config.json says that a layer holds many FFNs, or that the language model is a part of a larger one.
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")
_PART_KEYS = ("text_config", "vision_config", "audio_config", "thinker_config")


def family_of(config: Mapping[str, Any]) -> Family:
    """Finds the family of a ``config.json``.

    Raises:
        SenteiError: ``architectures`` is no list of names, or the ``model_type`` or the architecture is not supported;
            says why where there is a reason.
    """
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if not isinstance(architectures, (list, tuple)) or not all(isinstance(each, str) for each in architectures):
        raise SenteiError(f"config.json: architectures is {architectures!r}, not a list of names.")
    if model_type == NEMOTRON_NAS:
        raise SenteiError(
            f"config.json: model_type {model_type!r} is an export for servers that take no plugin.",
            "Give the checkpoint it was made from; the export's README.md says how it is served.",
        )
    supported = f"Supported: {', '.join(sorted(FAMILIES))}."
    if parts := [key for key in _PART_KEYS if config.get(key)]:
        raise SenteiError(
            f"config.json: model_type {model_type!r} is multimodal ({', '.join(parts)}), and calibration text alone "
            "cannot say what its other inputs need.",
            f"Prune a model that is a language model only. {supported}",
        )
    if experts := [key for key in _EXPERT_KEYS if config.get(key)]:
        raise SenteiError(
            f"config.json: model_type {model_type!r} is a mixture of experts ({experts[0]} = {config[experts[0]]}): "
            "each token meets some of a layer's FFNs only, which the scores of their neurons do not account for.",
            f"Prune a dense model. {supported}",
        )
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise SenteiError(f"config.json: model_type {model_type!r} is not supported.", supported)
    known = {family.architecture, family.pruned_architecture}
    if architectures and not known & set(architectures):
        raise SenteiError(
            f"config.json: architecture {architectures[0]!r} is not supported for model_type {model_type!r}.",
            f"Supported: {', '.join(sorted(known))}.",
        )
    return family


def check_vllm_follows(config: Mapping[str, Any]) -> None:
    """Checks that vLLM's own class for a model computes what its config says, pruned or not.

    Raises:
        SenteiError: It does not; says what it has no place for.
    """
    usual = positive(config, "hidden_size") // positive(config, "num_attention_heads")
    kinds = config.get("layer_types") or ()
    if not isinstance(kinds, (list, tuple)) or not all(isinstance(each, str) for each in kinds):
        raise SenteiError("config.json: layer_types is not a list of names.")
    kinds = sorted(set(kinds))
    unusual = {
        "layer_types": f"layer_types mixes {' and '.join(kinds)}" if len(kinds) > 1 else "",
        "head_dim": f"head_dim is not hidden_size / num_attention_heads = {usual}"
        if (config.get("head_dim") or usual) != usual
        else "",
        "attention_bias": "attention_bias gives o_proj a bias" if config.get("attention_bias") else "",
    }
    for key in family_of(config).not_in_vllm:
        if unusual[key]:
            raise SenteiError(
                f"config.json: {unusual[key]}, which vLLM's class for model_type {config['model_type']!r} cannot "
                "serve, pruned or not.",
                "Serve it with Transformers.",
            )
