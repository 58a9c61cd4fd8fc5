import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from toolchain.allocation import BlockParameters, allocate, block_parameters, num_attention_removals
from toolchain.checkpoint import open_checkpoint
from toolchain.errors import SenteiError

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
