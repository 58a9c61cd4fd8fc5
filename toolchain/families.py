"""The model families sentei knows: one entry each, data only.

Everything that depends on the family (weight names, what a neuron's removal cuts, what a removed attention takes along)
stands here and nowhere else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
        attention_norm: The norm that only feeds attention, and goes with it.
        ffn: The FFN submodule.
        ffn_norm: The norm that only feeds the FFN, and goes with it.
        ffn_inputs: Projections into the FFN: a neuron is one *row* of each weight (and one entry of each bias).
        ffn_output: Projection out of the FFN: a neuron is one *column* of its weight.
        final_norm: The norm between the last decoder layer and the head.
    """

    model_type: str
    architecture: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    ffn: str = "mlp"
    ffn_norm: str = "post_attention_layernorm"
    ffn_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    ffn_output: str = "mlp.down_proj"
    final_norm: str = "model.norm"

    @property
    def pruned_architecture(self) -> str:
        """The name pruned checkpoints carry in ``architectures``, so that no stock class claims them."""
        return f"Pruned{self.architecture}"


FAMILIES: Mapping[str, Family] = {
    family.model_type: family for family in (Family(model_type="llama", architecture="LlamaForCausalLM"),)
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Finds the family of a ``config.json``.

    Raises:
        SenteiError: The ``model_type`` or the architecture is not supported.
    """
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise SenteiError(
            f"config.json: model_type {model_type!r} is not supported.", f"Supported: {', '.join(sorted(FAMILIES))}."
        )
    known = {family.architecture, family.pruned_architecture}
    if architectures and not known & set(architectures):
        raise SenteiError(
            f"config.json: architecture {architectures[0]!r} is not supported for model_type {model_type!r}.",
            f"Supported: {', '.join(sorted(known))}.",
        )
    return family
