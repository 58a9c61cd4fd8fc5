"""Checkpoints as Transformers models: the loader that knows ``per_layer_config``."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from toolchain.checkpoint import Checkpoint, open_checkpoint
from toolchain.errors import SenteiError
from toolchain.families import Family
from toolchain.layout import LayerLayout, read_layout


class RemovedAttention(nn.Module):
    """Stands where an attention was: adds nothing to the residual stream, and holds no KV cache."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """Returns a zero that broadcasts over ``hidden_states``, and no attention weights."""
        return hidden_states.new_zeros(()), None


class RemovedFFN(nn.Module):
    """Stands where an FFN was: adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns a zero that broadcasts over ``hidden_states``."""
        return hidden_states.new_zeros(())


def load_model(
    checkpoint: Checkpoint | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Loads a checkpoint, pruned or not, in evaluation mode. Transformers' own loader does the work.

    Args:
        checkpoint: An opened checkpoint or its directory.
        dtype: Computed in; by default what the weights are stored in.
        device: Where the model goes.

    Raises:
        SenteiError: The directory is not a good checkpoint, or tensors are missing or left over.
    """
    if isinstance(checkpoint, Path):
        checkpoint = open_checkpoint(checkpoint)
    model_class = transformers_class(checkpoint.family)
    if checkpoint.is_pruned:
        model_class = pruned_class(model_class, checkpoint.family)
    model, info = model_class.from_pretrained(
        checkpoint.directory,
        dtype=dtype or checkpoint.dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            names = sorted(str(name) for name in info[problem])
            raise SenteiError(f"{checkpoint.directory}: {problem.replace('_', ' ')} in the weights: {names[0]}.")
    return model.to(device).eval()


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model directory.

    Raises:
        SenteiError: There is none, or it is damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SenteiError(f"{directory} has no usable tokenizer ({str(error).splitlines()[0]}).") from error


def transformers_class(family: Family) -> type[PreTrainedModel]:
    """The family's causal language model class in Transformers."""
    return getattr(transformers, family.architecture)


def pruned_class(base: type[PreTrainedModel], family: Family) -> type[PreTrainedModel]:
    """A subclass of a Transformers model that builds each layer as ``per_layer_config`` says.

    Its name is the one in the checkpoint's ``architectures``; ``save_pretrained`` writes the same config back.
    """

    def build(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, _without_overrides(config), *args, **kwargs)  # type: ignore[misc]
        shape_layers(self, family, read_layout(config.to_dict()))
        self.config = config

    return type(family.pruned_architecture, (base,), {"__init__": build, "__module__": __name__})


def decoder_layers(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    """The model's list of decoder layers."""
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def remove_attention(layer: nn.Module, family: Family) -> None:
    """Takes a decoder layer's attention out, and the norm that only feeds it."""
    setattr(layer, family.attention, RemovedAttention())
    setattr(layer, family.attention_norm, nn.Identity())


def shape_layers(model: PreTrainedModel, family: Family, layout: tuple[LayerLayout, ...]) -> None:
    """Gives each layer of a freshly built model the modules its layout asks for; weights are left to the loader.

    Attending layers are numbered through for the KV cache, which then has no gap that generation could stumble over.
    """
    global_width = model.config.intermediate_size
    cache_slot = 0
    for layer, wanted in zip(decoder_layers(model, family), layout, strict=True):
        if wanted.attention:
            getattr(layer, family.attention).layer_idx = cache_slot
            cache_slot += 1
        else:
            remove_attention(layer, family)
        if wanted.intermediate_size == 0:
            setattr(layer, family.ffn, RemovedFFN())
            setattr(layer, family.ffn_norm, nn.Identity())
        elif wanted.intermediate_size != global_width:
            narrow = copy.copy(model.config)
            narrow.intermediate_size = wanted.intermediate_size
            setattr(layer, family.ffn, type(getattr(layer, family.ffn))(narrow))


def _without_overrides(config: PreTrainedConfig) -> PreTrainedConfig:
    plain = copy.deepcopy(config)
    plain.per_layer_config = None
    return plain
