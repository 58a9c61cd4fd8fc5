"""Row 15: files that ask for more than they hold, by layers, nesting or length, ended in hangs and MemoryErrors."""

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import refused, sentei
from toolchain.errors import SenteiError
from toolchain.json_files import parse_json
from toolchain.model.gguf_header import read_gguf_header
from toolchain.model.loading import load_tokenizer


@pytest.fixture
def model(pico_model: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    shutil.copytree(pico_model, directory)
    return directory


def spoil(directory: Path, name: str, **fields: Any) -> None:
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_labels": 10**9}, "num_labels is 1000000000"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ({"num_hidden_layers": 900}, "layer 4 has no weights"),
    ],
)
def test_a_config_that_counts_too_far(model: Path, fields: dict, part: str):
    spoil(model, "config.json", **fields)
    began = time.process_time()
    refused(sentei("generate", model, "--prompt", "hi"), part)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("bomb", ["[" * 200_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "[" + "[]," * 10**7 + "1]"])
def test_nested_and_long_json_in_a_model(model: Path, name: str, bomb: str):
    (model / name).write_text(bomb)
    began = time.process_time()
    refused(sentei("generate", model, "--prompt", "hi"), name)
    assert time.process_time() - began < 2


def test_a_nested_tokenizer(model: Path):
    (model / "tokenizer.json").write_text('{"pre_tokenizer":' * 50_000 + "null" + "}" * 50_000)
    with pytest.raises(SenteiError, match="has no usable tokenizer"):
        load_tokenizer(model)


@pytest.mark.parametrize("name", ["plan.json", "results.json", "evaluation.json", "sweep.json"])
def test_nested_json_in_results(tmp_path: Path, name: str):
    (tmp_path / name).write_text('{"schema_version": 1, "a": ' + "[" * 100_000)
    command = ("plan", "curve", tmp_path) if name in ("plan.json", "sweep.json") else (
        "report", tmp_path, "-o", tmp_path / "report.md"
    )  # fmt: skip
    refused(sentei(*command), f"{name} is not readable JSON", "too deeply nested")


def test_many_keys_one_of_them_twice_take_no_square_of_the_time():
    text = "{" + ",".join(f'"{n:x}": 1' for n in range(300_000)) + ', "493df": 2}'
    began = time.process_time()
    with pytest.raises(SenteiError, match="'493df' is there twice"):
        parse_json(text, "it")
    assert time.process_time() - began < 2


@pytest.mark.parametrize("length", [2**60, 90 * 2**20])
def test_a_safetensors_header_that_claims_to_be_long(model: Path, length: int):
    with (model / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(100 * 2**20)  # sparse
    refused(sentei("generate", model, "--prompt", "hi"), "model.safetensors is corrupt or truncated", f"{length:,}")


def _gguf(*, tensors: int = 0, entries: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + rest


def _entry(kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", 1) + b"k" + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (_gguf(entries=2**60), "it counts 1,152,921,504,606,846,976"),
        (_gguf(tensors=2**60), "it counts 1,152,921,504,606,846,976"),
        (_gguf(entries=1, rest=struct.pack("<Q", 2**60) + b"key"), "ends within its header"),
        (_gguf(entries=1, rest=_entry(8, struct.pack("<Q", 2**60))), "ends within its header"),
        (_gguf(entries=1, rest=_entry(9, struct.pack("<IQ", 0, 2**60))), "it counts"),
        (_gguf(entries=1, rest=_entry(9, struct.pack("<IQ", 9, 5))), "9 is no type"),
        (_gguf(tensors=1, rest=struct.pack("<QIQQIQ", 0, 2, 2**40, 2**40, 0, 0)), "lies outside the file"),
        (b"GGUF", "cannot be read"),
        (b"", "is not a GGUF file"),
    ],
)
def test_a_gguf_header_that_claims_more_than_there_is(tmp_path: Path, content: bytes, part: str):
    (tmp_path / "model.gguf").write_bytes(content)
    began = time.process_time()
    refused(sentei("import", tmp_path / "model.gguf", "-o", tmp_path / "out"), part)
    assert time.process_time() - began < 2
    assert not (tmp_path / "out").exists()


def test_the_demo_models_header_is_read():
    from toolchain.model.gguf import demo_gguf

    assert read_gguf_header(demo_gguf()).num_elements > 134_000_000


def _layers(raw: dict) -> None:
    raw["base_model"]["num_hidden_layers"] = 10**6


def _widths(raw: dict) -> None:
    raw["layers"][0]["kept_neurons"] = [0] * 100_000


def _rung(raw: dict) -> None:
    raw["stage_1"][0]["intermediate_size"] = []


def _removed(raw: dict) -> None:
    raw["trace"][0]["removed"] = 10**9


@pytest.mark.parametrize(
    ("change", "part"),
    [(_layers, "num_hidden_layers"), (_widths, "neuron 0 more than once"), (_rung, "stage_1"), (_removed, "trace")],
)
def test_a_plan_about_what_is_not_there(tmp_path: Path, change: Callable[[dict], None], part: str):
    from tests.serving.report.test_render import write_plan

    write_plan(tmp_path)
    raw = json.loads((tmp_path / "plan.json").read_text())
    change(raw)
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    refused(sentei("plan", "curve", tmp_path), part)
