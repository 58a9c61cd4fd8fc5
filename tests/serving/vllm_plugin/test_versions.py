"""A vLLM of another version than the plugin was written for."""

import logging
import tomllib

import pytest

from serving.vllm_plugin.versions import NEWEST_VLLM, OLDEST_VLLM, check_version
from tests.test_form import ROOT
from toolchain.errors import SenteiError


def test_an_older_vllm_is_refused_and_a_newer_one_warned_of(caplog):
    with caplog.at_level(logging.WARNING, logger="vllm.sentei"):
        for version in ("0.25.0", "0.32.0+cpu", "0.33.1rc1", "dev"):
            check_version(version)
        assert not caplog.records
        check_version("0.34.0")
    assert "newer than 0.33" in caplog.text
    with pytest.raises(SenteiError, match=r"vLLM 0\.24\.1 is older than 0\.25"):
        check_version("0.24.1")


def test_the_extra_asks_for_the_same_versions():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (oldest, newest) = (f"{each[0]}.{each[1]}" for each in (OLDEST_VLLM, (NEWEST_VLLM[0], NEWEST_VLLM[1] + 1)))
    assert f"vllm>={oldest},<{newest}" in extras["vllm"]
