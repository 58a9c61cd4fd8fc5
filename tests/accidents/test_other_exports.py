"""ONNX exports beyond the issue's table: loops, the hub's cache, the wrong checkpoint, and options of ``generate``."""

import shutil
from pathlib import Path

import onnx
import pytest

from tests.accidents.onnx_service import Service
from tests.command_line import refused, sentei
from tests.conftest import SMALL_VOCABULARY, make_pico, prune_by_hand
from toolchain.checkpoint.directory import copy_companions


@pytest.fixture(scope="module")
def source(service: Service, pico_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that the service's export was made of."""
    directory = tmp_path_factory.mktemp("source") / "pico"
    make_pico(directory, head_dim=16, vocab_size=SMALL_VOCABULARY)
    copy_companions(pico_model, directory)
    return directory


def generate(directory: Path, *options: object):
    return sentei("generate", directory, "--prompt", "The", "--max-new-tokens", "2", *options)


@pytest.mark.parametrize("kind", ["Loop", "Scan", "SequenceMap"])
def test_a_graph_with_a_loop_is_refused(service: Service, tmp_path: Path, kind: str):
    export = tmp_path / "export"
    shutil.copytree(service.model, export)
    (export / "sentei_export.json").unlink()
    graph = onnx.load(export / "model.onnx", load_external_data=False)
    graph.graph.node.append(onnx.helper.make_node(kind, [], ["never"]))
    onnx.save(graph, export / "model.onnx")
    refused(generate(export), f"operator {kind} could run for ever")


def test_an_export_in_the_hubs_cache_is_verified(service: Service, source: Path, tmp_path: Path):
    snapshot, blobs = tmp_path / "models--org--name" / "snapshots" / "abc", tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(service.model.iterdir())):
        if path.name != "verification.json":
            shutil.copyfile(path, blobs / f"{number:064}")
            (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064}")
    done = sentei("verify", snapshot, "--against", source)
    assert done.returncode == 0, done.stderr


def test_an_export_of_another_model_is_not_verified(service: Service, source: Path, tmp_path: Path):
    pruned, export = tmp_path / "pruned", tmp_path / "export"
    pruned.mkdir()
    prune_by_hand(source, pruned, removed_attention={0}, width=lambda layer: 48)
    shutil.copytree(service.model, export)
    refused(sentei("verify", export, "--against", pruned), "which the checkpoint has not")


def test_options_that_onnxruntime_genai_has_not(service: Service):
    refused(generate(service.model, "--device", "no such"), "--device and --dtype are for checkpoints")
    refused(generate(service.model, "--dtype", "float16"), "--device and --dtype are for checkpoints")
    refused(generate(service.model, "--temperature", "1", "--seed", 2**31), "Give at most 2147483647")
    assert generate(service.model, "--temperature", "1", "--top-k", "100000").returncode == 0
    assert generate(service.model, "--temperature", "1e-38").stdout == generate(service.model).stdout
