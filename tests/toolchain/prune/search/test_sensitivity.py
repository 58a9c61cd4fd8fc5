"""Sensitivity of neurons against gradients of the whole model, taken the plain way."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.families import VARIANTS, make_family_pico
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.model import layer_walk
from toolchain.model.disk_layers import open_walk
from toolchain.plan.plan import load_plan
from toolchain.prune.pipeline import prepare, prune
from toolchain.prune.search.importance import neuron_importance
from toolchain.prune.search.sensitivity import Sensitivity, neuron_sensitivity
from toolchain.prune.settings import PruneSettings


def walk_of(model: Path, *, offload: bool = False):
    return open_walk(open_checkpoint(model), dtype=torch.float32, device="cpu", offload=offload)


@pytest.mark.parametrize("family", VARIANTS)
def test_it_is_the_slope_of_the_loss_along_each_neuron_and_its_square_by_token(family: str, tmp_path: Path):
    torch.manual_seed(0)
    for number, variant in enumerate(VARIANTS[family]):
        make_family_pico(directory := tmp_path / f"model-{number}", family, variant)
        walk, ids = walk_of(directory), torch.randint(3, 96, (3, 32))
        projections = [walk.model.get_submodule(walk.family.layers)[i].get_submodule(walk.family.ffn_output)
                       for i in range(4)]  # fmt: skip
        gates = [torch.ones(1, 32, each.in_features, requires_grad=True) for each in projections]
        handles = [
            each.register_forward_pre_hook(lambda _module, inputs, gate=gate: (inputs[0] * gate,))
            for each, gate in zip(projections, gates, strict=True)
        ]
        slopes, fisher = ([torch.zeros(each.in_features) for each in projections] for _ in range(2))
        for row in ids.split(1):
            loss = walk.model(row, labels=row).loss * (row.shape[1] - 1)
            for index, [by_token] in enumerate(torch.autograd.grad(loss, gates)):
                slopes[index] += by_token.sum(0).abs() / len(ids)
                fisher[index] += by_token.square().sum(0) / len(ids)
        for handle in handles:
            handle.remove()
        # Whatever ran before, in whatever mode.
        norms = neuron_importance(walk, ids)
        found = neuron_sensitivity(walk, ids)
        for mine, theirs in zip((*found.slope, *found.fisher), (*slopes, *fisher), strict=True):
            assert np.allclose(mine, theirs.numpy(), rtol=1e-3, atol=1e-4 * float(theirs.max())), variant
        for seen, scored in zip(found.importance, norms, strict=True):
            assert np.allclose(seen, scored, rtol=1e-5), variant


def test_layers_from_disk_say_the_same_however_many_windows_go_together(
    pico_model: Path, monkeypatch: pytest.MonkeyPatch
):
    ids = torch.randint(3, 96, (5, 16), generator=torch.Generator().manual_seed(0))
    expected, visits = neuron_sensitivity(walk_of(pico_model), ids), []
    walk = walk_of(pico_model, offload=True)
    lend = walk.layers.layer
    monkeypatch.setattr(walk.layers, "layer", lambda index, **how: visits.append(index) or lend(index, **how))
    a_window = 5 * 16 * walk.model.config.hidden_size * 4
    for together, num_groups in ((5, 1), (2, 3), (0, 5)):
        monkeypatch.setattr(layer_walk, "available_bytes", lambda device, n=together: 8 * n * a_window)
        visits.clear()
        found = neuron_sensitivity(walk, ids)
        assert len(visits) == 2 * 4 * num_groups
        for kind in ("slope", "fisher", "importance"):
            pairs = zip(getattr(expected, kind), getattr(found, kind), strict=True)
            assert all(np.array_equal(here, there) for here, there in pairs), kind


def test_neurons_are_weighed_layer_by_layer():
    ones = np.ones(2, np.float32)
    fisher = (np.array([16, 1], np.float32), np.array([0, 81], np.float32))
    found = Sensitivity(slope=(ones, ones), fisher=fisher, importance=(ones, ones))
    first, second = found.weigh((np.array([1, 3], np.float32), ones))
    assert first.tolist() == [2, 3]
    assert second.tolist() == pytest.approx([0, 3])


@pytest.mark.parametrize("num_samples", [8, 11])
def test_ranked_importance_is_of_all_windows(num_samples: int, pico_model: Path, tmp_path: Path):
    """Also of those that the gradients are not taken on."""
    settings = PruneSettings(
        sparsity=0.25, calibration=[], num_samples=num_samples, seq_len=32, align=8, attention_removals=1,
        device="cpu", dtype=torch.float32, seed=0, widths="ranked",
    )  # fmt: skip
    prune(pico_model, tmp_path / "out", settings, model_name="pico")
    ids = prepare(pico_model, settings, "pico").windows.ids
    seen = neuron_sensitivity(walk_of(pico_model), ids[:8])
    expected = seen.weigh(neuron_importance(walk_of(pico_model), ids))
    for found, scores in zip(load_plan(tmp_path / "out").importance, expected, strict=True):
        assert np.allclose(found, scores, rtol=1e-4)
