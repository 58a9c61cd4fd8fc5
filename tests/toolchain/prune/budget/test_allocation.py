import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import SenteiError
from toolchain.prune.budget.allocation import (
    Allocation,
    BlockParameters,
    Protected,
    allocate,
    alpha_of,
    block_parameters,
    ladder,
    num_attention_removals,
)
from toolchain.prune.budget.ranked_widths import ranked_widths

SMOLLM2 = BlockParameters(
    num_hidden_layers=30,
    intermediate_size=1536,
    attention=884_736,
    attention_norm=576,
    neuron=3 * 576,
    block=3_540_096,
)


@st.composite
def blocks(draw: st.DrawFn) -> BlockParameters:
    hidden = draw(st.sampled_from([32, 64, 576]))
    width = draw(st.integers(8, 3000))
    attention = draw(st.integers(1, 4)) * hidden * hidden
    return BlockParameters(
        num_hidden_layers=draw(st.integers(1, 40)),
        intermediate_size=width,
        attention=attention,
        attention_norm=hidden,
        neuron=3 * hidden,
        block=attention + 3 * hidden * width + 2 * hidden,
    )


def test_block_sizes_are_read_from_the_shapes(demo_model):
    assert block_parameters(open_checkpoint(demo_model)) == SMOLLM2


@pytest.mark.parametrize(("sparsity", "removals", "width"), [(0.25, 2, 1058), (0.375, 4, 836), (0.5, 8, 648)])
def test_published_widths(sparsity: float, removals: int, width: int):
    allocation = allocate(SMOLLM2, sparsity, align=1)
    assert allocation.num_attention_removals == removals
    assert set(allocation.widths) == {width}


@pytest.mark.parametrize(("sparsity", "removals"), [(0.25, 0), (0.375, 2), (0.5, 4)])
def test_ranked_widths_take_more_and_attentions_less(sparsity: float, removals: int):
    allocation = allocate(SMOLLM2, sparsity, align=1, alpha=alpha_of("ranked"))
    assert allocation.num_attention_removals == removals
    # As many parameters as the published split leaves, but for rounding each layer's width.
    assert kept(allocation) == pytest.approx(kept(allocate(SMOLLM2, sparsity, align=1)), abs=30 * 3 * 576)


def kept(allocation: Allocation) -> int:
    gone = allocation.num_attention_removals * (SMOLLM2.attention + SMOLLM2.attention_norm)
    return sum(allocation.widths) * SMOLLM2.neuron - gone


@given(blocks(), st.floats(0.001, 0.999), st.integers(2, 128))
def test_aligned_widths_meet_the_target_within_one_unit(sizes: BlockParameters, sparsity: float, align: int):
    assume(align <= sizes.intermediate_size)
    try:
        allocation = allocate(sizes, sparsity, align=align)
    except SenteiError:
        assume(False)
    removed = allocation.num_attention_removals * (sizes.attention + sizes.attention_norm)
    removed += sum(sizes.intermediate_size - width for width in allocation.widths) * sizes.neuron
    excess = removed - sparsity * sizes.total
    assert -1e-6 * sizes.total <= excess < align * sizes.neuron + 1e-6 * sizes.total
    assert all(align <= width <= sizes.intermediate_size for width in allocation.widths)
    assert all(width % align == 0 or width == sizes.intermediate_size for width in allocation.widths)
    assert max(allocation.widths) - min(allocation.widths) <= align


@given(blocks(), st.floats(0.01, 0.95), st.floats(0.01, 0.95), st.integers(0, 3))
def test_more_sparsity_never_widens(sizes: BlockParameters, one: float, other: float, removals: int):
    low, high = sorted((one, other))
    try:
        wide, narrow = (allocate(sizes, s, align=8, attention_removals=removals) for s in (low, high))
    except SenteiError:
        assume(False)
    assert sum(narrow.widths) <= sum(wide.widths)


@given(blocks(), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_formula_is_monotone_in_sparsity(sizes: BlockParameters, one: float, other: float):
    low, high = sorted((one, other))
    assert num_attention_removals(sizes, low) <= num_attention_removals(sizes, high) <= sizes.num_hidden_layers


def test_the_highest_reachable_sparsity_is_named_and_is_reachable():
    with pytest.raises(SenteiError, match="the highest is") as caught:
        allocate(SMOLLM2, 0.9, align=64, attention_removals=0)
    highest = float(str(caught.value).split("the highest is ")[1].split(". ")[0])
    assert min(allocate(SMOLLM2, highest, align=64, attention_removals=0).widths) >= 64
    with pytest.raises(SenteiError):
        allocate(SMOLLM2, highest + 0.001, align=64, attention_removals=0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"sparsity": 0.0, "align": 64}, "outside (0, 1)"),
        ({"sparsity": 1.0, "align": 64}, "outside (0, 1)"),
        ({"sparsity": float("nan"), "align": 64}, "outside (0, 1)"),
        ({"sparsity": 0.25, "align": 0}, "--align 0"),
        ({"sparsity": 0.25, "align": 2000}, "--align 2000"),
        ({"sparsity": 0.25, "align": 64, "attention_removals": 31}, "--attention-removals 31"),
        ({"sparsity": 0.1, "align": 64, "attention_removals": 30}, "alone exceeds"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments: dict, sentence: str):
    with pytest.raises(SenteiError) as caught:
        allocate(SMOLLM2, arguments.pop("sparsity"), **arguments)
    assert sentence in str(caught.value)


@st.composite
def scores_and_budget(draw: st.DrawFn) -> tuple[list[np.ndarray], tuple[int, ...], int, set[int]]:
    """Scores of some layers, an even split of them, its alignment, and protected layers at full width."""
    align, units, layers = draw(st.integers(1, 8)), draw(st.integers(1, 12)), draw(st.integers(1, 6))
    full = align * units + draw(st.integers(0, align - 1))
    protected = draw(st.sets(st.integers(0, layers - 1)))
    base = draw(st.integers(1, units))
    even = tuple(full if layer in protected else align * base for layer in range(layers))
    values = st.floats(2**-6, 1e4, width=32)
    scores = [draw(arrays(np.float32, full, elements=values)) for _ in range(layers)]
    return scores, even, align, protected


@given(scores_and_budget())
def test_ranked_widths_keep_the_budget_the_floor_and_what_is_protected(drawn):
    scores, even, align, protected = drawn
    widths = ranked_widths(scores, even, align, protected)
    assert sum(widths) == sum(even)
    for layer, (width, evenly) in enumerate(zip(widths, even, strict=True)):
        if layer in protected:
            assert width == evenly
        else:
            assert width % align == 0
            assert max(1, evenly // 2 // align) * align <= width <= len(scores[layer])


@given(scores_and_budget(), st.integers(0, 5))
def test_a_larger_budget_narrows_no_layer(drawn, more: int):
    scores, even, align, _ = drawn
    largest = len(scores[0]) // align * align
    wider = tuple(min(largest, width + more * align) for width in even)
    narrow, wide = (ranked_widths(scores, tuple(min(w, largest) for w in each), align) for each in (even, wider))
    assert all(a <= b for a, b in zip(narrow, wide, strict=True))


def test_ranked_widths_follow_what_the_loss_is_sensitive_to():
    scores = [np.linspace(1, 2, 16, dtype=np.float32) * factor for factor in (1.4, 1.2, 1)]
    # Means of the units above the floor of 4, per layer: 2.38 2.19 2.01 1.82 1.63 ..., 2.04 1.88 1.72 ..., 1.70 ...
    assert ranked_widths(scores, (8, 8, 8), 2) == (12, 8, 4)
    # A common factor says nothing about where neurons matter.
    assert ranked_widths([1000 * each for each in scores], (8, 8, 8), 2) == (12, 8, 4)
    assert ranked_widths([10 * scores[0], *scores[1:]], (8, 8, 8), 2) == (16, 4, 4)


@given(blocks(), st.floats(0.05, 0.9), st.data())
def test_protected_ffns_keep_their_width_and_the_target_is_still_met(
    sizes: BlockParameters, sparsity: float, data: st.DataObject
):
    ffn = data.draw(st.frozensets(st.integers(0, sizes.num_hidden_layers - 1), max_size=3))
    try:
        allocation = allocate(sizes, sparsity, align=8, attention_removals=0, protected=Protected(ffn=ffn))
    except SenteiError:
        assume(False)
    assert all(allocation.widths[layer] == sizes.intermediate_size for layer in ffn)
    removed = sum(sizes.intermediate_size - width for width in allocation.widths) * sizes.neuron
    assert removed >= sparsity * sizes.total * (1 - 1e-6)


@given(st.integers(8, 200), st.integers(1, 16), st.lists(st.integers(1, 200), min_size=1, max_size=6))
def test_a_ladder_only_goes_down(full: int, align: int, widths: list[int]):
    target = [min(full, width) for width in widths]
    rung = ladder(full, target, align)
    rungs = [rung(step, 5) for step in range(6)]
    assert rungs[0] == (full,) * len(target)
    assert rungs[-1] == tuple(target)
    assert all(a >= b for above, below in itertools.pairwise(rungs) for a, b in zip(above, below, strict=True))
