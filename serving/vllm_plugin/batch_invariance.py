"""``VLLM_BATCH_INVARIANT``: vLLM asks for the model's one width, and a pruned model has many."""

from typing import TYPE_CHECKING, Any

from toolchain.architecture.families import FAMILIES
from toolchain.architecture.layout import read_layout

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_QUESTION = "_uses_breakable_cudagraph_for_batch_invariance"


def ask_with_each_width() -> None:
    """Lets vLLM (0.32) ask of each width whether it has tuned tiles for such a matrix; one that has decides.

    It asks before it starts, on GPUs for which it has a table, to choose between compiling and CUDA graphs without:
    the answer changes speed alone. The tiles themselves are looked up by each matrix's own shape.
    """
    from vllm.config import VllmConfig

    asked: Any = getattr(VllmConfig, _QUESTION, None)
    if asked is None or asked.__module__ == __name__:
        return
    ours = {family.pruned_architecture for family in FAMILIES.values()}

    def ask(self: "VllmConfig") -> bool:
        model: Any = self.model_config
        if model is None or ours.isdisjoint(model.hf_text_config.architectures or ()):
            return bool(asked(self))
        config = model.hf_text_config
        layout = enumerate(read_layout(config.to_dict()))
        layers = {layer.intermediate_size: index for index, layer in layout if layer.intermediate_size}
        try:
            for index in layers.values():
                model.hf_text_config = config.per_layer_config[index]
                if asked(self):
                    return True
        finally:
            model.hf_text_config = config
        return False

    setattr(VllmConfig, _QUESTION, ask)
