"""Compensation: the fit against brute force, and what it gains on text it has not seen."""

import math
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from tests.command_line import PLAIN, refused, sentei
from tests.families import VARIANTS, make_family_pico
from toolchain.checkpoint.directory import open_checkpoint, same_bits
from toolchain.errors import SenteiError
from toolchain.metrics.perplexity import perplexity
from toolchain.model import layer_walk
from toolchain.model.disk_layers import open_walk
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import load_tokenizer
from toolchain.plan.plan import load_plan
from toolchain.progress import no_progress
from toolchain.prune import apply as application
from toolchain.prune.compensation import Compensated, _is_held_out, compensate
from toolchain.prune.ridge_fit import Moments, Refit, best_fit, ridge_fits, squared_errors
from toolchain.prune.stage_files import StageFiles
from toolchain.text.embedded import documents
from toolchain.text.sources import TextSource
from toolchain.text.windows import _Stretches, _together

SETTINGS = (
    "--samples", 8, "--seq-len", 16, "--align", 8, "--attention-removals", 1, "--sparsity", 0.3, "--quiet",
    "--widths", "uniform",
)  # fmt: skip


def moments_of(x: torch.Tensor, y: torch.Tensor) -> Moments:
    moments = Moments(x.shape[1], y.shape[1], x.device)
    moments.add(x[None], y[None])
    moments.complete()
    return moments


def refit(weight: torch.Tensor, fitted: Moments, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> Refit:
    """``x`` and ``y`` are held out."""
    fits = ridge_fits(weight, fitted, dtype)
    return best_fit(fits, squared_errors([weight, *fits.values()], x, y).tolist())


def error(weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> float:
    left, energy = squared_errors([weight], x, y).tolist()
    return left / energy


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, targets and an old weight: 300 tokens, 12 inputs, 5 outputs."""
    torch.manual_seed(0)
    x = torch.randn(300, 12)
    return x, x @ torch.randn(12, 5) + 0.1 * torch.randn(300, 5), torch.randn(5, 12)


def test_the_fit_is_least_squares_with_ridge_rows(data):
    x, y, weight = (each.double() for each in data)
    fit = moments_of(x, y).ridge_fit(weight, 0.1)
    # The same problem, with the penalty as further rows of data.
    strengths = 0.1 * x.square().sum(0)
    rows = torch.cat([x, strengths.sqrt().diag()])
    wanted = torch.cat([y, strengths.sqrt()[:, None] * weight.T])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    assert torch.allclose(fit, expected, atol=1e-4)


def test_the_unit_of_an_input_does_not_matter(data):
    x, y, weight = (each.double() for each in data)
    units = torch.logspace(-1, 1, 12, dtype=torch.float64)
    fit, scaled = moments_of(x, y).ridge_fit(weight, 1.0), moments_of(x * units, y).ridge_fit(weight / units, 1.0)
    assert torch.allclose(scaled * units, fit, atol=1e-4)


def test_an_input_that_is_always_zero_keeps_its_weight(data):
    x, y, weight = data
    x[:, 3] = 0
    assert torch.allclose(moments_of(x, y).ridge_fit(weight, 1.0)[:, 3].float(), weight[:, 3])


def test_errors_are_those_of_the_data(data):
    x, y, weight = data
    expected = [(x @ each.T - y).square().sum() for each in (weight, 2 * weight)] + [y.square().sum()]
    found = squared_errors([weight, 2 * weight], x[None], y[None])
    assert found.tolist() == pytest.approx(list(map(float, expected)), rel=1e-5)


def test_products_of_bfloat16_activations_lose_nothing(data):
    before = torch.get_float32_matmul_precision()
    x, y = (each.repeat(8, 8).bfloat16() for each in data[:2])
    moments = moments_of(x, y)
    for got, wanted in ((moments.gram, x.double().T @ x.double()), (moments.cross, y.double().T @ x.double())):
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    weight = data[2].repeat(8, 8).bfloat16()
    exact = (x.double() @ weight.double().T - y.double()).square().sum()
    assert float(squared_errors([weight], x, y)[0]) == pytest.approx(float(exact), rel=1e-5)
    assert torch.get_float32_matmul_precision() == before


def test_a_fit_that_overflowed_does_not_hide_the_others(data):
    fits = {ridge: data[2] + ridge for ridge in (0.1, 1.0, 10.0)}
    found = best_fit(fits, [1.0, math.nan, 0.2, 0.3, 2.0])
    assert (found.ridge, found.error_before, found.error_after) == (1.0, 0.5, 0.1)
    assert best_fit(fits, [1.0, math.nan, math.nan, math.nan, 2.0]).weight is None


def test_a_refit_is_never_worse_on_what_it_was_fitted_to(data):
    x, y, weight = data
    fitted = moments_of(x[:250], y[:250])
    result = refit(weight, fitted, x[250:], y[250:], torch.float32)
    assert result.weight is not None
    assert result.error_after < result.error_before
    assert error(result.weight, x[:250], y[:250]) < error(weight, x[:250], y[:250])


@pytest.mark.parametrize("num_windows", [2, 7, 8, 15, 32, 100])
def test_one_window_in_eight_is_held_out(num_windows: int):
    held_out = [number for number in range(num_windows) if _is_held_out(number, num_windows)]
    assert 1 <= len(held_out) < num_windows
    assert num_windows // 8 <= len(held_out) <= num_windows // 8 + 1


@pytest.mark.parametrize("num_texts", [2, 4, 8])
def test_each_text_of_a_mixture_has_a_window_held_out(num_texts: int):
    texts = [TextSource(None)] * num_texts
    windows = [torch.full((64 // num_texts, 4), number) for number in range(num_texts)]
    ids = _together(texts, [_Stretches(ids=each, bos=None, holds_chats=False) for each in windows]).ids
    assert {int(row[0]) for number, row in enumerate(ids) if _is_held_out(number, len(ids))} == set(range(num_texts))


def test_windows_that_are_held_out_leave_no_trace_in_the_weight(data):
    x, y, weight = data
    fitted = moments_of(x[:250], y[:250])
    result = refit(weight, fitted, x[250:], y[250:], torch.float64)
    assert result.weight is not None
    assert torch.allclose(result.weight, moments_of(x[:250], y[:250]).ridge_fit(weight, result.ridge))


def test_held_out_tokens_guard_against_overfitting():
    torch.manual_seed(1)
    weight = torch.randn(3, 40)
    x, unseen = torch.randn(20, 40), torch.randn(500, 40)
    # Fewer tokens than inputs, and noise: what fits these says nothing about others.
    noise = x @ weight.T + 5 * torch.randn(20, 3)
    noisy = moments_of(x, noise)
    result = refit(weight, noisy, unseen, unseen @ weight.T, torch.float32)
    assert result.weight is None
    assert error(noisy.ridge_fit(weight, 1e-4), x, noise) < 0.01


def prune(model: Path, out: Path, text: Path, *more: object):
    return sentei("prune", model, "-o", out, "--calibration", text, *SETTINGS, *more)


def test_prune_and_apply_write_the_same_compensated_weights(pico_model: Path, text: Path, tmp_path: Path):
    assert prune(pico_model, tmp_path / "plain", text, "--no-compensate").returncode == 0
    assert prune(pico_model, tmp_path / "out", text, "--compensate").returncode == 0
    plan = load_plan(tmp_path / "out")
    assert plan.document.compensation is not None
    refitted = {f"model.layers.{each.layer}.{each.projection}.weight" for each in plan.document.compensation.refits}
    assert plan.document.compensation.final_norm_factor != 1
    refitted.add("model.norm.weight")
    plain, compensated = open_checkpoint(tmp_path / "plain"), open_checkpoint(tmp_path / "out")
    assert refitted
    assert refitted == {name for name in plain.tensors if not same_bits(plain.read(name), compensated.read(name))}
    assert plain.shapes == compensated.shapes
    assert "re-fitted" in (tmp_path / "out" / "README.md").read_text()
    assert "re-fitted" in sentei("plan", "show", tmp_path / "out").stdout

    apply = ("apply", tmp_path / "out", pico_model, "-o", tmp_path / "again")
    refused(sentei(*apply), "--calibration")
    other = tmp_path / "other.txt"
    other.write_text("Something else is written here. " * 200)
    refused(sentei(*apply, "--calibration", other), "is not the text")
    assert sentei(*apply, "--calibration", text).returncode == 0
    assert open_checkpoint(tmp_path / "again").fingerprint == compensated.fingerprint


def test_layers_from_disk_are_fitted_alike(pico_model: Path, text: Path, tmp_path: Path):
    for name, more in (("memory", ()), ("disk", ("--offload",))):
        assert prune(pico_model, tmp_path / name, text, "--compensate", *more).returncode == 0
    one, other = (open_checkpoint(tmp_path / name) for name in ("memory", "disk"))
    for name in one.tensors:
        assert torch.allclose(one.read(name), other.read(name), atol=1e-4)


def test_the_published_method_is_never_compensated(pico_model: Path, text: Path, tmp_path: Path):
    refused(prune(pico_model, tmp_path / "out", text, "--method", "2ssp", "--compensate"), "--method 2ssp")
    refused(prune(pico_model, tmp_path / "out", text, "--method", "2ssp", "--widths", "ranked"), "knows no --widths")
    refused(prune(pico_model, tmp_path / "out", text, "--compensate", "--samples", 1), "2 calibration windows")


def test_ranked_widths_and_compensation_are_on_unless_a_method_is_named(pico_model: Path, text: Path, tmp_path: Path):
    settings = ("--calibration", text, "--samples", 8, "--seq-len", 16, "--align", 8, "--sparsity", 0.3, "--quiet")
    for name, more in (("ours", ()), ("published", ("--method", "2ssp"))):
        assert sentei("prune", pico_model, "-o", tmp_path / name, *settings, *more).returncode == 0
    ours, published = (load_plan(tmp_path / name).document for name in ("ours", "published"))
    assert (ours.widths, published.widths) == ("ranked", "uniform")
    assert ours.compensation is not None
    assert published.compensation is None


def walk_of(model: Path) -> LayerWalk:
    return open_walk(open_checkpoint(model), dtype=torch.float32, device="cpu", offload=False)


NARROW = [np.arange(40) for _ in range(4)]


def compensated(
    walk: LayerWalk, model: Path, ids: torch.Tensor, directory: Path, kept=NARROW, removed=()
) -> Compensated:
    dtypes = {name: info.dtype for name, info in open_checkpoint(model).tensors.items()}
    return compensate(walk, kept, removed, ids, StageFiles(directory, "this"), dtypes=dtypes)


@pytest.mark.parametrize("family", VARIANTS)
def test_every_familys_last_layer_comes_closer_to_the_original(family: str, tmp_path: Path):
    torch.manual_seed(0)
    for number, variant in enumerate(VARIANTS[family]):
        make_family_pico(model := tmp_path / f"model-{number}", family, variant)
        checkpoint, ids = open_checkpoint(model), torch.randint(3, 96, (16, 32))
        whole = [np.arange(48) for _ in range(4)]
        unchanged = compensated(walk_of(model), model, ids, tmp_path / f"whole-{number}", kept=whole)
        assert (unchanged.records, unchanged.final_norm_factor, unchanged.tensors) == ([], 1, {}), variant

        plain, pruned = walk_of(model), walk_of(model)
        plain.layers.narrow(NARROW)
        plain.layers.remove_attention(1)
        done = compensated(pruned, model, ids, tmp_path / f"weights-{number}", removed=[1])
        assert {each.layer for each in done.records} >= {0, 1}, variant
        assert all(each.error_after < each.error_before for each in done.records), variant
        with torch.inference_mode():
            wanted, before, after = (walk.forward(walk.embed(ids)) for walk in (walk_of(model), plain, pruned))
        assert (after - wanted).square().sum() < 0.9 * (before - wanted).square().sum(), variant

        # The factor of the last norm is the best one for the windows that were held out, in steps of 1 %.
        norm = f"{checkpoint.family.final_norm}.weight"
        assert torch.equal(done.tensors[norm].read(norm), pruned.final_norm.weight), variant
        with torch.inference_mode():
            says, wanted = (plain.final_norm(states[[7, 14]]) for states in (after, wanted))
            errors = {step: float((says * step / 100 - wanted).square().sum()) for step in range(1, 200)}
            scaled = pruned.final_norm(after[[7, 14]])
        assert done.final_norm_factor == pytest.approx(min(errors, key=errors.__getitem__) / 100, abs=0.006), variant
        assert torch.allclose(scaled, says * done.final_norm_factor, rtol=1e-2, atol=1e-3), variant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", VARIANTS)
def test_inputs_that_are_kept_change_nothing(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_family_pico(model := tmp_path / "model", family, next(iter(VARIANTS[family])))
    ids, found, runs = torch.randint(3, 96, (9, 32)), [], []
    for free in (2**40, 0):
        monkeypatch.setattr(layer_walk, "available_bytes", lambda device, free=free: free)
        walk = open_walk(open_checkpoint(model), dtype=dtype, device="cpu", offload=False)
        found.append(compensated(walk, model, ids, tmp_path / f"{free}", removed=[1]))
        runs.append(walk.num_layer_forwards)
    kept, again = found
    # A norm behind a projection needs the layer itself.
    assert runs[0] == runs[1] if walk.family.norms_outputs else runs[0] < runs[1]
    assert kept.records == again.records
    assert kept.held_out_perplexity_after == again.held_out_perplexity_after
    for name, info in kept.tensors.items():
        assert same_bits(info.read(name), again.tensors[name].read(name))


def test_one_window_of_a_layer_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layer_walk, "available_bytes", lambda device: 0)
    make_family_pico(model := tmp_path / "model", "llama", "grouped")
    walk, ids = walk_of(model), torch.randint(3, 96, (4, 16))
    inputs: list[weakref.ref] = []

    def watch(_module, given, _says):
        assert not any(each() is not None for each in inputs)
        inputs[:] = [weakref.ref(given[0])]

    for layer in walk.model.model.layers:
        layer.mlp.down_proj.register_forward_hook(watch)
    assert compensated(walk, model, ids, tmp_path / "weights").records
    assert inputs


def test_memory_that_runs_out_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(application, "compensate", full)
    monkeypatch.setattr(application, "_digest_of_fit", lambda plan: "")
    checkpoint, plan = SimpleNamespace(tensors={}), MagicMock(layout=[])
    with pytest.raises(SenteiError, match="Memory ran out"):
        application._compensate(MagicMock(), checkpoint, plan, MagicMock(), tmp_path, no_progress)  # type: ignore[arg-type]


@pytest.mark.acceptance
def test_it_gains_on_text_it_has_not_seen(demo_model: Path, tmp_path: Path):
    found, text = {}, tmp_path / "text.txt"
    *calibration, unseen = documents()[::5]
    text.write_text("\n\n".join(calibration))
    settings = ("--samples", 24, "--seq-len", 256, "--sparsity", 0.375, "--attention-removals", 1, "--quiet")
    for name, more in (("plain", PLAIN), ("compensated", ("--widths", "uniform"))):
        done = sentei("prune", demo_model, "-o", tmp_path / name, "--calibration", text, *settings, *more)
        assert done.returncode == 0, done.stderr
        ids = load_tokenizer(demo_model)(unseen, return_tensors="pt")["input_ids"][:, :512]
        found[name] = perplexity(walk_of(tmp_path / name), ids).perplexity
    assert found["compensated"] < 0.8 * found["plain"]
