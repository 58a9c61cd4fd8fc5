"""How a sparsity budget is split: attentions to remove and FFN widths. Pure arithmetic."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from toolchain.checkpoint.directory import Checkpoint
from toolchain.errors import SenteiError

ALPHA = 1.5
# Ranked widths cost less than even ones, so more of the budget is theirs: docs/decisions/allocation.md.
RANKED_ALPHA = 1.0
# Neuron counts come from floating point; this is far below one neuron and far above the rounding error.
_SLACK = 1e-6


@dataclass(frozen=True, kw_only=True)
class BlockParameters:
    """Sizes of one unpruned decoder block; all blocks are alike.

    Attributes:
        num_hidden_layers: How many blocks.
        intermediate_size: FFN neurons of a block.
        attention: Parameters of the attention submodule: projections and biases, and query and key norms if it has any.
        attention_norm: Parameters of the norms that go with a removed attention.
        neuron: Parameters of one FFN neuron.
        block: All parameters of a block, norms included.
    """

    num_hidden_layers: int
    intermediate_size: int
    attention: int
    attention_norm: int
    neuron: int
    block: int

    @property
    def ffn(self) -> int:
        """Parameters of the FFN projections of a block."""
        return self.neuron * self.intermediate_size

    @property
    def total(self) -> int:
        """Parameters of all decoder blocks: what sparsity is a fraction of."""
        return self.block * self.num_hidden_layers


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The split: how many attentions go, and what FFN width each layer keeps."""

    num_attention_removals: int
    widths: tuple[int, ...]


def block_parameters(checkpoint: Checkpoint) -> BlockParameters:
    """Counts the parameters of one decoder block from the tensors' shapes.

    Raises:
        SenteiError: The checkpoint is pruned already.
    """
    if checkpoint.is_pruned:
        raise SenteiError(f"{checkpoint.directory} is pruned already.", "Prune the original with a higher --sparsity.")
    family, prefix = checkpoint.family, f"{checkpoint.family.layers}.0."
    sizes = {
        name.removeprefix(prefix): math.prod(info.shape)
        for name, info in checkpoint.tensors.items()
        if name.startswith(prefix)
    }
    width = checkpoint.layout[0].intermediate_size
    per_neuron = sum(size for name, size in sizes.items() if family.neuron_side(name) is not None)
    return BlockParameters(
        num_hidden_layers=len(checkpoint.layout),
        intermediate_size=width,
        attention=_below(sizes, family.attention),
        attention_norm=sum(_below(sizes, norm) for norm in family.attention_norms),
        neuron=per_neuron // width,
        block=sum(sizes.values()),
    )


def alpha_of(widths: str) -> float:
    """The formula's ``alpha`` for ``uniform`` or ``ranked`` FFN widths."""
    return RANKED_ALPHA if widths == "ranked" else ALPHA


def num_attention_removals(sizes: BlockParameters, sparsity: float, alpha: float = ALPHA) -> int:
    """``round(L * s ** ((P_ffn / P_attn) / alpha))``; 2SSP has ``alpha = 1.5`` (arXiv 2501.17771, section 3.3).

    ``P_attn`` counts the projections alone, as the method's public code does.
    """
    return round(sizes.num_hidden_layers * sparsity ** ((sizes.ffn / sizes.attention) / alpha))


@dataclass(frozen=True, kw_only=True)
class Protected:
    """Layers that are left alone.

    Attributes:
        attention: Their attention stays.
        ffn: Their FFN keeps its width.
    """

    attention: frozenset[int] = frozenset()
    ffn: frozenset[int] = frozenset()


def parse_protected(specs: Sequence[str]) -> Protected:
    """Reads ``attention:0,1`` and ``ffn:29``.

    Raises:
        SenteiError: Anything else.
    """
    found: dict[str, set[int]] = {"attention": set(), "ffn": set()}
    for spec in specs:
        part, _, layers = spec.partition(":")
        numbers = layers.split(",")
        if part not in found or not all(number.strip().isdecimal() for number in numbers):
            raise SenteiError(f"--protect {spec!r} is not understood.", "Write attention:0,1 or ffn:29.")
        found[part] |= {int(number) for number in numbers}
    return Protected(attention=frozenset(found["attention"]), ffn=frozenset(found["ffn"]))


def allocate(
    sizes: BlockParameters,
    sparsity: float,
    *,
    align: int,
    alpha: float = ALPHA,
    attention_removals: int | None = None,
    protected: Protected = Protected(),
) -> Allocation:
    """Splits a target between attention and FFN.

    With ``align=1`` this is the published method: one width for all layers, ``round(width * (1 - rate))``. Otherwise
    each width is a multiple of ``align``, spread evenly over the layers, such that the parameters removed are at least
    the target and exceed it by less than one alignment unit of one layer.

    Args:
        sizes: Of the unpruned model.
        sparsity: Fraction of all decoder-block parameters to remove, in (0, 1).
        align: Widths are multiples of this; at least one multiple is kept in each layer.
        alpha: Of the formula, see :func:`num_attention_removals`.
        attention_removals: Overrides the formula.
        protected: What has to stay; the other layers make up for it.

    Raises:
        SenteiError: Arguments out of range, or the target cannot be reached; says the highest that can.
    """
    _check_protected(sizes, protected)
    _check_ranges(sizes, sparsity, align, attention_removals)
    layers = sizes.num_hidden_layers
    removals = num_attention_removals(sizes, sparsity, alpha) if attention_removals is None else attention_removals
    if removals > layers - len(protected.attention):
        raise SenteiError(
            f"{removals} attentions are to be removed, and --protect leaves {layers - len(protected.attention)}.",
            "Protect fewer, or lower --sparsity or --attention-removals.",
        )
    # The published widths leave norms out of the count; aligned ones count what the checkpoint really loses.
    from_attention = removals * (sizes.attention + (sizes.attention_norm if align > 1 else 0))
    from_ffn = sparsity * sizes.total - from_attention
    free = layers - len(protected.ffn)
    if from_ffn < 0:
        raise _too_many_removals(sizes, sparsity, removals, from_attention)
    highest = (from_attention + free * (sizes.intermediate_size - align) * sizes.neuron) / sizes.total
    if sparsity > highest:
        raise _beyond_reach(sparsity, highest, removals, align, num_protected=len(protected.ffn))
    narrowed = iter(
        ()
        if not free
        else _published_widths(sizes, from_ffn, free)
        if align == 1
        else _aligned_widths(sizes, from_ffn, align, free)
    )
    widths = tuple(sizes.intermediate_size if layer in protected.ffn else next(narrowed) for layer in range(layers))
    return Allocation(num_attention_removals=removals, widths=widths)


def ladder(full: int, widths: Sequence[int], align: int) -> Callable[[int, int], tuple[int, ...]]:
    """The way from the full width down to ``widths``, as a function of how far to go.

    Returns:
        ``rung(step, num_steps)``: each layer's width after ``step`` of ``num_steps``. The first is the full width,
        the last is ``widths``, and those between differ from ``widths`` by multiples of ``align``, so that a search
        stopped by a limit keeps multiples too. Each rung is nowhere wider than the one before.
    """

    def rung(step: int, num_steps: int) -> tuple[int, ...]:
        if step == 0:
            return (full,) * len(widths)
        units = [(full - width) // align for width in widths]
        return tuple(
            width + (most - most * step // num_steps) * align for width, most in zip(widths, units, strict=True)
        )

    return rung


def _check_protected(sizes: BlockParameters, protected: Protected) -> None:
    for part, layers in (("attention", protected.attention), ("ffn", protected.ffn)):
        if outside := sorted(layer for layer in layers if not 0 <= layer < sizes.num_hidden_layers):
            raise SenteiError(
                f"--protect {part}:{outside[0]}: there is no such layer.",
                f"This model has layers 0 to {sizes.num_hidden_layers - 1}.",
            )


def _check_ranges(sizes: BlockParameters, sparsity: float, align: int, attention_removals: int | None) -> None:
    if not 0 < sparsity < 1:
        raise SenteiError(f"--sparsity {sparsity:g} is outside (0, 1).")
    if not 1 <= align <= sizes.intermediate_size:
        raise SenteiError(f"--align {align} is not from 1 to the FFN width, {sizes.intermediate_size}.")
    layers = sizes.num_hidden_layers
    if attention_removals is not None and not 0 <= attention_removals <= layers:
        raise SenteiError(f"--attention-removals {attention_removals} is not from 0 to the number of layers, {layers}.")


def _too_many_removals(sizes: BlockParameters, sparsity: float, removals: int, from_attention: int) -> SenteiError:
    return SenteiError(
        f"Removing {removals} attentions alone exceeds --sparsity {sparsity:g} "
        f"(they are {from_attention / sizes.total:.1%} of the decoder blocks).",
        "Raise --sparsity or lower --attention-removals.",
    )


def _beyond_reach(sparsity: float, highest: float, removals: int, align: int, *, num_protected: int) -> SenteiError:
    return SenteiError(
        f"--sparsity {sparsity:g} cannot be reached with {removals} attention removals"
        + (f", {num_protected} protected FFNs" if num_protected else "")
        + f" and FFN widths in multiples of {align}: the highest is {int(highest * 1e4) / 1e4:g}.",
        "Lower --sparsity or allow more --attention-removals.",
    )


def _published_widths(sizes: BlockParameters, parameters: float, layers: int) -> tuple[int, ...]:
    rate = parameters / (layers * sizes.ffn)
    return (round(sizes.intermediate_size * (1 - rate)),) * layers


def _aligned_widths(sizes: BlockParameters, parameters: float, align: int, layers: int) -> tuple[int, ...]:
    full = sizes.intermediate_size
    whole_units, rest = divmod(full, align)
    neurons = parameters / sizes.neuron
    kept_units = math.floor((layers * full - neurons) / align + _SLACK)
    if kept_units > layers * whole_units:
        # Less is asked for than trimming every layer to a multiple would take: trim only as many as needed.
        trimmed = math.ceil(neurons / rest - _SLACK)
        return tuple(full - rest * taken for taken in _spread(trimmed, layers))
    base, extra = divmod(max(kept_units, 0), layers)
    return tuple(align * (base + more) for more in _spread(extra, layers))


def _spread(count: int, places: int) -> list[int]:
    """``count`` ones spread as evenly as can be over ``places``, zeros elsewhere (``count <= places``)."""
    return [(place + 1) * count // places - place * count // places for place in range(places)]


def _below(sizes: Mapping[str, int], module: str) -> int:
    return sum(size for name, size in sizes.items() if name.startswith(f"{module}."))
