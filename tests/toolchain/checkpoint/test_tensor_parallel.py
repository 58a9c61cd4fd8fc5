"""Widths that every rank can hold whole tiles of: chosen so at prune time, refused before the search where none are."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from export.vllm import check_tensor_parallel
from tests.command_line import PLAIN, refused, sentei
from tests.conftest import make_pico
from toolchain.architecture.families import FAMILIES
from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import Checkpoint, open_checkpoint
from toolchain.checkpoint.tensor_parallel import possible_ranks, width_unit
from toolchain.errors import SenteiError
from toolchain.prune.budget.allocation import BlockParameters, Protected, allocate, ladder


def unpruned(width: int, heads: int, kv_heads: int, layers: int) -> Checkpoint:
    config = {"intermediate_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    layout = (LayerLayout(attention=True, intermediate_size=width),) * layers
    return Checkpoint(Path("model"), config, FAMILIES["llama"], layout, {})


@given(
    ranks=st.sampled_from([1, 2, 3, 4, 8]),
    share=st.integers(1, 3000),
    align=st.integers(1, 128),
    sparsity=st.floats(0.01, 0.95),
    removals=st.integers(0, 4),
    protected=st.frozensets(st.integers(0, 5), max_size=2),
)
def test_every_width_on_the_way_and_at_the_end_can_be_split(
    ranks: int, share: int, align: int, sparsity: float, removals: int, protected: frozenset[int]
):
    """Whatever width the model has, as long as the ranks can split the model as it is."""
    width, layers = ranks * share, 6
    assume(ranks == 1 or align <= share)
    unit = width_unit(unpruned(width, 2 * ranks, ranks, layers), align=align, tensor_parallel=ranks)
    assert unit == align * ranks
    sizes = BlockParameters(
        num_hidden_layers=layers,
        intermediate_size=width,
        attention=64 * 64 * 3,
        attention_norm=64,
        neuron=3 * 64,
        block=64 * 64 * 3 + 3 * 64 * width + 2 * 64,
    )
    try:
        allocation = allocate(
            sizes, sparsity, align=unit, attention_removals=removals, protected=Protected(ffn=protected)
        )
    except SenteiError:
        assume(False)
    rungs = [ladder(width, allocation.widths, unit)(step, 4) for step in range(5)]
    assert rungs[-1] == allocation.widths
    # The published widths, of one rank and no alignment, are whatever the formula says.
    assume(unit > 1)
    for kept in (kept for rung in rungs for kept in rung):
        assert kept % ranks == 0
        assert kept == width or kept // ranks % align == 0


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 4096))
def test_possible_ranks_are_those_the_export_accepts(heads: int, groups: int, width: int):
    checkpoint = unpruned(width, heads * groups, heads, 2)
    possible = possible_ranks(checkpoint)
    assert 1 in possible
    for ranks in range(1, heads * groups + 2):
        try:
            check_tensor_parallel(checkpoint, ranks)
        except SenteiError:
            assert ranks not in possible
        else:
            assert ranks in possible


def test_a_pruned_layer_is_split_too():
    checkpoint = unpruned(96, 8, 8, 3)
    assert possible_ranks(checkpoint) == [1, 2, 4, 8]
    narrow = (LayerLayout(attention=True, intermediate_size=36), LayerLayout(attention=False, intermediate_size=0))
    assert possible_ranks(replace(checkpoint, layout=(*checkpoint.layout, *narrow))) == [1, 2, 4]


def prune(model: Path, text: Path, out: Path, *more: object):
    settings = ["--sparsity", 0.3, "--samples", 2, "--seq-len", 64, "--attention-removals", 1, *PLAIN]
    return sentei("prune", model, "-o", out, "--calibration", text, *settings, *more)


def test_each_rank_gets_a_multiple_of_align(pico_model: Path, text: Path, tmp_path: Path):
    done = prune(pico_model, text, tmp_path / "two", "--align", 4, "--tensor-parallel", 2)
    assert done.returncode == 0, done.stderr
    written = open_checkpoint(tmp_path / "two")
    check_tensor_parallel(written, 2)
    assert all(layer.intermediate_size % 8 == 0 for layer in written.layout)
    # Only the multiple counts, so the plan is that of twice the alignment.
    assert prune(pico_model, text, tmp_path / "one", "--align", 8).returncode == 0
    assert (tmp_path / "two" / "plan.json").read_bytes() == (tmp_path / "one" / "plan.json").read_bytes()
    assert json.loads((tmp_path / "two" / "plan.json").read_text())["align"] == 8


@pytest.mark.parametrize(
    ("settings", "sentences"),
    [
        (
            ["--tensor-parallel", 3],
            ["4 attention heads, 2 key-value heads and FFN width 48", "Possible here: 1, 2, 4."],
        ),
        (["--tensor-parallel", 0], ["Possible here: 1, 2, 4."]),
        (["--tensor-parallel", 2, "--align", 32], ["in multiples of 64, and the whole width is 48", "24 is the most"]),
        (["--tensor-parallel", 4, "--align", 12, "--sparsity", 0.6], ["in multiples of 48: the highest is 0."]),
    ],
)
def test_what_cannot_be_split_is_refused_before_the_search(
    pico_model: Path, text: Path, tmp_path: Path, settings: list[object], sentences: list[str]
):
    refused(prune(pico_model, text, tmp_path / "out", *settings), *sentences)
    assert not list(tmp_path.iterdir())


def test_a_full_width_that_cannot_be_split_is_refused(demo_model: Path, text: Path, tmp_path: Path):
    make_pico(tmp_path / "model", intermediate_size=50)
    refused(prune(tmp_path / "model", text, tmp_path / "out", "--tensor-parallel", 4), "Possible here: 1, 2.")


def test_a_limit_on_the_way_keeps_multiples_where_the_full_width_is_none():
    rung = ladder(100, [64, 100, 32, 96], 32)
    assert [rung(step, 4) for step in range(5)] == [
        (100, 100, 100, 100),
        (96, 100, 96, 96),
        (96, 100, 64, 96),
        (96, 100, 64, 96),
        (64, 100, 32, 96),
    ]
    assert math.gcd(*(width for step in range(1, 5) for width in rung(step, 4) if width != 100)) == 32
