"""A device that is not there is refused before anything is computed; a CPU has one name."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from serving.benchmark.sessions.worker import resolve_device
from tests.command_line import refused, sentei
from toolchain.cli.console import pick_device
from toolchain.errors import SenteiError


@pytest.mark.parametrize("device", ["cpu:7", "cuda:-1", "meta", "CPU", "mps", "cpu:", "7"])
def test_no_such_device(pico_model: Path, text: Path, tmp_path: Path, device: str):
    reading = ["--text", text, "--seq-len", 32]
    refused(sentei("evaluate", pico_model, *reading, "--device", device), f"'{device}' is not a device")
    asked = ["--engine", "transformers", "-o", tmp_path / "out", "--input-len", 8, "--output-len", 4]
    refused(sentei("benchmark", pico_model, pico_model, *asked, "--device", device), f"'{device}' is not a device")
    assert not list(tmp_path.iterdir())
    with pytest.raises(SenteiError, match="not a device"):
        resolve_device(device, cuda_available=True)


def test_the_first_cpu_is_the_cpu(pico_model: Path, text: Path):
    asked = ["evaluate", pico_model, "--text", text, "--seq-len", 32, "--windows", 1, "--json", "--quiet"]
    numbered, plain = (json.loads(sentei(*asked, "--device", each).stdout) for each in ("cpu:0", "cpu"))
    assert numbered["evaluations"][0]["perplexity"] == plain["evaluations"][0]["perplexity"]


def test_a_gpu_beyond_the_last_is_refused():
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "device_count", return_value=2),
    ):
        assert pick_device("cuda:1") == "cuda:1"
        assert pick_device("cuda:0") == "cuda"
        with pytest.raises(SenteiError, match="no such GPU"):
            pick_device("cuda:99")
