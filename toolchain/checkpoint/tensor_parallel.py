"""Over how many tensor-parallel ranks a model can be split: by vLLM's rule for heads, and by each layer's width."""

from toolchain.architecture.layout import positive
from toolchain.checkpoint.directory import Checkpoint
from toolchain.checkpoint.quantized import QuantizedCheckpoint
from toolchain.errors import SenteiError


def head_counts(checkpoint: Checkpoint | QuantizedCheckpoint) -> tuple[int, int]:
    """Attention heads and key-value heads of each layer."""
    heads = positive(checkpoint.config, "num_attention_heads")
    return heads, checkpoint.config.get("num_key_value_heads") or heads


def ranks_for_heads(checkpoint: Checkpoint | QuantizedCheckpoint) -> list[int]:
    """Numbers of ranks that split the heads evenly; key-value heads may also be repeated on several ranks."""
    heads, kv_heads = head_counts(checkpoint)
    return [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]


def possible_ranks(checkpoint: Checkpoint | QuantizedCheckpoint) -> list[int]:
    """Numbers of ranks that split the heads and every layer's width evenly; 1 always does."""
    widths = {layer.intermediate_size for layer in checkpoint.layout}
    return [n for n in ranks_for_heads(checkpoint) if not any(width % n for width in widths)]


def width_unit(checkpoint: Checkpoint, *, align: int, tensor_parallel: int) -> int:
    """What FFN widths must be multiples of for each rank to hold a multiple of ``align``.

    A matrix unit works on what its own rank holds, so it is the share of a layer that must fill whole tiles, not the
    layer. Layers that keep their full width are split too, so the unpruned model must itself be divisible.

    Args:
        checkpoint: The unpruned model.
        align: Neurons of a tile.
        tensor_parallel: Ranks that each layer will be split over.

    Raises:
        SenteiError: The model cannot be split so, or no width is left to choose from.
    """
    if tensor_parallel not in (possible := possible_ranks(checkpoint)):
        heads, kv_heads = head_counts(checkpoint)
        raise SenteiError(
            f"--tensor-parallel {tensor_parallel} does not split {checkpoint.directory} evenly: it has {heads} "
            f"attention heads, {kv_heads} key-value heads and FFN width {checkpoint.config['intermediate_size']}.",
            f"Possible here: {', '.join(map(str, possible))}.",
        )
    unit, width = align * tensor_parallel, checkpoint.config["intermediate_size"]
    if tensor_parallel > 1 and unit > width:
        raise SenteiError(
            f"--align {align} on each of {tensor_parallel} ranks needs FFN widths in multiples of {unit}, and the "
            f"whole width is {width}.",
            f"Lower --align: {width // tensor_parallel} is the most that can be, and less leaves more choice.",
        )
    return unit
