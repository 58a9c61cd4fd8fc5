"""Places that are gone, or that a library cannot use, are named; nothing else is blamed."""

from pathlib import Path

import pytest

from serving.engines.vllm import VllmEngine
from serving.engines.vllm_environment import check_socket_place
from tests.command_line import refused, sentei
from toolchain.errors import SenteiError
from toolchain.model.loading import load_tokenizer, read_transformers_config

_LONG = "x" * 70


def test_a_model_that_was_removed_meanwhile_is_said_to_be_gone(tmp_path: Path):
    for read in (load_tokenizer, read_transformers_config):
        with pytest.raises(SenteiError, match="does not exist any more"):
            read(tmp_path / "model")


def test_a_place_too_long_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", f"/{_LONG}")
    with pytest.raises(SenteiError, match=r"TMPDIR"):
        check_socket_place()
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "/tmp")
    check_socket_place()


@pytest.mark.usefixtures("vllm")
def test_vllm_is_not_started_there(pico_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", f"/{_LONG}")
    refused(sentei("serve", pico_model), "cannot open sockets")
    with pytest.raises(SenteiError, match="cannot open sockets"):
        VllmEngine(pico_model)
