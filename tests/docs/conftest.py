"""A model for what the documents show."""

from pathlib import Path

import pytest

from tests.conftest import make_pico
from toolchain.checkpoint.directory import copy_companions


@pytest.fixture(scope="session")
def narrow_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many layers as the documents speak of, heads as wide as vLLM wants, and a context for their requests."""
    directory = tmp_path_factory.mktemp("models") / "narrow"
    make_pico(
        directory,
        hidden_size=64,
        head_dim=32,
        intermediate_size=384,
        num_hidden_layers=30,
        max_position_embeddings=8192,
    )
    copy_companions(demo_model, directory)
    return directory
