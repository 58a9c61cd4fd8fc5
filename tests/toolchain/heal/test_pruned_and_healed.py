"""``sentei prune --heal-steps``: the same as both commands, interrupted anywhere, and never a pruning lost."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command_line import PLAIN, refused, sentei
from tests.toolchain.heal.stopping import Stop, stopping_at
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import CheckFailedError, SenteiError
from toolchain.heal import pruned_and_healed
from toolchain.heal.heal import HealSettings
from toolchain.heal.pruned_and_healed import prune_and_heal
from toolchain.plan.plan import load_plan
from toolchain.progress import Listener
from toolchain.prune.pipeline import prune
from toolchain.prune.settings import PruneSettings
from toolchain.text.sources import TextSource

PRUNING = ("--sparsity", 0.3, "--samples", 2, "--seq-len", 64, "--align", 8, "--attention-removals", 1, "--quiet")


@pytest.fixture(scope="module")
def pruning(text: Path) -> PruneSettings:
    return PruneSettings(
        sparsity=0.3, calibration=[TextSource(text)], num_samples=2, seq_len=64, align=8, attention_removals=1,
        device="cpu", dtype=torch.float32, seed=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def healing(text: Path) -> HealSettings:
    return HealSettings(
        data=[TextSource(text)], steps=4, batch_size=2, seq_len=16, learning_rate=0.003, lora_rank=4, seed=0,
        device="cpu", dtype=torch.float32,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(
    pico_model: Path, tmp_path_factory: pytest.TempPathFactory, pruning: PruneSettings, healing: HealSettings
) -> tuple[str, Any]:
    """Fingerprint of the weights, and what is said of the healing."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    told = prune_and_heal(open_checkpoint(pico_model), out, pruning, healing, model_name="pico")
    return open_checkpoint(out).fingerprint, told["healing"]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_one_command_does_what_two_do(pico_model: Path, text: Path, tmp_path: Path):
    done = sentei(
        "prune", pico_model, "-o", tmp_path / "one", "--calibration", text, *PRUNING, *PLAIN, "--heal-steps", 3,
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pruned = sentei("prune", pico_model, "-o", tmp_path / "pruned", "--calibration", text, *PRUNING, *PLAIN)
    assert pruned.returncode == 0, pruned.stderr
    healed = sentei(
        "heal", tmp_path / "pruned", "--against", pico_model, "--data", text, "-o", tmp_path / "two", "--steps", 3,
        "--seq-len", 64, "--quiet",
    )  # fmt: skip
    assert healed.returncode == 0, healed.stderr
    assert names(tmp_path) == ["one", "pruned", "two"]
    one, two = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "two")
    assert one.fingerprint == two.fingerprint != open_checkpoint(tmp_path / "pruned").fingerprint
    assert load_plan(one.directory).document == load_plan(two.directory).document
    assert names(one.directory) == names(two.directory)
    result = json.loads(done.stdout)
    assert result["healing"]["steps"] == 3
    assert result["sparsity"] == json.loads((two.directory / "pruning_summary.json").read_text())["sparsity"]


def test_a_person_is_told_what_was_recovered(pico_model: Path, text: Path, tmp_path: Path):
    done = sentei(
        "prune", pico_model, "-o", tmp_path / "out", "--calibration", text, *PRUNING, *PLAIN, "--heal-steps", 3
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 steps of 8 x 64 tokens" in done.stdout
    assert "divergence" in done.stdout


@pytest.mark.parametrize(
    "stage, step",
    [
        pytest.param("Search for attentions", 1, marks=pytest.mark.acceptance),
        pytest.param("Writing the checkpoint", 3, marks=pytest.mark.acceptance),
        ("Healing", 1),
        ("Healing", 4),
    ],
)
def test_interrupted_anywhere_it_goes_on_to_the_same_weights(
    pico_model: Path, tmp_path: Path, pruning: PruneSettings, healing: HealSettings, uninterrupted: tuple[str, Any],
    stage: str, step: int,
):  # fmt: skip
    model, out = open_checkpoint(pico_model), tmp_path / "out"
    with pytest.raises(Stop):
        prune_and_heal(
            model, out, pruning, healing, model_name="pico", listener=Listener(progress=stopping_at(step, stage=stage))
        )
    assert names(tmp_path) == ["out.unhealed"]
    with pytest.raises(SenteiError, match="interrupted pruning with healing"):
        prune_and_heal(model, out, pruning, healing, model_name="pico")
    with pytest.raises(SenteiError, match="begun with another target_sparsity"):
        prune_and_heal(model, out, replace(pruning, sparsity=0.2), healing, model_name="pico", resume=True)
    found = prune_and_heal(model, out, pruning, healing, model_name="pico", resume=True)
    assert names(tmp_path) == ["out"]
    assert (open_checkpoint(out).fingerprint, found["healing"]) == uninterrupted


def test_what_is_pruned_is_not_pruned_again(
    pico_model: Path, tmp_path: Path, pruning: PruneSettings, healing: HealSettings, monkeypatch: pytest.MonkeyPatch
):
    model = open_checkpoint(pico_model)
    with pytest.raises(Stop):
        prune_and_heal(
            model,
            tmp_path / "out",
            pruning,
            healing,
            model_name="pico",
            listener=Listener(progress=stopping_at(1, stage="Healing")),
        )
    monkeypatch.setattr(pruned_and_healed, "prune", None)
    prune_and_heal(model, tmp_path / "out", pruning, healing, model_name="pico", resume=True)
    assert names(tmp_path) == ["out"]


def test_killed_before_the_last_step_it_only_takes_that(
    pico_model: Path, tmp_path: Path, pruning: PruneSettings, healing: HealSettings, monkeypatch: pytest.MonkeyPatch
):
    model, out = open_checkpoint(pico_model), tmp_path / "out"

    def stop(*_: Any, **__: Any) -> None:
        raise Stop

    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(pruned_and_healed, "replace_directory", stop)
        prune_and_heal(model, out, pruning, healing, model_name="pico")
    with pytest.raises(SenteiError, match="another heal_steps: 4 then"):
        prune_and_heal(model, out, pruning, replace(healing, steps=40), model_name="pico", resume=True)
    monkeypatch.setattr(pruned_and_healed, "prune", None)
    monkeypatch.setattr(pruned_and_healed, "heal", None)
    assert prune_and_heal(model, out, pruning, healing, model_name="pico", resume=True)["healing"]["steps"] == 4
    assert names(tmp_path) == ["out"]


def test_where_healing_does_not_help_the_pruned_model_is_the_result(
    pico_model: Path, tmp_path: Path, pruning: PruneSettings, healing: HealSettings
):
    model, out = open_checkpoint(pico_model), tmp_path / "out"
    worse = replace(healing, lora_rank=None, learning_rate=50.0)
    with pytest.raises(CheckFailedError, match=r"did not help.*out holds the model as it was pruned"):
        prune_and_heal(model, out, pruning, worse, model_name="pico")
    assert names(tmp_path) == ["out"]
    prune(model, tmp_path / "pruned", pruning, model_name="pico")
    assert open_checkpoint(out).fingerprint == open_checkpoint(tmp_path / "pruned").fingerprint
    assert load_plan(out).document.healing == []


def test_an_output_is_replaced_only_by_something_whole(
    pico_model: Path, tmp_path: Path, pruning: PruneSettings, healing: HealSettings
):
    model, out = open_checkpoint(pico_model), tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(SenteiError, match="not empty"):
        prune_and_heal(model, out, pruning, healing, model_name="pico")
    with pytest.raises(Stop):
        prune_and_heal(
            model,
            out,
            pruning,
            healing,
            model_name="pico",
            force=True,
            listener=Listener(progress=stopping_at(2, stage="Healing")),
        )
    assert names(out) == ["old"]
    prune_and_heal(model, out, pruning, healing, model_name="pico", force=True, resume=True)
    assert "old" not in names(out)
    assert names(tmp_path) == ["out"]


def test_bad_input_is_refused_before_anything_is_pruned(pico_model: Path, text: Path, tmp_path: Path):
    def refuse(*more: object, says: str):
        refused(sentei("prune", pico_model, "-o", tmp_path / "out", *PRUNING, *PLAIN, *more), says)
        assert list(tmp_path.iterdir()) == []

    data = ("--calibration", text, "--heal-steps", 3)
    refuse("--heal-steps", 3, says="--heal-steps needs text to learn from")
    refuse("--calibration", text, "--heal-steps", 0, says="--heal-steps")
    refuse(*data, "--offload", says="--offload keeps one layer in memory")
    refuse(*data, "--max-degradation", 1.1, says="--max-degradation is kept by the pruned model")
    refuse(*data, "--dtype", "float16", says="does not compute in float16")


def test_a_sweep_is_not_healed(pico_model: Path, text: Path, tmp_path: Path):
    refused(
        sentei(
            "prune", pico_model, "-o", tmp_path / "out", "--calibration", text, "--sweep", "0.1,0.2", "--heal-steps", 3
        ),
        "--sweep writes plans",
    )


def test_without_peft_nothing_is_pruned(pico_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "toolchain.heal.distillation", raising=False)
    command = ("prune", pico_model, "-o", tmp_path / "out", "--calibration", text, *PRUNING, *PLAIN)
    refused(sentei(*command, "--heal-steps", 3), "pip install 'sentei[heal]'")
    assert list(tmp_path.iterdir()) == []
