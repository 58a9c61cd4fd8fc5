"""Row 20, as far as it is about files: numbers that no model and no measurement has ended in tracebacks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.command_line import PLAIN, refused, sentei
from tests.conftest import prune_by_hand
from tests.serving.report.test_render import write_plan, write_results


@pytest.fixture
def model(pico_model: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    shutil.copytree(pico_model, directory)
    return directory


def spoil(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 7}, "num_attention_heads is 7, which num_key_value_heads, 2"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "config.json"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": -2}, "num_key_value_heads is -2"),
        ({"hidden_size": 10**9}, "hidden_size is 1000000000"),
        ({"hidden_size": 2**70}, "hidden_size is"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0"),
        ({"head_dim": "8"}, "head_dim is '8'"),
        ({"architectures": 5}, "architectures is 5"),
        ({"architectures": [{}]}, "architectures is"),
        ({"rope_parameters": {"rope_type": "no such"}}, "config.json"),
        ({"rope_parameters": 5}, "config.json"),
        ({"dtype": "no such"}, "config.json"),
        ({"layer_types": 5}, "config.json"),
    ],
)
def test_dimensions_that_no_model_has(model: Path, tmp_path: Path, text: Path, fields: dict, part: str):
    spoil(model / "config.json", **fields)
    refused(sentei("generate", model, "--prompt", "hi"), part)
    refused(sentei("evaluate", model, "--text", text, "--seq-len", "16", "-o", tmp_path / "out"), part)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["１", "٣", "-0", "+1", "00005", "1_0", " 1", "1" * 5000, "", "4"])
def test_odd_layer_keys(pico_model: Path, tmp_path: Path, key: str):
    prune_by_hand(pico_model, tmp_path, removed_attention={1}, width=lambda layer: 48)
    config = json.loads((tmp_path / "config.json").read_text())
    [override] = config["per_layer_config"].values()
    spoil(tmp_path / "config.json", per_layer_config={key: override})
    refused(sentei("serve", tmp_path), "per_layer_config names layer")


@pytest.mark.parametrize("per_layer", [{"1": {"skip": [[]]}}, {"1": {"skip": [{}]}}, {"1": {"skip": "attention"}}, [1]])
def test_odd_overrides(model: Path, per_layer: Any):
    spoil(model / "config.json", per_layer_config=per_layer)
    refused(sentei("serve", model), "per_layer_config")


@pytest.mark.parametrize("number", ["１", "٣", "00", "-0", "9" * 5000])
def test_odd_layer_numbers_in_tensors(model: Path, number: str):
    tensors = load_file(model / "model.safetensors")
    tensors[f"model.layers.{number}.mlp.up_proj.weight"] = tensors.pop("model.layers.3.mlp.up_proj.weight")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused(sentei("generate", model, "--prompt", "hi"), "model.layers.")


@pytest.mark.parametrize("content", ["[]", '"x"', "1", "null", "[[]]", "{"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_tokenizer_settings_that_are_no_object(model: Path, name: str, content: str):
    (model / name).write_text(content)
    refused(sentei("generate", model, "--prompt", "hi"), name)


@pytest.mark.parametrize("tensor", ["model.layers.2.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_nan_weights_are_named(model: Path, tmp_path: Path, text: Path, tensor: str):
    tensors = load_file(model / "model.safetensors")
    tensors[tensor].view(-1)[::50] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    small = ("--align", "1", "--samples", "2", "--seq-len", "16", "--calibration", text)
    for command in (
        ("prune", model, "-o", tmp_path / "out", "--sparsity", "0.25", *small, *PLAIN),
        ("prune", model, "-o", tmp_path / "out", "--sparsity", "0.25", *small),
        ("prune", model, "-o", tmp_path / "out", "--sparsity", "0.25", *small[2:], "--method", "shortgpt"),
        ("evaluate", model, "--text", text, "--seq-len", "16", "-o", tmp_path / "out"),
    ):
        done = sentei(*command)
        refused(done, "Weight", tensor, "holds NaN", "damaged")
        assert "--dtype" not in done.stderr


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "1e308", "-1e200", "9" * 400])
@pytest.mark.parametrize("command", ["report", "compare"])
def test_results_beyond_measure_are_named(tmp_path: Path, number: str, command: str):
    write_results(tmp_path / "one", gains=[1.2, 1.2, 1.2])
    path = tmp_path / "one" / "results.json"
    results = json.loads(path.read_text())
    results["measurements"][0]["metrics"]["mean_ttft_ms"]["original"]["values"][1] = "HERE"
    path.write_text(json.dumps(results).replace('"HERE"', number))
    more = ("-o", tmp_path / "report.md") if command == "report" else (tmp_path / "one",)
    field = "measurements.0.metrics.mean_ttft_ms.original.values.1 is "
    refused(sentei(command, tmp_path / "one", *more), str(path), field)


def test_a_plan_beyond_measure_is_named(tmp_path: Path):
    write_plan(tmp_path)
    path = tmp_path / "plan.json"
    path.write_text(path.read_text().replace('"metric": 26.0', '"metric": 1e308'))
    refused(sentei("plan", "curve", tmp_path), str(path), "trace.0.metric is 1e+308")


@pytest.mark.parametrize("value", [-1.0, 0, None, "fast", [], {}, True])
def test_times_of_another_kind(tmp_path: Path, value: Any):
    write_results(tmp_path / "one", gains=[1.2, 1.2, 1.2])
    path = tmp_path / "one" / "results.json"
    results = json.loads(path.read_text())
    for measured in results["measurements"][0]["metrics"].values():
        measured["original"]["median"] = value
        measured["original"]["values"] = [value] * 3
    path.write_text(json.dumps(results))
    for command in (("report", tmp_path, "-o", tmp_path / "report.md", "--force"), ("compare", path, path)):
        done = sentei(*command)
        assert "Traceback" not in done.stderr
        assert done.returncode in (0, 2), done.stderr


@pytest.mark.parametrize("key", ["vocab_size", "num_attention_heads", "hidden_size"])
def test_a_dimension_that_is_missing(model: Path, key: str):
    # Transformers has defaults for them; what is computed without Transformers has none.
    config = json.loads((model / "config.json").read_text())
    del config[key]
    (model / "config.json").write_text(json.dumps(config))
    from serving.readiness import examine_directory

    found = examine_directory(model)
    assert any(key in problem for problem in found["problems"])
