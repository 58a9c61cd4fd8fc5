"""Nothing is measured at positions that a model does not have; where its config extends them, that is said."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import PLAIN, refused, sentei
from toolchain.model.context_length import ContextLength, context_length

CONTEXT = 256  # of the pico model
PICO = "reads at most 256 tokens"


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text("The gardener prunes the trees in winter, and in summer they bear more fruit than before. " * 120)
    return path


def with_config(model: Path, directory: Path, **changes: Any) -> Path:
    shutil.copytree(model, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


def test_windows_beyond_the_context(pico_model: Path, long_text: Path, tmp_path: Path):
    longer, out = ["--seq-len", CONTEXT + 1], ["-o", tmp_path / "out"]
    calibration = ["--calibration", long_text, "--samples", 2, *PLAIN]
    hint = "Give at most --seq-len 256."
    refused(sentei("prune", pico_model, *out, "--sparsity", 0.25, *calibration, *longer), PICO, hint)
    refused(sentei("evaluate", pico_model, "--text", long_text, *longer), PICO, hint)
    refused(sentei("compare-methods", pico_model, *out, "--text", long_text, *longer), PICO, hint)
    assert not list(tmp_path.iterdir())


def test_the_default_window_is_no_longer_than_the_context(pico_model: Path, long_text: Path):
    done = sentei("evaluate", pico_model, "--text", long_text, "--windows", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["evaluations"][0]["num_tokens"] <= CONTEXT
    assert "Windows have 256 tokens" in done.stderr.replace("\n", " ")


def test_prompt_and_answer_beyond_the_context(pico_model: Path):
    refused(sentei("generate", pico_model, "--prompt", "winter " * 400), PICO, "Shorten the prompt.")
    refused(
        sentei("generate", pico_model, "--prompt", "winter", "--max-new-tokens", CONTEXT), PICO, "--max-new-tokens 2"
    )


def test_where_rope_scaling_makes_room_it_is_said(pico_model: Path, long_text: Path, tmp_path: Path):
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = with_config(pico_model, tmp_path / "dynamic", rope_parameters=dynamic)
    asked = ["evaluate", model, "--text", long_text, "--windows", 1]
    done = sentei(*asked, "--seq-len", CONTEXT + 44)
    assert done.returncode == 0, done.stderr
    assert "only by its rope scaling" in done.stderr.replace("\n", " ")
    refused(sentei(*asked, "--seq-len", 2 * CONTEXT + 1), "reads at most 512 tokens")


@pytest.mark.parametrize(
    ("rope", "extended", "servable", "original"),
    [
        (None, 4096, 4096, 0),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}, 4096, 4096, 0),
        ({"rope_type": "longrope", "short_factor": [1.0], "original_max_position_embeddings": 512}, 4096, 4096, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384, 4096, 0),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096, 4096, 0),
        ({"type": "linear", "factor": 4.0}, 16384, 16384, 0),
        ({"rope_type": "dynamic", "factor": 2.0}, 8192, 8192, 0),
        ({"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": {}}, 8192, 8192, 0),
    ],
)
def test_what_each_scaling_means(rope: dict[str, Any] | None, extended: int, servable: int, original: int):
    length = context_length({"model_type": "llama", "max_position_embeddings": 4096, "rope_scaling": rope})
    assert length == ContextLength(stated=4096, extended=extended, servable=servable, original=original)


def test_gemma_3_states_its_context_after_scaling():
    rope = {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_type": "default"}}
    config = {"model_type": "gemma3_text", "max_position_embeddings": 4096, "rope_parameters": rope}
    assert context_length(config) == ContextLength(stated=4096, extended=4096, servable=4096)


@pytest.mark.parametrize(("own", "original"), [({"original_max_position_embeddings": 512}, 512), ({}, 4096)])
def test_where_the_short_factors_of_phi_3_end(own: dict[str, int], original: int):
    rope = {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}
    config = {"model_type": "phi3", "max_position_embeddings": 131072, "rope_scaling": rope, **own}
    assert context_length(config) == ContextLength(131072, extended=131072, servable=131072, original=original)


def test_a_config_without_a_length_has_the_one_of_its_family():
    assert context_length({"model_type": "llama"}).stated == 2048
