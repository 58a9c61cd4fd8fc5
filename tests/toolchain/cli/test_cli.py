"""The command line as a user meets it: exit codes, one sentence, nothing half-written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.command_line import PLAIN, PROGRAM, refused, sentei, sentei_program
from toolchain.cli import console


@pytest.fixture(scope="module")
def pruned_pico(demo_pico: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "pruned"
    done = prune(demo_pico, text, out)
    assert done.returncode == 0, done.stderr
    return out


def prune(model: Path, text: Path, out: Path, *more: object) -> subprocess.CompletedProcess[str]:
    defaults = ["--sparsity", 0.3, "--samples", 2, "--seq-len", 64, "--align", 8, "--attention-removals", 1, *PLAIN]
    return sentei("prune", model, "-o", out, "--calibration", text, *defaults, *more)


def test_prune_show_edit_apply(demo_pico: Path, pruned_pico: Path, text: Path, tmp_path: Path):
    shown = json.loads(sentei("plan", "show", pruned_pico, "--json").stdout)
    assert [layer["layer"] for layer in shown["layers"]] == [0, 1, 2, 3]
    assert all(len(layer["kept_neurons"]) == layer["intermediate_size"] for layer in shown["layers"])
    assert len(shown["removed_attention"]) == len(shown["trace"]) == 1
    assert {"removed", "metric", "candidates"} <= set(shown["trace"][0])

    applied = tmp_path / "applied"
    assert sentei("apply", pruned_pico, demo_pico, "-o", applied).returncode == 0
    assert (applied / "model.safetensors").read_bytes() == (pruned_pico / "model.safetensors").read_bytes()

    edited = tmp_path / "edited"
    shutil.copytree(pruned_pico, edited)
    plan = json.loads((edited / "plan.json").read_text())
    plan["layers"][2]["intermediate_size"] = 5
    plan["layers"][3]["attention"] = "remove"
    (edited / "plan.json").write_text(json.dumps(plan))
    done = sentei_program("apply", edited / "plan.json", demo_pico, "-o", tmp_path / "again", "--json", "--quiet")
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert result["intermediate_size"][2] == 5
    assert 3 in result["removed_attention"]
    measured = sentei("evaluate", tmp_path / "again", "--text", text, "--seq-len", 64, "--windows", 2, "--json")
    assert json.loads(measured.stdout)["evaluations"][0]["perplexity"] > 1


def test_two_runs_write_the_same_plan_and_weights(demo_pico: Path, pruned_pico: Path, text: Path, tmp_path: Path):
    assert prune(demo_pico, text, tmp_path / "again").returncode == 0
    for file in ("plan.json", "plan.safetensors", "model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (pruned_pico / file).read_bytes()


def test_help_needs_no_torch():
    program = "import sys, toolchain.cli.app; print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_doctor_names_what_is_here():
    found = json.loads(sentei_program("doctor", "--json").stdout)
    assert found["torch"] == torch.__version__
    assert found["vllm_plugin_registered"] is True
    assert "CPUExecutionProvider" in found["onnxruntime_providers"]


def test_missing_and_empty_model_directories(text: Path, tmp_path: Path):
    refused(prune(tmp_path / "nowhere", text, tmp_path / "out"), "does not exist")
    (tmp_path / "empty").mkdir()
    refused(prune(tmp_path / "empty", text, tmp_path / "out"), "is empty")
    assert not (tmp_path / "out").exists()


def change_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def make_pickle_only(directory: Path) -> None:
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def corrupt_header(directory: Path) -> None:
    file = directory / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"\xff" * 32
    file.write_bytes(data)


def index_outside(directory: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: change_config(d, model_type="bloom", architectures=["BloomForCausalLM"]), "granite, llama, mistral"),
        (make_pickle_only, "only as pickle"),
        (truncate, "corrupt or truncated"),
        (corrupt_header, "corrupt or truncated"),
        (index_outside, "points outside its directory"),
        (lambda d: (d / "config.json").write_text("{"), "not readable JSON"),
        (lambda d: change_config(d, intermediate_size=40), "config.json says intermediate_size 40"),
        (lambda d: change_config(d, num_hidden_layers=3), "more layers than num_hidden_layers = 3"),
        (lambda d: change_config(d, num_hidden_layers=5), "layer 4 has no weights"),
        (lambda d: (d / "tokenizer.json").unlink(), "no usable tokenizer"),
    ],
)
def test_damaged_models(demo_pico: Path, text: Path, tmp_path: Path, damage: Callable[[Path], object], sentence: str):
    shutil.copytree(demo_pico, tmp_path / "model")
    damage(tmp_path / "model")
    refused(prune(tmp_path / "model", text, tmp_path / "out"), sentence)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_too_little_text(demo_pico: Path, text: Path, tmp_path: Path):
    done = prune(demo_pico, text, tmp_path / "out", "--samples", 100)
    refused(done, "it has 761 tokens", "need 6400")


@pytest.mark.parametrize("sparsity", [0, 1, -0.5])
def test_impossible_sparsity(demo_pico: Path, text: Path, tmp_path: Path, sparsity: object):
    refused(prune(demo_pico, text, tmp_path / "out", "--sparsity", sparsity), "outside (0, 1)")


def test_unreachable_sparsity(demo_pico: Path, text: Path, tmp_path: Path):
    done = prune(demo_pico, text, tmp_path / "out", "--sparsity", 0.9, "--attention-removals", 0)
    refused(done, "the highest is 0.")


def test_output_is_never_lost(demo_pico: Path, text: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    refused(prune(demo_pico, text, out), "is not empty", "--force")
    refused(prune(demo_pico, text, out, "--force", "--samples", 100), "too short")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]
    assert prune(demo_pico, text, out, "--force").returncode == 0
    assert not (out / "precious").exists()
    refused(prune(out, text, out, "--force"), "would replace the input")


EDITS = [
    (lambda plan: plan["layers"].pop(), "layers must list 0 to 3"),
    (lambda plan: plan["layers"][1].update(intermediate_size=49), "layer 1: intermediate_size 49 exceeds 48"),
    (lambda plan: plan["layers"][1].update(kept_neurons=[0, 48], intermediate_size=2), "names neuron 48"),
    (lambda plan: plan["layers"][1].update(kept_neurons=[7, 7], intermediate_size=2), "neuron 7 more than once"),
    (lambda plan: plan["layers"][1].update(kept_neurons=[7]), "kept_neurons has 1 entries"),
    (lambda plan: plan["layers"][1].update(heads=3), "layers.1.heads"),
    (lambda plan: plan.update(surprise=1), "surprise"),
    (lambda plan: plan.update(schema_version=99), "schema_version is 99"),
    (lambda plan: plan["base_model"].update(weights_sha256="0"), "other weights"),
]


@pytest.mark.parametrize(("edit", "sentence"), EDITS)
def test_plans_that_do_not_fit(
    demo_pico: Path, pruned_pico: Path, tmp_path: Path, edit: Callable[[dict], object], sentence: str
):
    shutil.copytree(pruned_pico, tmp_path / "plan")
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    edit(plan)
    (tmp_path / "plan" / "plan.json").write_text(json.dumps(plan))
    refused(sentei("apply", tmp_path / "plan", demo_pico, "-o", tmp_path / "out"), sentence)
    assert not (tmp_path / "out").exists()


def test_a_plan_for_another_model(demo_model: Path, pruned_pico: Path, tmp_path: Path):
    refused(sentei("apply", pruned_pico, demo_model, "-o", tmp_path / "out"), "num_hidden_layers 4", "has 30")


def test_a_full_disk_leaves_nothing_behind(demo_pico: Path, text: Path, tmp_path: Path):
    # A limit on file size stands for the disk: the write itself fails, in the middle of a file.
    script = f"ulimit -f 2000; exec {PROGRAM} prune {demo_pico} -o {tmp_path}/out --calibration {text} "
    script += f"--sparsity 0.3 --samples 2 --seq-len 64 --align 8 --attention-removals 1 {' '.join(PLAIN)} --quiet"
    done = subprocess.run(
        ["bash", "-c", f"trap '' XFSZ; {script}"], capture_output=True, text=True, timeout=300, check=False
    )
    refused(done, "No space left on the disk")
    assert [path.name for path in tmp_path.iterdir()] == ["out.search"]  # the finished search, to be resumed
    done = prune(demo_pico, text, tmp_path / "out", "--resume")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_log_says_how_long_work_will_take(capsys, monkeypatch):
    clock = iter(range(0, 400, 40))
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with console.Output(as_json=False, quiet=False).progress("Importance", 4) as advance:
        for _ in range(4):
            advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:-1] == ["Importance: 2 of 4, about 0:01:20 left"]
    assert "4/4" in lines[-1]
