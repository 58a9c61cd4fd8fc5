"""``benchmarks/baselines.py`` prunes as FLAP and GISP are defined, counts what is left, and goes on where it ended.

Beside it stands a Llama in NumPy, float64, whose arrays are really cut: a head that is gone has no rows and columns.
Transformers computes norms and softmax in float32 whatever the model's dtype, which sets how near they can be.
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from toolchain.architecture.families import FAMILIES
from toolchain.errors import SenteiError
from toolchain.model.layer_walk import LayerWalk

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
LAYERS, HEADS, GROUPS, HEAD_DIM, HIDDEN, WIDTH, VOCABULARY = 3, 4, 2, 2, 8, 5, 9
EPSILON, THETA = 1e-6, 10_000.0


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import baseline_flap
    import baseline_gisp
    import baseline_units
    import baselines

    return SimpleNamespace(flap=baseline_flap, gisp=baseline_gisp, units=baseline_units, main=baselines)


def tiny(kind: str = "llama", seed: int = 0) -> LayerWalk:
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    torch.manual_seed(seed)
    built = model(
        config(
            hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=GROUPS, head_dim=HEAD_DIM, vocab_size=VOCABULARY, max_position_embeddings=64,
            rms_norm_eps=EPSILON, initializer_range=0.5, tie_word_embeddings=False, attn_implementation="eager",
        )
    ).double()  # fmt: skip
    for name, parameter in built.named_parameters():
        if name.endswith(("bias", "norm.weight", "layernorm.weight")):
            parameter.data = 1 + torch.randn_like(parameter) / 4
        parameter.requires_grad_(False)
    return LayerWalk(built.eval(), FAMILIES[kind])


def windows(num: int = 3, seq_len: int = 7) -> torch.Tensor:
    return torch.randint(VOCABULARY, (num, seq_len), generator=torch.Generator().manual_seed(1))


@dataclass
class Layer:
    """Arrays of a decoder layer as it is left; ``group_of`` has a place among the key-value heads for each head."""

    arrays: dict[str, np.ndarray]
    group_of: list[int]


def arrays_of(walk: LayerWalk) -> list[dict[str, np.ndarray]]:
    return [
        {name.removesuffix(".weight"): each.detach().numpy().copy() for name, each in layer.named_parameters()}
        for layer in walk.model.model.layers
    ]


def cut(layers: list[dict[str, np.ndarray]], kept) -> list[Layer]:
    """Rows, columns, key-value heads and norms of what is gone are not there."""
    found = []
    for arrays, heads, neurons in zip(layers, kept.heads, kept.neurons, strict=True):
        arrays = dict(arrays)
        per_group = HEADS // GROUPS
        groups = [group for group in range(GROUPS) if heads[group * per_group : (group + 1) * per_group].any()]
        dims = lambda units: [unit * HEAD_DIM + each for unit in units for each in range(HEAD_DIM)]  # noqa: E731
        for name, rows in (("q", dims(np.flatnonzero(heads))), ("k", dims(groups)), ("v", dims(groups))):
            for key in (f"self_attn.{name}_proj", f"self_attn.{name}_proj.bias"):
                if key in arrays:
                    arrays[key] = arrays[key][rows]
        arrays["self_attn.o_proj"] = arrays["self_attn.o_proj"][:, dims(np.flatnonzero(heads))]
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            arrays[name] = arrays[name][neurons]
        arrays["mlp.down_proj"] = arrays["mlp.down_proj"][:, neurons]
        if not heads.any():
            del arrays["input_layernorm"]
        if not neurons.any():
            del arrays["post_attention_layernorm"]
        found.append(Layer(arrays, [groups.index(head // per_group) for head in np.flatnonzero(heads)]))
    return found


def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * weight


def rotated(x: np.ndarray) -> np.ndarray:
    """Rotary positions of ``[seq_len, head_dim]``."""
    angles = np.arange(len(x))[:, None] * THETA ** (-np.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)
    cos, sin = np.tile(np.cos(angles), 2), np.tile(np.sin(angles), 2)
    first, second = np.split(x, 2, axis=1)
    return x * cos + np.concatenate([-second, first], axis=1) * sin


def attention_inputs(layer: Layer, x: np.ndarray) -> np.ndarray:
    """What ``o_proj`` reads, ``[seq_len, num_heads_left * head_dim]``."""
    q, k, v = (
        x @ layer.arrays[f"self_attn.{name}_proj"].T + layer.arrays.get(f"self_attn.{name}_proj.bias", 0)
        for name in "qkv"
    )
    of = lambda each, place: each[:, place * HEAD_DIM : (place + 1) * HEAD_DIM]  # noqa: E731
    out = []
    for head, group in enumerate(layer.group_of):
        scores = rotated(of(q, head)) @ rotated(of(k, group)).T / np.sqrt(HEAD_DIM)
        scores[np.triu_indices(len(x), 1)] = -np.inf
        odds = np.exp(scores - scores.max(1, keepdims=True))
        out.append(odds / odds.sum(1, keepdims=True) @ of(v, group))
    return np.concatenate(out, axis=1)


def by_hand(walk: LayerWalk, layers: list[Layer], ids: np.ndarray, biases=None, seen: list | None = None) -> np.ndarray:
    """Log-probabilities ``[seq_len, vocabulary]``; ``seen`` is given what each ``o_proj`` and ``down_proj`` read."""
    model = walk.model
    x = model.model.embed_tokens.weight.numpy()[ids]
    for index, layer in enumerate(layers):
        arrays = layer.arrays
        if layer.group_of:
            inputs = attention_inputs(layer, normed(x, arrays["input_layernorm"]))
            x = x + inputs @ arrays["self_attn.o_proj"].T
            if seen is not None:
                seen.append(inputs)
        if biases is not None:
            x = x + biases.attention[index]
        if len(arrays["mlp.gate_proj"]):
            entering = normed(x, arrays["post_attention_layernorm"])
            gate = entering @ arrays["mlp.gate_proj"].T
            inputs = gate / (1 + np.exp(-gate)) * (entering @ arrays["mlp.up_proj"].T)
            x = x + inputs @ arrays["mlp.down_proj"].T
            if seen is not None:
                seen.append(inputs)
        if biases is not None:
            x = x + biases.ffn[index]
    logits = normed(x, model.model.norm.weight.numpy()) @ model.lm_head.weight.numpy().T
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def loss_by_hand(walk: LayerWalk, layers: list[Layer], ids: torch.Tensor) -> float:
    losses = [-by_hand(walk, layers, row)[np.arange(len(row) - 1), row[1:]].mean() for row in ids.numpy()]
    return float(np.mean(losses))


def log_probabilities(walk: LayerWalk, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return walk.model(torch.from_numpy(ids)[None]).logits[0].log_softmax(1).numpy()


def some_kept(units, seed: int):
    """A layer without attention and FFN, one with half a group, one with a group gone."""
    neurons = np.random.default_rng(seed).random((LAYERS, WIDTH)) < 0.6
    neurons[0] = False
    heads = np.array([[False] * 4, [True, False, True, True], [False, False, False, True]])
    return units.Kept(heads=heads, neurons=neurons)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_masked_model_is_one_that_was_really_cut_and_has_as_many_parameters(bench: SimpleNamespace, kind: str):
    walk = tiny(kind)
    shape, whole, ids = bench.units.read_shape(walk), arrays_of(walk), windows()[0].numpy()
    everything = cut(whole, shape.everything)
    np.testing.assert_allclose(log_probabilities(walk, ids), by_hand(walk, everything, ids), atol=1e-5)
    kept = some_kept(bench.units, 0)
    rng = np.random.default_rng(1)
    biases = bench.units.Biases(attention=rng.normal(size=(LAYERS, HIDDEN)), ffn=rng.normal(size=(LAYERS, HIDDEN)))
    for added in (None, biases):
        with bench.units.pruned(walk, kept, added):
            found = log_probabilities(walk, ids)
        np.testing.assert_allclose(found, by_hand(walk, cut(whole, kept), ids, added), atol=1e-5)
    # As it was, weights and all.
    for before, after in zip(whole, arrays_of(walk), strict=True):
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before)
    for each, num_biases in ((shape.everything, 0), (kept, 6)):
        left = sum(array.size for layer in cut(whole, each) for array in layer.arrays.values())
        if not each.heads[0].any():
            # Projections of a removed attention are empty arrays here.
            assert sum(array.size for array in cut(whole, each)[0].arrays.values()) == 0
        assert bench.units.num_parameters(shape, each, with_biases=False) == left
        assert bench.units.num_parameters(shape, each, with_biases=True) == left + num_biases * HIDDEN


def flap_by_hand(walk: LayerWalk, ids: torch.Tensor, squared: bool, num_units: int):
    """Scores of units, and what each layer's projections read on average."""
    whole, rows = arrays_of(walk), []
    full = SimpleNamespace(heads=np.ones((LAYERS, HEADS), bool), neurons=np.ones((LAYERS, WIDTH), bool))
    for row in ids.numpy():
        seen: list[np.ndarray] = []
        by_hand(walk, cut(whole, full), row, seen=seen)
        rows.append(seen)
    heads, neurons, means = [], [], []
    for place in range(2 * LAYERS):
        inputs = np.concatenate([seen[place] for seen in rows])
        weight = whole[place // 2]["mlp.down_proj" if place % 2 else "self_attn.o_proj"]
        metric = ((inputs - inputs.mean(0)) ** 2).sum(0) / (len(inputs) - 1) * (weight**2).sum(0)
        if squared and place % 2 == 0:
            metric = metric**2
        metric = (metric - metric.mean()) / np.sqrt(((metric - metric.mean()) ** 2).sum() / (len(metric) - 1))
        (neurons if place % 2 else heads).append(metric)
        means.append(inputs.mean(0))
    return np.array(heads).reshape(LAYERS, num_units, -1).mean(2), np.array(neurons), means


@pytest.mark.parametrize("unit", ["head", "group"])
@pytest.mark.parametrize("squared", [False, True])
def test_flap_scores_and_biases_are_its_definition(bench: SimpleNamespace, unit: str, squared: bool):
    walk, ids = tiny("qwen2"), windows()
    shape, statistics = bench.units.read_shape(walk), bench.flap.measure(walk, ids)
    scores = bench.flap.flap_scores(walk, shape, statistics, bench.flap.Flap(unit=unit, squared=squared))
    heads, neurons, means = flap_by_hand(walk, ids, squared, HEADS if unit == "head" else GROUPS)
    np.testing.assert_allclose(scores.heads, heads, atol=1e-5)
    np.testing.assert_allclose(scores.neurons, neurons, atol=1e-5)
    kept, whole = some_kept(bench.units, 2), arrays_of(walk)
    biases = bench.flap.flap_biases(walk, shape, statistics, kept)
    for layer in range(LAYERS):
        gone = np.flatnonzero(~kept.neurons[layer])
        expected = sum(means[2 * layer + 1][j] * whole[layer]["mlp.down_proj"][:, j] for j in gone)
        np.testing.assert_allclose(biases.ffn[layer], expected + np.zeros(HIDDEN), atol=1e-5)
        gone = [h * HEAD_DIM + d for h in np.flatnonzero(~kept.heads[layer]) for d in range(HEAD_DIM)]
        expected = sum(means[2 * layer][j] * whole[layer]["self_attn.o_proj"][:, j] for j in gone)
        np.testing.assert_allclose(biases.attention[layer], expected + np.zeros(HIDDEN), atol=1e-5)


def test_flap_without_its_structure_takes_the_same_share_of_every_layer(bench: SimpleNamespace):
    walk, ids = tiny("llama"), windows()
    shape, statistics = bench.units.read_shape(walk), bench.flap.measure(walk, ids)
    adaptive, even = (
        bench.flap.flap_scores(walk, shape, statistics, bench.flap.Flap(unit="head", structure=each))
        for each in ("AL-AM", "UL-UM")
    )
    whole = bench.units.num_parameters(shape, shape.everything, with_biases=True)
    kept = bench.units.remove_lowest(shape, shape.everything, even, at_most=round(whole * 0.6), with_biases=True)
    assert np.ptp(kept.neurons.sum(1)) <= 1 and np.ptp(kept.heads.sum(1)) <= 1 and not kept.heads.all()
    # Within a layer the order is the same.
    for left, scores in ((kept.heads, adaptive.heads), (kept.neurons, adaptive.neurons)):
        assert all(
            row[stays].min() > row[~stays].max() for stays, row in zip(left, scores, strict=True) if not stays.all()
        )


def test_what_does_not_fluctuate_costs_nothing_with_its_bias(bench: SimpleNamespace):
    """A neuron whose activation is constant has the lowest score of all, and its bias replaces it exactly."""
    walk, ids = tiny("llama"), windows(seq_len=6)
    # Without gate and up from the text, through a norm of zeros: silu(0) * 0 = 0, so all of layer 1's FFN is constant.
    walk.model.model.layers[1].post_attention_layernorm.weight.data[:] = 0
    shape, statistics = bench.units.read_shape(walk), bench.flap.measure(walk, ids)
    assert np.abs(statistics.ffn_variance[1]).max() == 0
    kept = shape.everything
    kept.neurons[1] = False
    biases = bench.flap.flap_biases(walk, shape, statistics, kept)
    before = log_probabilities(walk, ids[0].numpy())
    with bench.units.pruned(walk, kept, biases):
        np.testing.assert_allclose(log_probabilities(walk, ids[0].numpy()), before, atol=1e-5)


def importance_by_hand(walk: LayerWalk, kept, ids: torch.Tensor, unit: str) -> list[dict[str, np.ndarray]]:
    """``|w dL/dw|`` of every weight that is left, by central differences of the loss of the cut model."""
    layers, step, found = cut(arrays_of(walk), kept), 1e-5, []
    for layer in layers:
        found.append({})
        counted = [each for each in layer.arrays if each.endswith("_proj")]
        for name in counted if unit == "group" else [each for each in counted if each[10:11] not in ("k", "v")]:
            weight = layer.arrays[name] = layer.arrays[name].copy()
            slopes = np.zeros_like(weight)
            for place in np.ndindex(weight.shape):
                value, losses = weight[place], []
                for moved in (value + step, value - step):
                    weight[place] = moved
                    losses.append(loss_by_hand(walk, layers, ids))
                weight[place] = value
                slopes[place] = (losses[0] - losses[1]) / (2 * step)
            found[-1][name] = np.abs(weight * slopes)
    return found


def gisp_by_hand(importance: list[dict[str, np.ndarray]], kept, unit: str):
    """Sums over the weights of each unit; removed ones have 0."""
    heads, neurons = np.zeros((LAYERS, HEADS)), np.zeros((LAYERS, WIDTH))
    key_value = np.zeros((LAYERS, GROUPS))
    for layer, found in enumerate(importance):
        for place, head in enumerate(np.flatnonzero(kept.heads[layer])):
            part = slice(place * HEAD_DIM, (place + 1) * HEAD_DIM)
            heads[layer, head] = found["self_attn.q_proj"][part].sum() + found["self_attn.o_proj"][:, part].sum()
        if unit == "group":
            for name in ("self_attn.k_proj", "self_attn.v_proj"):
                key_value[layer] += found[name].reshape(GROUPS, -1).sum(1)
        neurons[layer, kept.neurons[layer]] = (
            found["mlp.gate_proj"].sum(1) + found["mlp.up_proj"].sum(1) + found["mlp.down_proj"].sum(0)
        )
    return (heads.reshape(LAYERS, GROUPS, -1).sum(2) + key_value if unit == "group" else heads), neurons


# What the published code divides by; and the weights that are summed: q and o of a head, q, k, v and o of a group.
DIVISORS = {
    ("head", "published"): (4 * HEAD_DIM * HIDDEN, 3 * WIDTH),
    ("head", "weights"): (2 * HEAD_DIM * HIDDEN, 3 * HIDDEN),
    ("group", "weights"): ((2 * 2 + 2) * HEAD_DIM * HIDDEN, 3 * HIDDEN),
}


@pytest.mark.parametrize(("unit", "divisor"), DIVISORS)
def test_gisp_scores_are_its_definition(bench: SimpleNamespace, unit: str, divisor: str):
    walk, ids = tiny("llama"), windows(2, 5)
    shape = bench.units.read_shape(walk)
    kept = shape.everything
    if unit == "head":
        kept.heads[1, 1] = kept.heads[2, 2] = False
    kept.neurons[0, 2] = kept.neurons[2, :4] = False
    with bench.units.pruned(walk, kept):
        loss = bench.gisp.gradients(walk, ids)
        scores = bench.gisp.gisp_scores(walk, shape, kept, bench.gisp.Gisp(unit=unit, divisor=divisor))
    assert loss == pytest.approx(loss_by_hand(walk, cut(arrays_of(walk), kept), ids), rel=1e-6)
    heads, neurons = gisp_by_hand(importance_by_hand(walk, kept, ids, unit), kept, unit)
    per_head, per_neuron = DIVISORS[unit, divisor]
    np.testing.assert_allclose(scores.heads, heads / per_head, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(scores.neurons, neurons / per_neuron, rtol=1e-4, atol=1e-9)


def test_gisp_scores_again_each_round_and_leaves_the_last_layer_alone(bench: SimpleNamespace):
    walk, ids = tiny("llama", seed=3), windows(2, 6)
    shape, gisp = bench.units.read_shape(walk), bench.gisp.Gisp(unit="head", divisor="published")
    whole = bench.units.num_parameters(shape, shape.everything, with_biases=False)
    budgets = [round(whole * share) for share in (0.85, 0.7)]
    steps = list(bench.gisp.rounds(walk, shape, ids, gisp, budgets, shape.everything))
    before, by_first_scores, first = shape.everything, shape.everything, None
    for budget, found in zip(budgets, steps, strict=True):
        heads, neurons = gisp_by_hand(importance_by_hand(walk, before, ids, "head"), before, "head")
        scores = bench.units.Scores(heads=heads / (4 * HEAD_DIM * HIDDEN), neurons=neurons / (3 * WIDTH))
        scores.heads[-1], scores.neurons[-1] = np.inf, np.inf
        first = first or scores
        expected = bench.units.remove_lowest(shape, before, scores, at_most=budget, with_biases=False)
        assert np.array_equal(found.heads, expected.heads)
        assert np.array_equal(found.neurons, expected.neurons)
        by_first_scores = bench.units.remove_lowest(shape, by_first_scores, first, at_most=budget, with_biases=False)
        before = found
    # The scores of the first round would have ended elsewhere.
    assert not (
        np.array_equal(found.heads, by_first_scores.heads) and np.array_equal(found.neurons, by_first_scores.neurons)
    )
    assert found.heads[-1].all() and found.neurons[-1].all()
    for one, next_one in pairwise([shape.everything, *steps]):
        assert (next_one.heads <= one.heads).all() and (next_one.neurons <= one.neurons).all()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in walk.model.parameters())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_lowest_go_until_the_budget_is_met_and_what_is_gone_stays_gone(data):
    import sys

    sys.path.insert(0, str(BENCHMARKS))
    try:
        import baseline_units as units
    finally:
        sys.path.remove(str(BENCHMARKS))
    groups, per_group = data.draw(st.sampled_from([(1, 3), (2, 2), (4, 1)]))
    layers, width, hidden, head_dim = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9)), 8, 4
    head, key_value, neuron, num_heads = 2 * head_dim * hidden, 2 * head_dim * hidden, 3 * hidden, groups * per_group
    shape = units.Shape(
        num_layers=layers, num_heads=num_heads, num_groups=groups, head_dim=head_dim, width=width, hidden_size=hidden,
        attention=num_heads * head + groups * key_value + hidden, ffn=width * neuron + hidden,
        head=head, key_value=key_value, neuron=neuron,
    )  # fmt: skip
    of_groups, with_biases = data.draw(st.booleans()), data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    num_units = groups if of_groups else num_heads
    scores = units.Scores(heads=rng.normal(size=(layers, num_units)), neurons=rng.normal(size=(layers, width)))
    whole = units.num_parameters(shape, shape.everything, with_biases=with_biases)
    budgets = sorted((data.draw(st.integers(2 * layers * hidden, whole)) for _ in range(2)), reverse=True)
    before = shape.everything
    for budget in budgets:
        found = units.remove_lowest(shape, before, scores, at_most=budget, with_biases=with_biases)
        left = units.num_parameters(shape, found, with_biases=with_biases)
        assert left <= budget
        assert (found.heads <= before.heads).all() and (found.neurons <= before.neurons).all()
        heads = found.heads.reshape(layers, num_units, -1)
        assert (heads.all(2) == heads.any(2)).all()
        was, stays = before.heads.reshape(heads.shape).any(2), heads.any(2)
        if (was & ~stays).any() and stays.any():
            assert scores.heads[was & ~stays].max() < scores.heads[stays].min()
        gone = before.neurons & ~found.neurons
        if gone.any():
            # No room for the best neuron that went.
            layer, place = max(np.argwhere(gone), key=lambda each: scores.neurons[tuple(each)])
            more = units.Kept(heads=found.heads, neurons=found.neurons.copy())
            more.neurons[layer, place] = True
            assert units.num_parameters(shape, more, with_biases=with_biases) > budget
            if found.neurons.any():
                assert scores.neurons[gone].max() < scores.neurons[found.neurons].min()
        before = found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    place = tmp_path / "data"
    place.mkdir()
    text = "The gardener prunes the trees in winter. "
    for name in ("wikitext2_test", "wikitext2_valid"):
        (place / f"{name}.txt").write_text(f"{name} " + text * 60)
    rows = [json.dumps({"text": f"Document {number}. {text * 4}"}) for number in range(1000)]
    (place / "c4_sample_1000docs.jsonl").write_text("\n".join(rows) + "\n")
    return place


def known_of(sparsities: list[float], whole: int, blocks: int, original: list[float]) -> dict:
    """As ``real_models.json`` has it."""

    def row(perplexities: list[float], left: int = whole) -> dict:
        said = {
            "original_num_parameters": whole, "pruned_num_parameters": left, "removed_attention": [],
            "intermediate_size": [48] * 4, "sparsity": (whole - left) / blocks,
        }  # fmt: skip
        texts = {name: {"perplexity": each} for name, each in zip(("wikitext2_test", "c4"), perplexities, strict=True)}
        return {"prune": {"said": said, "cost": {"cpu_s": 1.0}}, "evaluate": {"said": texts}}

    rows = {"original": row(original)}
    for target in sparsities:
        for method in ("default", "2ssp"):
            rows[f"{method} {target:g}"] = row([90_000.0, 80_000.0], whole - round(target * blocks))
    return {"settings": {"windows": 2, "samples": 3, "seq_len": 16}, "models": {"pico": rows}}


def test_the_table_is_filled_goes_on_and_is_not_filled_beside_another_original(
    bench: SimpleNamespace, data: Path, tmp_path: Path, pico_model: Path, monkeypatch: pytest.MonkeyPatch
):
    from toolchain.checkpoint.directory import open_checkpoint

    checkpoint, against, out = open_checkpoint(pico_model), tmp_path / "known.json", tmp_path / "out.json"
    asked = {"out": out, "data": data, "work": tmp_path / "work", "against": against, "num_rounds": 4}

    def note(original: list[float]) -> None:
        known = known_of([0.25, 0.5], checkpoint.num_parameters, checkpoint.num_block_parameters, original)
        against.write_text(json.dumps(known))

    note([1.0, 1.0])
    with pytest.raises(SenteiError, match=r"pico, wikitext: perplexity is .*, and 1.0000 in the results"):
        bench.main.main(pico_model, sparsity=[0.25], **asked)
    found = json.loads(out.read_text())["models"]["pico"]["final"]["original"]
    note([found["wikitext"]["perplexity"], found["c4"]["perplexity"]])
    # The time is over while GISP is half-way: what was done stays.
    made = lambda: sorted((tmp_path / "work").glob("*-gisp-*.npz"))  # noqa: E731
    monkeypatch.setattr(bench.main.Table, "is_late", property(lambda table: len(made()) == 3))
    bench.main.main(pico_model, sparsity=[0.25, 0.5], **asked)
    half = json.loads(out.read_text())["models"]["pico"]["final"]
    assert list(half) == ["original", "flap 0.25", "flap 0.5", "gisp 0.25"]
    done = made()
    stamps = [file.stat().st_mtime_ns for file in done]
    monkeypatch.setattr(bench.main.Table, "is_late", False)
    bench.main.main(pico_model, sparsity=[0.25, 0.5], **asked)
    rows = json.loads(out.read_text())["models"]["pico"]["final"]
    assert [file.stat().st_mtime_ns for file in done] == stamps
    assert list(rows) == ["original", "flap 0.25", "flap 0.5", "gisp 0.25", "gisp 0.5"]
    for row in list(rows)[1:]:
        assert rows[row]["wikitext"]["num_tokens"] == rows[row]["c4"]["num_tokens"] == 2 * 15
        target = checkpoint.num_block_parameters * (1 - float(row.split()[1]))
        left = checkpoint.num_block_parameters * (1 - rows[row]["pruning"]["sparsity"])
        assert target - 3 * 32 - 1 < left <= target + 1
    monkeypatch.setattr(bench.main, "perplexity", None)
    bench.main.main(pico_model, sparsity=[0.25, 0.5], **asked)
    page = out.with_suffix(".md").read_text()
    lines = [line.split(" | ")[0].strip("| ") for line in page.splitlines() if line.startswith("| ")][2:]
    assert lines == [f"{name} {target}" for target in ("0.25", "0.5") for name in ("default", "2ssp", "flap", "gisp")]


def test_variants_are_chosen_on_texts_of_their_own(bench: SimpleNamespace, data: Path, tmp_path: Path):
    (tmp_path / "work").mkdir()
    final, choosing = (bench.main._texts(data, tmp_path / "work", choose=each) for each in (False, True))
    assert final["calibration"] == choosing["calibration"]

    def numbers(path: Path) -> list[int]:
        return [int(json.loads(line)["text"].split()[1].rstrip(".")) for line in path.read_text().splitlines()]

    assert numbers(choosing["c4"]) == list(range(500, 600))
    assert numbers(final["c4"]) == list(range(600, 1000))
    assert choosing["wikitext"].name == "wikitext2_valid.txt" and final["wikitext"].name == "wikitext2_test.txt"
    asked = bench.main._asked
    assert set(asked("flap", choose=True)) == {each for each in bench.main.VARIANTS if each.startswith("flap")}
    assert asked("gisp", choose=False) == {"gisp": bench.main.VARIANTS[bench.main.CHOSEN["gisp"]]}
    with pytest.raises(SenteiError, match="'flap head' is not known"):
        asked("flap head", choose=False)
