"""What the tests of faults read."""

from pathlib import Path

import pytest

from tests.faults.jobs import make_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, their exports, text and a stand-in for llm-compressor; see :mod:`tests.faults.jobs`."""
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory
