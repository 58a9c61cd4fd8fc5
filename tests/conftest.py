"""Models every test can share: the real trained demo model, and pico models for speed."""

import tests.offline  # noqa: F401  (before anything that looks at its variables when it is imported)

# isort: split
import importlib.util
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import toolchain.onnx_libraries  # noqa: F401  (switches telemetry off before a test loads onnxruntime)

# isort: split
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import copy_companions, open_checkpoint
from toolchain.model.gguf import demo_gguf, import_gguf
from toolchain.model.slicing import write_pruned
from toolchain.text.embedded import documents

SMALL_VOCABULARY = 4096

pytest_plugins = ["tests.compatibility", "tests.faults.table"]


# Where pytest was started in the background Ctrl-C is ignored, and what it starts would ignore it as well.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, since two pieces run at a time and it would run alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_golden.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """What one process runs: a file, which shares its fixtures, or one command's faults, for there are 160 of them.

    Not by groups (``--dist loadgroup``): xdist 3.8 names them in a place where pytest 9.2 does not look.
    """
    from xdist.scheduler import LoadFileScheduling

    class Pieces(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            command = test.rsplit("-", 2)[1] if file.endswith("test_faults.py") and test.count("-") > 1 else ""
            return f"{file}:{command}"

    return Pieces(config, log)


@pytest.fixture(scope="session")
def vllm() -> None:
    """Skips tests where vLLM is not installed; in CI they fail."""
    if importlib.util.find_spec("vllm") is None:
        assert not os.environ.get("CI"), "vLLM is not installed; in CI that is a failure."
        pytest.skip("vLLM is not installed")


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, a real trained model, as a bfloat16 model directory."""
    directory = tmp_path_factory.mktemp("models") / "smollm2-135m"
    import_gguf(demo_gguf(), directory)
    return directory


@pytest.fixture(scope="session")
def pruned_demo(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model without attention in layers 0 and 12, and with every layer's FFN of another width."""
    directory = tmp_path_factory.mktemp("models") / "smollm2-135m-pruned"
    directory.mkdir()
    prune_by_hand(demo_model, directory, removed_attention={0, 12}, width=lambda layer: 1536 - 8 * (layer + 1))
    return directory


@pytest.fixture(scope="session")
def demo_onnx(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's ONNX export in float32."""
    from export.onnx_graph import export_onnx

    directory = tmp_path_factory.mktemp("models") / "smollm2-135m-onnx"
    export_onnx(demo_model, directory)
    return directory


@pytest.fixture(scope="session")
def pico_model(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four narrow layers with untied embeddings and a small vocabulary."""
    directory = tmp_path_factory.mktemp("models") / "pico"
    make_pico(directory, vocab_size=SMALL_VOCABULARY)
    copy_companions(small_tokenizer, directory)
    return directory


@pytest.fixture(scope="session")
def demo_pico(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the demo model's tokenizer, for what its tokens or their number decide."""
    directory = tmp_path_factory.mktemp("models") / "pico"
    make_pico(directory)
    copy_companions(demo_model, directory)
    return directory


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer of few tokens; most of a pico model's time would go into the demo model's."""
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=SMALL_VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(documents(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def wide_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four layers, wide enough to be quantised, with the demo model's tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "wide"
    make_pico(directory, hidden_size=64, head_dim=32, intermediate_size=192)
    copy_companions(demo_model, directory)
    return directory


@pytest.fixture(scope="session")
def pruned_wide(wide_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model with a layer without attention, one with nothing left, and two narrow ones."""
    directory = tmp_path_factory.mktemp("models") / "wide-pruned"
    directory.mkdir()
    prune_by_hand(wide_model, directory, removed_attention={0, 2}, width={0: 192, 1: 64, 2: 0, 3: 128}.__getitem__)
    return directory


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of calibration text, long enough for a few short windows."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The gardener prunes the trees in winter, and in summer they bear more fruit than before. " * 40)
    return path


def make_pico(directory: Path, **overrides: object) -> None:
    """Writes a random Llama in float32; ``overrides`` go into its config."""
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 49152, "max_position_embeddings": 256, "initializer_range": 0.2,
    }  # fmt: skip
    config = LlamaConfig(**(settings | overrides))  # type: ignore[arg-type]
    LlamaForCausalLM(config).save_pretrained(directory)


def prune_by_hand(
    source: Path, directory: Path, *, removed_attention: set[int], width: Callable[[int], int]
) -> list[np.ndarray]:
    """Prunes to a given layout, keeping neurons spread evenly over each layer; returns them."""
    checkpoint = open_checkpoint(source)
    layout = [
        LayerLayout(attention=layer not in removed_attention, intermediate_size=width(layer))
        for layer in range(len(checkpoint.layout))
    ]
    full = checkpoint.config["intermediate_size"]
    kept = [np.linspace(0, full - 1, each.intermediate_size).round().astype(np.int64) for each in layout]
    write_pruned(checkpoint, layout, kept, directory)
    return kept
