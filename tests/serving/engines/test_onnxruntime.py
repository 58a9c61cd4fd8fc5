"""The ONNX engine: what it answers, when it stops, and how it refuses."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from export.onnx_graph import export_onnx
from serving.engines.genai import stream_tokens
from serving.engines.generate import stream_text
from serving.engines.onnxruntime import OnnxEngine
from serving.engines.sampling import Sampling
from serving.engines.transformers import TransformersEngine
from serving.verify.verify import verify
from tests.conftest import make_pico, prune_by_hand
from toolchain.checkpoint.directory import copy_companions
from toolchain.errors import MissingDependencyError, SenteiError

IDS = list(range(100, 130))


@pytest.fixture(scope="module")
def checkpoint(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico model with a hole in its cache numbering."""
    source, pruned = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("pruned")
    make_pico(source, head_dim=16)
    copy_companions(demo_model, source)
    prune_by_hand(source, pruned, removed_attention={1}, width=lambda layer: 40 + layer)
    return pruned


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "pico"
    export_onnx(checkpoint, out)
    return out


@pytest.fixture
def damaged(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_answers_like_transformers(checkpoint: Path, exported: Path) -> None:
    engine, reference = OnnxEngine(exported), TransformersEngine(checkpoint, dtype=torch.float32)
    prompts = [IDS, IDS[5:9]]
    for ours, theirs in zip(
        engine.top_log_probabilities(prompts, 3), reference.top_log_probabilities(prompts, 3), strict=True
    ):
        assert len(ours) == len(theirs)
        for position, other in zip(ours, theirs, strict=True):
            assert position == pytest.approx(other, abs=1e-4)
    assert engine.generate(IDS, 12) == reference.generate(IDS, 12)
    assert engine.generate(IDS, 0) == []
    assert engine.attending_layers == [0, 2, 3]
    engine.close()


def test_streams_up_to_the_limit(exported: Path) -> None:
    assert list(stream_tokens(exported, IDS, 5)) == OnnxEngine(exported).generate(IDS, 5)


def test_stops_at_the_end_of_sequence_token(exported: Path, damaged: Path) -> None:
    tokens = OnnxEngine(exported).generate(IDS, 6)
    settings = json.loads((damaged / "genai_config.json").read_text())
    settings["model"]["eos_token_id"] = tokens[3]
    (damaged / "genai_config.json").write_text(json.dumps(settings))
    (damaged / "sentei_export.json").unlink()  # as of an export of the vendor's, whose settings people edit
    assert list(stream_tokens(damaged, IDS, 20)) == tokens[: tokens.index(tokens[3]) + 1]


def test_the_context_is_the_limit(exported: Path) -> None:
    prompt = [100 + index % 50 for index in range(250)]
    assert len(list(stream_tokens(exported, prompt, 100))) <= 6
    with pytest.raises(SenteiError, match="context holds 256"):
        list(stream_tokens(exported, [100] * 256, 5))
    with pytest.raises(SenteiError, match="400 tokens are asked for; the model's context holds 256"):
        OnnxEngine(exported).log_probabilities([100] * 400)


def test_text_from_an_export_is_the_checkpoints(checkpoint: Path, exported: Path) -> None:
    pieces = ["".join(stream_text(each, "Bread is", max_new_tokens=8)) for each in (checkpoint, exported)]
    assert pieces[0] == pieces[1] != ""


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data", "genai_config.json"])
@pytest.mark.parametrize("how", ["missing", "truncated", "garbage", "one bit"])
def test_damage_is_told(damaged: Path, file: str, how: str) -> None:
    path = damaged / file
    content = path.read_bytes()
    path.unlink()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "garbage":
        path.write_bytes(b"\xff\x00 not it")
    elif how == "one bit":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    for use in (OnnxEngine, lambda directory: list(stream_tokens(directory, IDS, 3))):
        with pytest.raises(SenteiError) as caught:
            use(damaged)  # type: ignore[operator]
        assert str(damaged) in caught.value.message


def test_a_cache_that_is_full(exported: Path) -> None:
    engine = OnnxEngine(exported)
    cache = engine.new_cache(1, 4)
    engine.step(cache, [IDS[:4]])
    with pytest.raises(SenteiError, match="5 tokens do not fit into a cache of 4"):
        engine.step(cache, [[5]])


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="it is there")
def test_missing_provider(checkpoint: Path, tmp_path: Path) -> None:
    export_onnx(checkpoint, tmp_path / "out", precision="fp16", device="cuda")
    for use in (OnnxEngine, lambda directory: list(stream_tokens(directory, IDS, 3))):
        with pytest.raises(SenteiError, match=r"no CUDAExecutionProvider, only .*CPUExecution.*onnx-gpu"):
            use(tmp_path / "out")  # type: ignore[operator]


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="it is there")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where CUDA's libraries are of another version: ONNX Runtime then takes the CPU, and does not say so."""
    export_onnx(checkpoint, tmp_path / "out", precision="fp16", device="cuda")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(SenteiError, match=r"cannot start its CUDAExecutionProvider.*onnxruntime-gpu\[cuda,cudnn\]"):
        OnnxEngine(tmp_path / "out")


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="it is there")
def test_verified_as_far_as_this_machine_can(checkpoint: Path, tmp_path: Path) -> None:
    for precision, told in (("fp16", "It was run on the CPU instead"), ("bf16", "answers were not")):
        out = tmp_path / precision
        export_onnx(checkpoint, out, precision=precision, device="cuda")  # type: ignore[arg-type]
        verdict = verify(out, checkpoint)
        assert verdict["passed"], verdict["checks"]
        assert told in verdict["not_run"] and told in (out / "README.md").read_text()
        assert ("mean_difference" in verdict["checks"]) == (precision == "fp16")
        weights = bytearray((out / "model.onnx.data").read_bytes())
        weights[len(weights) // 2] ^= 1
        (out / "model.onnx.data").write_bytes(weights)
        with pytest.raises(SenteiError, match=r"model\.onnx\.data is damaged"):
            verify(out, checkpoint)


@pytest.mark.parametrize("runtime", ["checkpoint", "exported"])
def test_sampling(runtime: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(runtime)

    def sampled(**settings: float) -> str:
        return "".join(stream_text(directory, "Bread is", max_new_tokens=12, sampling=Sampling(**settings)))  # type: ignore[arg-type]

    greedy = sampled()
    assert sampled(temperature=1.5, seed=1) == sampled(temperature=1.5, seed=1) != greedy
    assert sampled(temperature=1.5, seed=1) != sampled(temperature=1.5, seed=2)
    assert sampled(temperature=1.5, top_k=1, seed=1) == greedy
    assert sampled(temperature=1.5, top_p=1e-6, seed=1) == greedy


@pytest.mark.parametrize(
    "settings, message",
    [({"temperature": -1.0}, "temperature -1"), ({"top_p": 0.0}, r"top_p 0\.0"), ({"top_k": -1}, "top_k -1")],
)
def test_sampling_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SenteiError, match=message):
        Sampling(**settings)


def test_not_an_export(tmp_path: Path) -> None:
    with pytest.raises(SenteiError, match="has no genai_config"):
        OnnxEngine(tmp_path / "nowhere")
    (tmp_path / "genai_config.json").write_text('{"model": {"decoder": []}}')
    with pytest.raises(SenteiError, match="is damaged"):
        OnnxEngine(tmp_path)


def test_missing_libraries(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match="onnxruntime is not"):
        OnnxEngine(exported)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(MissingDependencyError, match="onnxruntime-genai is not"):
        list(stream_tokens(exported, IDS, 3))
