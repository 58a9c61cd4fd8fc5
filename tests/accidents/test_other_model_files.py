"""Model directories of strangers, beyond the issue's table: settings that name code, bombs, others' settings."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import refused, sentei
from toolchain.model.loading import load_model

GENERATION = "generation_config.json"


@pytest.fixture
def model(pico_model: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    shutil.copytree(pico_model, directory)
    return directory


@pytest.fixture(scope="module")
def plain_text(pico_model: Path) -> str:
    done = generate(pico_model)
    assert done.returncode == 0
    return done.stdout


def spoil(path: Path, **fields: Any) -> None:
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | fields))


def generate(directory: Path, *options: object) -> Any:
    return sentei("generate", directory, "--prompt", "The gardener prunes", "--max-new-tokens", "4", *options)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_experts_implementation"])
@pytest.mark.parametrize("name", ["kernels-community/flash-attn", "somebody/code", "flash_attention_2"])
def test_a_config_names_no_code_of_the_hub(model: Path, plain_text: str, key: str, name: str):
    spoil(model / "config.json", **{key: name})
    assert load_model(model).config._attn_implementation == "sdpa"
    assert generate(model).stdout == plain_text


@pytest.mark.parametrize(
    "fields",
    [{"return_dict": False}, {"is_encoder_decoder": True}, {"output_attentions": True, "output_hidden_states": True}],
    ids=str,
)
def test_what_a_config_says_of_outputs_changes_none(model: Path, plain_text: str, tmp_path: Path, text: Path, fields):
    spoil(model / "config.json", **fields)
    assert generate(model).stdout == plain_text
    assert sentei("evaluate", model, "--text", text, "--seq-len", "16", "-o", tmp_path / "out").returncode == 0


@pytest.mark.parametrize("method", ["bitsandbytes", "mxfp4", "no such"])
def test_a_library_for_quantised_weights_is_not_asked(model: Path, method: str):
    spoil(model / "config.json", quantization_config={"quant_method": method})
    refused(generate(model), "quantised checkpoints are not supported")


@pytest.mark.parametrize("window", [0, -5, "4096", 1.5])
def test_windows_that_see_nothing(model: Path, window: Any):
    spoil(model / "config.json", sliding_window=window)
    refused(generate(model), "sliding_window is")


@pytest.mark.parametrize("fields", [{"rms_norm_eps": -1.0}, {"rms_norm_eps": -0.5}])
def test_nan_is_not_printed_as_an_empty_answer(model: Path, fields: dict[str, Any]):
    spoil(model / "config.json", **fields)
    done = generate(model)
    assert done.returncode == 2
    assert "NaN" in done.stderr


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 100_000},
        {"num_return_sequences": 1000},
        {"prompt_lookup_num_tokens": 10},
        {"cache_implementation": "static"},
        {"min_length": 10**9, "max_time": 0},
        {"bad_words_ids": [[token] for token in range(1000)]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_generation_settings_of_another_use_are_not_followed(model: Path, plain_text: str, fields: dict[str, Any]):
    spoil(model / GENERATION, **fields)
    assert generate(model).stdout == plain_text


def test_tokens_and_sampling_of_a_model_are_followed(model: Path, plain_text: str):
    spoil(model / GENERATION, eos_token_id=[0, 2], repetition_penalty=1.1, temperature=0.7, top_p=0.8, top_k=20)
    settings = load_model(model).generation_config
    assert settings.eos_token_id == [0, 2]
    assert (settings.repetition_penalty, settings.temperature, settings.top_p, settings.top_k) == (1.1, 0.7, 0.8, 20)
    (model / GENERATION).unlink()
    spoil(model / "config.json", eos_token_id=7)
    assert load_model(model).generation_config.eos_token_id == 7


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("[1]", "does not hold an object"),
        ("[" * 100_000, "too deeply nested"),
        ('{"eos_token_id": 1000000000000}', "eos_token_id is"),
        ('{"pad_token_id": "x"}', "pad_token_id is"),
        ('{"repetition_penalty": -1}', "repetition_penalty is"),
        ('{"temperature": "hot"}', "temperature is"),
    ],
)
def test_generation_settings_that_are_damaged(model: Path, content: str, part: str):
    (model / GENERATION).write_text(content)
    refused(generate(model), GENERATION, part)


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", GENERATION, "vocab.json", "merges.txt", "additional_chat_templates/x.jinja"]
)
@pytest.mark.parametrize("kind", ["huge", "fifo"])
def test_files_beside_the_tokenizer_are_bounded(model: Path, name: str, kind: str):
    path = model / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    else:
        with path.open("wb") as file:
            file.truncate(20 * 2**30)
    refused(generate(model), Path(name).name)


def test_a_tokenizer_that_panics(model: Path):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    pattern = {"type": "Split", "pattern": {"Regex": "(a+a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [pattern, tokenizer["pre_tokenizer"]]}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(sentei("generate", model, "--prompt", "a" * 60 + "!"), "tokenizer failed on a text")


def test_temperatures_below_all_sense_take_the_likeliest_token(pico_model: Path, plain_text: str):
    assert generate(pico_model, "--temperature", "1e-38").stdout == plain_text
