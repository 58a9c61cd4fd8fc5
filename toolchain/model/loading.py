"""Checkpoints as Transformers models: the loader that knows ``per_layer_config``."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Cache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from toolchain.architecture.families import Family
from toolchain.architecture.layout import LayerLayout, check_dimensions, read_layout
from toolchain.checkpoint.directory import Checkpoint, opened
from toolchain.errors import SenteiError, is_out_of_memory, reason_of
from toolchain.json_files import read_json_object
from toolchain.model.tokenizer_files import check_tokenizer_files

# Read by AutoTokenizer beside tokenizer.json, each an object.
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
_GENERATION_SETTINGS = "generation_config.json"
_TOKEN_SETTINGS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MOST_TOKEN_ID = 2**31
# With the ranges in which they say anything.
_SAMPLING_SETTINGS = {
    "temperature": (0, 100), "top_p": (0, 1), "top_k": (0, 2**31), "min_p": (0, 1), "repetition_penalty": (1e-3, 1e3),
}  # fmt: skip

# What models call their KV cache, in arguments and outputs; Transformers 5.24 has renamed it.
CACHE_ARGUMENT = next(
    name for name in ("cache", "past_key_values") if name in signature(transformers.LlamaForCausalLM.forward).parameters
)


class RemovedAttention(nn.Module):
    """Stands where an attention was: adds nothing to the residual stream.

    Transformers counts the tokens seen in the first slot of a KV cache, and sizes masks by the first slot of each kind
    (sliding or full), whichever layers these belong to. So a removed attention goes on counting in its slot, with one
    number a token in place of keys and values.
    """

    def __init__(self, layer_idx: int) -> None:
        """``layer_idx``: the slot."""
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, None]:
        """Returns a zero that broadcasts over ``hidden_states``, and no attention weights."""
        cache: Cache | None = arguments.get(CACHE_ARGUMENT)
        if cache is not None:
            marks = hidden_states.new_zeros((hidden_states.shape[0], 1, hidden_states.shape[1], 1))
            cache.update(marks, marks, self.layer_idx)
        return hidden_states.new_zeros(()), None


class RemovedFFN(nn.Module):
    """Stands where an FFN was: adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns a zero that broadcasts over ``hidden_states``."""
        return hidden_states.new_zeros(())


def load_model(
    checkpoint: Checkpoint | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    device_map: Mapping[str, str | int] | None = None,
) -> PreTrainedModel:
    """Loads a checkpoint, pruned or not, in evaluation mode. Transformers' own loader does the work.

    Args:
        checkpoint: An opened checkpoint or its directory.
        dtype: Computed in; by default what the weights are stored in.
        device: Where the model goes.
        device_map: Where its parts go instead, as accelerate has it, which then moves what is computed between them.

    Raises:
        SenteiError: The directory is not a good checkpoint, or tensors are missing or left over.
    """
    checkpoint = opened(checkpoint)
    check_complete(checkpoint)
    model_class = transformers_class(checkpoint.family)
    if checkpoint.is_pruned:
        model_class = pruned_class(model_class, checkpoint.family)
    config = read_transformers_config(checkpoint.directory)
    with said_in_a_sentence(f"{checkpoint.directory} cannot be loaded by Transformers"):
        model, info = model_class.from_pretrained(
            checkpoint.directory,
            config=config,
            generation_config=read_generation_config(checkpoint.directory, config),
            dtype=dtype or checkpoint.dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            device_map=None if device_map is None else dict(device_map),
        )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            names = sorted(str(name) for name in info[problem])
            raise SenteiError(f"{checkpoint.directory}: {problem.replace('_', ' ')} in the weights: {names[0]}.")
    return (model.to(device) if device_map is None else model).eval()


def check_complete(checkpoint: Checkpoint) -> PreTrainedModel:
    """Compares a checkpoint's tensors with those that Transformers would build for its config, before any is read.

    Returns:
        What it was compared with, see :func:`empty_model`.

    Raises:
        SenteiError: A tensor is missing, left over, or of another shape.
    """
    model = empty_model(checkpoint)
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), "")
    optional = {f"{head}.weight"} if model.config.tie_word_embeddings else set()
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = checkpoint.shapes
    where = f"{checkpoint.directory}:"
    if missing := sorted(wanted.keys() - found.keys() - optional):
        raise SenteiError(f"{where} there is no tensor {missing[0]} ({len(missing)} missing).")
    if extra := sorted(found.keys() - wanted.keys()):
        raise SenteiError(f"{where} config.json has no place for tensor {extra[0]} ({len(extra)} left over).")
    for name, shape in found.items():
        if shape != wanted[name]:
            raise SenteiError(f"{where} {name} has shape {list(shape)}; by config.json it is {list(wanted[name])}.")
    return model


def empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The checkpoint's model on the meta device: shapes without weights.

    Raises:
        SenteiError: Transformers refuses the config.
    """
    config: Any = read_transformers_config(checkpoint.directory)
    with said_in_a_sentence(f"{checkpoint.directory}/config.json: Transformers refuses it"):
        config.per_layer_config = None
        with torch.device("meta"):
            model = transformers_class(checkpoint.family)(config)
            shape_layers(model, checkpoint.family, checkpoint.layout)
    return model


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model directory.

    Raises:
        SenteiError: There is none, or it is damaged.
    """
    _check_there(directory)
    settings = {name: read_json_object(directory / name) for name in _TOKENIZER_SETTINGS if (directory / name).exists()}
    # Transformers makes a model's config of it, as large as it says, before it looks at the tokenizer.
    check_dimensions(settings.get("config.json", {}))
    check_tokenizer_files(directory)
    with said_in_a_sentence(f"{directory} has no usable tokenizer"):
        try:
            return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception:
            if "config.json" in settings:
                read_transformers_config(directory)
            raise


def read_transformers_config(directory: Path) -> PreTrainedConfig:
    """A directory's config as Transformers has it, without what it says of how the model is run.

    An implementation of attention may be named by a repository of the hub, whose code Transformers would then fetch and
    run. The other settings change what comes out of a model's ``forward``, on which the callers rely.

    Raises:
        SenteiError: Transformers refuses it.
    """
    _check_there(directory)
    with said_in_a_sentence(f"{directory}/config.json: Transformers refuses it"):
        config: Any = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        config._attn_implementation = None
        config._experts_implementation = None
        config.output_attentions = config.output_hidden_states = config.is_encoder_decoder = False
        config.return_dict = True
        return config


def _check_there(directory: Path) -> None:
    """Transformers would take the path of a directory that is gone for a name on the hub."""
    if not directory.is_dir():
        raise SenteiError(f"Model directory {directory} does not exist any more.")


def read_generation_config(directory: Path, config: PreTrainedConfig) -> GenerationConfig:
    """What ``generation_config.json`` says of tokens and sampling; nothing else is followed.

    Args:
        directory: The model's.
        config: Has the tokens where there is no such file.

    Raises:
        SenteiError: It is damaged, or a value is none that a model can have.
    """
    path = directory / _GENERATION_SETTINGS
    has_file = path.exists()
    found = read_json_object(path) if has_file else vars(config)
    path = path if has_file else directory / "config.json"
    tokens = {name: found[name] for name in _TOKEN_SETTINGS if found.get(name) is not None}
    for name, value in tokens.items():
        if not all(type(each) is int and 0 <= each < _MOST_TOKEN_ID for each in _as_list(value)):
            raise SenteiError(f"{path}: {name} is {value!r}, not a token's number or a list of them.")
    sampling = {name: found[name] for name in _SAMPLING_SETTINGS if has_file and found.get(name) is not None}
    for name, value in sampling.items():
        low, high = _SAMPLING_SETTINGS[name]
        if type(value) not in (int, float) or not low <= value <= high:
            raise SenteiError(f"{path}: {name} is {value!r}, not a number from {low:g} to {high:g}.")
    with said_in_a_sentence(f"{path} cannot be used"):
        return GenerationConfig(**tokens, **sampling)


def end_tokens(config: GenerationConfig | None) -> list[int]:
    """The end-of-sequence tokens of a model."""
    return [each for each in _as_list(config.eos_token_id if config else None) if each is not None]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@contextmanager
def said_in_a_sentence(what: str) -> Iterator[None]:
    """Turns whatever a library raises over a file into one sentence; its own reason follows ``what`` in brackets.

    Transformers and the libraries below it raise almost anything over what they do not expect in a file, down to a
    panic of Rust, which is no ``Exception``. That memory ran out is left to whoever says what to do about it.

    Raises:
        SenteiError: Something was raised inside.
    """
    try:
        yield
    except (SenteiError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if is_out_of_memory(error):
            raise
        raise SenteiError(f"{what} ({reason_of(error)}).") from error


def bos_of(family: Family, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the BOS token that each text begins with where the model is served; ``None`` where there is none.

    A server lets the tokenizer add its special tokens to a prompt. Llama 3's and Mistral's put BOS in front, Qwen's
    puts nothing there. What a tokenizer adds at the end is of no concern here: a window is cut from a longer text.

    Raises:
        SenteiError: The family needs one, and the tokenizer does not have it. Or the tokenizer puts several tokens in
            front, for which windows have no place.
    """
    needed = needed_bos(family, tokenizer)
    return needed if needed is not None else _put_in_front(tokenizer)


def _put_in_front(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What the tokenizer adds before a text by itself."""
    with said_in_a_sentence("The tokenizer cannot be used"):
        text, served = (tokenizer("a", add_special_tokens=each)["input_ids"] for each in (False, True))
    starts = (start for start in range(len(served)) if served[start : start + len(text)] == text)
    in_front = served[: next(starts, 0)]
    if len(in_front) > 1:
        names = " ".join(tokenizer.convert_ids_to_tokens(in_front))
        raise SenteiError(
            f"The tokenizer puts {len(in_front)} tokens before every text ({names}); sentei knows one, BOS.",
            "Check the post_processor in tokenizer.json.",
        )
    return in_front[0] if in_front else None


def needed_bos(family: Family, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token without which a family falls apart; ``None`` where it reads text as it is.

    Raises:
        SenteiError: There must be one, and the tokenizer does not have it.
    """
    if not family.needs_bos:
        return None
    if tokenizer.bos_token_id is None:
        raise SenteiError(
            f"Models of type {family.model_type!r} need a BOS token before every text, and this tokenizer has none.",
            "Set bos_token in tokenizer_config.json, as the original model does.",
        )
    return tokenizer.bos_token_id


def check_same_vocabulary(
    checkpoint: Checkpoint, original: Checkpoint, tokenizers: Iterable[PreTrainedTokenizerBase]
) -> None:
    """Checks that two models can be compared token by token: same tokens, same places in the logits.

    Args:
        checkpoint: One.
        original: The other.
        tokenizers: Both models'.

    Raises:
        SenteiError: They cannot.
    """
    sizes = [each.config.get("vocab_size") for each in (checkpoint, original)]
    vocabularies = [each.get_vocab() for each in tokenizers]
    if sizes[0] != sizes[1] or vocabularies[0] != vocabularies[1]:
        raise SenteiError(
            f"{original.directory} has another tokenizer or vocabulary than {checkpoint.directory}: their logits "
            "cannot be compared.",
            "Give the model it was pruned from.",
        )


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
    """Takes a decoder layer's attention out, and its norms."""
    setattr(layer, family.attention, RemovedAttention(getattr(layer, family.attention).layer_idx))
    for norm in family.attention_norms:
        setattr(layer, norm, nn.Identity())


def remove_ffn(layer: nn.Module, family: Family) -> None:
    """Takes a decoder layer's whole FFN out, and its norms."""
    setattr(layer, family.ffn, RemovedFFN())
    for norm in family.ffn_norms:
        setattr(layer, norm, nn.Identity())


def shape_layers(model: PreTrainedModel, family: Family, layout: tuple[LayerLayout, ...]) -> None:
    """Gives each layer of a freshly built model the modules its layout asks for; weights are left to the loader."""
    global_width = model.config.intermediate_size
    for layer, wanted in zip(decoder_layers(model, family), layout, strict=True):
        if not wanted.attention:
            remove_attention(layer, family)
        if wanted.intermediate_size == 0:
            remove_ffn(layer, family)
        elif wanted.intermediate_size != global_width:
            narrow = copy.copy(model.config)
            narrow.intermediate_size = wanted.intermediate_size
            setattr(layer, family.ffn, type(getattr(layer, family.ffn))(narrow))


def _without_overrides(config: PreTrainedConfig) -> PreTrainedConfig:
    plain = copy.deepcopy(config)
    plain.per_layer_config = None
    return plain
