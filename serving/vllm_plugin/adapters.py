"""LoRA adapters of other widths: vLLM copies a smaller one into the place of a larger one, and says nothing."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from serving.vllm_plugin.weights import CompleteWeights
from toolchain.architecture.families import Family
from toolchain.architecture.layout import LayerLayout
from toolchain.architecture.tensor_check import layer_index
from toolchain.errors import SenteiError

_LOG = logging.getLogger("vllm.sentei")


def check_when_loaded() -> None:
    """Lets vLLM's workers check each adapter of a pruned model after they read it, before it is put into the model.

    That is when the server starts (``--lora-modules``) or when a client loads one; the client gets the sentence.
    """
    from vllm.lora.worker_manager import WorkerLoRAManager

    load = WorkerLoRAManager._load_adapter
    if load.__module__ == __name__:
        return

    def load_and_check(self: Any, lora_request: Any) -> Any:
        adapter = load(self, lora_request)
        if isinstance(model := self._adapter_manager.model, CompleteWeights):
            left_out = check_adapter(model.family, model.layout, lora_request.lora_name, adapter.loras)
            if left_out:
                _LOG.warning(
                    "LoRA adapter %s: %d of its modules were removed from this model and are left out, %s first.",
                    lora_request.lora_name, len(left_out), left_out[0],
                )  # fmt: skip
        return adapter

    WorkerLoRAManager._load_adapter = load_and_check  # type: ignore[method-assign]


def check_adapter(family: Family, layout: Sequence[LayerLayout], name: str, weights: Mapping[str, Any]) -> list[str]:
    """Checks the widths of an adapter's FFN modules; of attention pruning changes no shape.

    Args:
        family: The model's.
        layout: Its layers.
        name: The adapter's.
        weights: By module, with ``lora_a`` [rank, in] and ``lora_b`` [out, rank], whole also with several ranks.

    Returns:
        The modules that the model does not have any more, which vLLM leaves out.

    Raises:
        SenteiError: A module is of another width than the model's.
    """
    left_out = []
    for module, index, rest in _in_layers(family, layout, weights):
        layer = layout[index]
        if not (layer.attention if rest.startswith(f"{family.attention}.") else layer.intermediate_size):
            left_out.append(module)
            continue
        if (side := family.neuron_side(f"{rest}.weight")) is None:
            continue
        dimension, entries = side
        matrix = weights[module].lora_b if dimension == 0 else weights[module].lora_a
        if matrix is not None and matrix.shape[dimension] != entries * layer.intermediate_size:
            raise SenteiError(
                f"LoRA adapter {name}: {module} has {matrix.shape[dimension] // entries} neurons, and this model has "
                f"{layer.intermediate_size} there: it was trained on a model of other widths.",
                "Train it on this model, or leave its FFN modules out.",
            )
    return left_out


def _in_layers(
    family: Family, layout: Sequence[LayerLayout], modules: Mapping[str, Any]
) -> Iterator[tuple[str, int, str]]:
    """Modules in decoder layers: name, layer, and the rest of the name."""
    for module in modules:
        number, _, rest = module.removeprefix(f"{family.layers}.").partition(".")
        if module.startswith(f"{family.layers}.") and (index := layer_index(number, len(layout))) is not None:
            yield module, index, rest
