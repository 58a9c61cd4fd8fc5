"""Row 19: exports of every family with sliding windows run in both runtimes, whatever is longer: prompt or window."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.onnx_graph import export_onnx
from serving.benchmark.sessions.worker import load_onnx
from serving.engines.genai import GenaiModel
from serving.engines.onnxruntime import OnnxEngine
from serving.engines.transformers import TransformersEngine
from serving.server.onnx.continuous_batch import BatchRequest, OnnxBatch
from serving.verify.verify import verify
from tests.families import VARIANTS, make_family_pico
from toolchain.checkpoint.directory import copy_companions

SLIDING = {
    "gemma3_text": "alternating", "mistral": "sliding-tied", "phi3": "sliding-tied", "qwen2": "alternating",
    "qwen3": "alternating",
}  # fmt: skip
WINDOW, CONTEXT = 64, 512
IDS = torch.randint(3, 96, (CONTEXT,), generator=torch.Generator().manual_seed(0)).tolist()


@dataclass(frozen=True)
class Exported:
    source: Path
    directory: Path
    reference: TransformersEngine
    engine: OnnxEngine
    genai: GenaiModel

    def streamed(self, prompt: list[int], num_tokens: int) -> list[int]:
        return list(self.genai.stream(prompt, num_tokens))


def export(directory: Path, tokenizer: Path, family: str, **overrides: Any) -> Exported:
    source, out = directory / "source", directory / "onnx"
    shape: dict[str, Any] = {"hidden_size": 64, "vocab_size": 49152, "initializer_range": 0.1}
    if "head_dim" in VARIANTS[family][SLIDING[family]]:
        shape["head_dim"] = 32
    shape |= {"sliding_window": WINDOW, "max_position_embeddings": CONTEXT, "eos_token_id": 49151}
    make_family_pico(source, family, SLIDING[family], **(shape | overrides))
    copy_companions(tokenizer, source)
    (source / "generation_config.json").unlink(missing_ok=True)
    export_onnx(source, out)
    return Exported(source, out, TransformersEngine(source, dtype=torch.float32), OnnxEngine(out), GenaiModel(out))


@pytest.fixture(scope="module", params=SLIDING)
def exported(request: pytest.FixtureRequest, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(tmp_path_factory.mktemp(request.param), demo_model, request.param)


@pytest.mark.parametrize(
    "length, num_tokens",
    [
        pytest.param(5, 3, id="both within the window"),
        pytest.param(50, 30, id="the answer passes the window"),
        pytest.param(WINDOW, 5, id="the prompt is the window"),
        pytest.param(150, 10, id="the prompt is longer"),
    ],
)
def test_the_tokens_are_transformers(exported: Exported, length: int, num_tokens: int) -> None:
    prompt = IDS[:length]
    expected = exported.reference.generate(prompt, num_tokens)
    assert exported.engine.generate(prompt, num_tokens) == expected
    assert exported.streamed(prompt, num_tokens) == expected


@pytest.mark.parametrize("lengths", [(5, 3, 9), (20, 3, 50), (60, 63, 64), (100, 3, 90)])
def test_batches_of_unlike_lengths(exported: Exported, lengths: tuple[int, ...]) -> None:
    prompts = [IDS[:length] for length in lengths]
    expected = [exported.reference.generate(prompt, 6) for prompt in prompts]
    assert exported.engine.generate_batch(prompts, 6) == expected
    theirs = exported.reference.top_log_probabilities(prompts, 3)
    for ours, reference in zip(exported.engine.top_log_probabilities(prompts, 3), theirs, strict=True):
        assert all(one == pytest.approx(other, abs=1e-3) for one, other in zip(ours, reference, strict=True))


def test_the_servers_batch(exported: Exported) -> None:
    """Short answers go on while a prompt longer than the window, and than one piece of a prompt, joins them."""
    prompts, answers = [IDS[:5], IDS[:70], IDS[:400], IDS[10:30]], [[], [], [], []]  # type: ignore[var-annotated]
    batch = OnnxBatch(exported.engine, max_num_seqs=4, max_model_len=CONTEXT)

    def taker(answer: list[int]) -> Callable[[int], bool]:
        return lambda token: answer.append(token) or len(answer) < 12  # type: ignore[func-returns-value]

    for prompt, answer in zip(prompts, answers, strict=True):
        batch.join(BatchRequest(prompt=prompt, take=taker(answer)))
        batch.step()
    while not batch.is_empty:
        batch.step()
    assert answers == [exported.reference.generate(prompt, 12) for prompt in prompts]


def test_the_benchmark_decodes(exported: Exported) -> None:
    """Prompts shorter than the window; a token each for as long as asked for."""
    decode, _ = load_onnx(exported.directory, "cpu", None)
    assert len(list(decode(np.asarray([IDS[:8], IDS[8:16]]), 5))) == 5


def test_verification_passes(exported: Exported) -> None:
    verdict = verify(exported.directory, exported.source)
    assert verdict["passed"], verdict["checks"]


@pytest.mark.parametrize("family", ["phi3", "gemma3_text"])
@pytest.mark.parametrize("window", [CONTEXT, 4 * CONTEXT])
def test_a_window_as_long_as_the_context(family: str, window: int, demo_model: Path, tmp_path: Path) -> None:
    """Phi-3-mini-128k's window is twice its context: no cache of one window can be had."""
    exported = export(tmp_path, demo_model, family, sliding_window=window)
    for length, num_tokens in ((5, 4), (500, 12)):
        expected = exported.reference.generate(IDS[:length], num_tokens)
        assert exported.engine.generate(IDS[:length], num_tokens) == expected
        assert exported.streamed(IDS[:length], num_tokens) == expected
    prompts = [IDS[:5], IDS[:9]]
    assert exported.engine.generate_batch(prompts, 4) == [exported.reference.generate(each, 4) for each in prompts]
