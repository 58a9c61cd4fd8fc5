"""Pipeline parallelism: each stage needs a layer that attends."""

from collections.abc import Sequence

from vllm.distributed.utils import get_pp_indices

from toolchain.architecture.layout import LayerLayout
from toolchain.errors import SenteiError


def check_stages(layout: Sequence[LayerLayout], num_stages: int) -> None:
    """Checks that vLLM can allocate KV cache for each stage: it divides by the bytes of a block, 0 without attention.

    Args:
        layout: All layers of the model.
        num_stages: ``pipeline_parallel_size``; ``VLLM_PP_LAYER_PARTITION`` may say how layers are divided.

    Raises:
        SenteiError: A stage has no attention; says how to divide the layers so that each has one.
    """
    for stage in range(num_stages if any(layer.attention for layer in layout) else 0):
        start, end = get_pp_indices(len(layout), stage, num_stages)
        if not any(layer.attention for layer in layout[start:end]):
            layers = f"layers {start} to {end - 1}" if end > start else "no layers"
            raise SenteiError(
                f"pipeline_parallel_size is {num_stages}, and stage {stage} ({layers}) has no attention: vLLM cannot "
                "allocate KV cache for such a stage.",
                _way_out(layout, num_stages),
            )


def _way_out(layout: Sequence[LayerLayout], num_stages: int) -> str:
    attending = sum(layer.attention for layer in layout)
    if attending < num_stages:
        return f"Serve with at most {attending} stages: {attending} layers attend."
    return f"Set VLLM_PP_LAYER_PARTITION={','.join(map(str, _partition(layout, num_stages)))}."


def _partition(layout: Sequence[LayerLayout], num_stages: int) -> list[int]:
    """Layers of each stage: as even as can be where each stage attends; at least as many layers attend."""
    attending = [index for index, layer in enumerate(layout) if layer.attention]
    ends = [0]
    for stage in range(1, num_stages):
        first = next(index for index in attending if index >= ends[-1])
        last = attending[stage - num_stages]  # each stage behind this one needs one of those from here on
        ends.append(min(max(round(len(layout) * stage / num_stages), first + 1), last))
    return [end - start for start, end in zip(ends, [*ends[1:], len(layout)], strict=True)]
