"""Every family's ONNX exports, pruned so that every kind of layer is there, against Transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from export.onnx_graph import Precision, export_onnx
from serving.engines.genai import stream_tokens
from serving.engines.onnxruntime import OnnxEngine
from serving.engines.transformers import TransformersEngine
from serving.server.onnx.continuous_batch import BatchRequest, OnnxBatch
from serving.verify.onnx_weights import OnnxWeights
from serving.verify.rounded import carry, distances
from tests.conftest import SMALL_VOCABULARY, prune_by_hand
from tests.families import EVERY_VARIANT, VARIANTS, make_family_pico
from toolchain.checkpoint.directory import copy_companions, open_checkpoint
from toolchain.checkpoint.rounding_error import rounding_checks
from toolchain.errors import SenteiError

# Heads of 16, which ONNX Runtime's attention needs, or of 32 where the family's head_dim is its own.
WIDE = {"hidden_size": 64, "vocab_size": SMALL_VOCABULARY, "initializer_range": 0.1}
# Longer than every sliding window, and than where long rotary factors begin.
IDS = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(0)).tolist()
# The first layer has no attention, the second another width, the third no FFN, the last no attention.
REMOVED, WIDTHS = {0, 3}, (48, 33, 0, 48)


def pruned_pico(
    directory: Path,
    tokenizer: Path,
    family: str,
    variant: str,
    removed: set[int] = REMOVED,
    widths: tuple[int, ...] = WIDTHS,
    **overrides: Any,
) -> Path:
    source, out = directory / "source", directory / "pruned"
    if "head_dim" in VARIANTS[family][variant]:
        overrides["head_dim"] = 32
    if variant == "longrope":
        factors = torch.linspace(1, 4, 8).tolist()
        overrides["rope_parameters"] = {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": factors, "long_factor": factors[::-1],
        }  # fmt: skip
    make_family_pico(source, family, variant, **WIDE, **overrides)
    copy_companions(tokenizer, source)
    out.mkdir()
    prune_by_hand(source, out, removed_attention=removed, width=widths.__getitem__)
    return out


def steps(engine: OnnxEngine, ids: list[int], prefill: int) -> torch.Tensor:
    """Log-probabilities from a short prefill and then token after token with the KV cache."""
    cache = engine.new_cache(1, len(ids))
    rows = [engine.step(cache, [ids[:prefill]])[0]]
    rows += [engine.step(cache, [[token]])[0] for token in ids[prefill:]]
    return torch.from_numpy(np.concatenate(rows)).log_softmax(-1)


@pytest.mark.compatibility("ONNX fp32", "log-probabilities within 1e-3 of Transformers, prefill and token by token")
@pytest.mark.parametrize("variant", EVERY_VARIANT, ids="-".join)
def test_float32_is_transformers(variant: tuple[str, str], small_tokenizer: Path, tmp_path: Path) -> None:
    pruned = pruned_pico(tmp_path, small_tokenizer, *variant)
    export_onnx(pruned, tmp_path / "out")
    engine, reference = OnnxEngine(tmp_path / "out"), TransformersEngine(pruned, dtype=torch.float32)
    expected = reference.log_probabilities(IDS)
    assert (engine.log_probabilities(IDS) - expected).abs().max() <= 1e-3
    tokens = reference.generate(IDS[:10], 30)
    if variant[1] != "longrope":  # whose table depends on how long the sequence already is
        assert (steps(engine, IDS, prefill=5) - expected).abs().max() <= 1e-3
    assert engine.generate(IDS[:10], 30) == tokens
    length = min(40, engine.batch_context_length)  # of the whole answers, before Phi-3 changes its tables
    assert (length == 40) == (variant[1] != "longrope")
    rows = [IDS[:10], IDS[20:23], IDS[5:17]]
    assert in_one_batch(engine, rows, length) == [engine.generate(row, length - len(row)) for row in rows]
    streamed = list(stream_tokens(tmp_path / "out", IDS[:10], 30))
    assert streamed == tokens[: len(streamed)] != []


def in_one_batch(engine: OnnxEngine, prompts: list[list[int]], length: int) -> list[list[int]]:
    """Answers of ``length`` tokens, prompts included; each prompt joins a token after the one before."""
    batch = OnnxBatch(engine, max_num_seqs=3, max_model_len=length)
    answers: list[list[int]] = [[] for _ in prompts]

    def taker(prompt: list[int], answer: list[int]) -> Callable[[int], bool]:
        return lambda token: answer.append(token) or len(prompt) + len(answer) < length  # type: ignore[func-returns-value]

    for prompt, answer in zip(prompts, answers, strict=True):
        batch.join(BatchRequest(prompt=prompt, take=taker(prompt, answer)))
        batch.step()
    while not batch.is_empty:
        batch.step()
    return answers


def check_graph(directory: Path) -> onnx.GraphProto:
    """The graph, which ONNX's own checker finds valid."""
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":
            # ONNX Runtime registers it in the standard domain, where ONNX itself does not know it.
            node.domain = "com.microsoft"
    checked = directory / "checked.onnx"
    onnx.save(model, checked)
    onnx.checker.check_model(checked)  # by path, so that external data is checked too
    checked.unlink()
    return model.graph


def carried(reference: TransformersEngine, source: Path, weights: OnnxWeights) -> None:
    """Puts an export's matrices into the reference, after a look at how far they are from its own."""
    rounded = weights.rounded_matrices()
    assert rounded is not None
    assert all(check["passed"] for check in rounding_checks(distances(open_checkpoint(source), rounded)).values())
    carry(reference.model, rounded)


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param(
            precision,
            marks=pytest.mark.compatibility(f"ONNX {precision}", "as Transformers computes with its matrices"),
        )
        for precision in ("int8", "int4")
    ],
)
@pytest.mark.parametrize("family", VARIANTS)
def test_rounded(family: str, precision: Precision, small_tokenizer: Path, tmp_path: Path) -> None:
    pruned = pruned_pico(tmp_path, small_tokenizer, family, list(VARIANTS[family])[1])
    export_onnx(pruned, tmp_path / "out", precision=precision)
    check_graph(tmp_path / "out")
    reference = TransformersEngine(pruned, dtype=torch.float32)
    unrounded = reference.log_probabilities(IDS)
    weights = OnnxWeights(open_checkpoint(pruned), tmp_path / "out/model.onnx")
    assert weights.count_differing() == 0
    carried(reference, pruned, weights)
    actual, expected = OnnxEngine(tmp_path / "out").log_probabilities(IDS), reference.log_probabilities(IDS)
    # What goes into a matrix is rounded to 8 bits.
    assert (actual - expected).abs().mean() <= 0.03
    if precision == "int4":
        assert (actual - expected).abs().mean() < 0.3 * (actual - unrounded).abs().mean()


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.compatibility(
    "ONNX for CUDA, not run",
    "graphs in fp16 (not Gemma 3), bf16, int8, int4 are valid and hold the weights; no GPU ran them",
)
def test_for_cuda(family: str, precision: Precision, small_tokenizer: Path, tmp_path: Path) -> None:
    pruned = pruned_pico(tmp_path, small_tokenizer, family, list(VARIANTS[family])[1])
    if (family, precision) == ("gemma3_text", "fp16"):
        with pytest.raises(SenteiError, match="range of float16"):
            export_onnx(pruned, tmp_path / "out", precision=precision, device="cuda")
        return
    export_onnx(pruned, tmp_path / "out", precision=precision, device="cuda")
    graph = check_graph(tmp_path / "out")
    half = onnx.TensorProto.BFLOAT16 if "bf16" in precision or "gemma" in family else onnx.TensorProto.FLOAT16
    caches = {each.type.tensor_type.elem_type for each in graph.input if each.name.startswith("past")}
    assert caches == {half}
    reference = TransformersEngine(pruned, dtype=torch.float32)
    weights = OnnxWeights(open_checkpoint(pruned), tmp_path / "out/model.onnx")
    assert weights.count_differing() == 0
    assert weights.dtype == (torch.bfloat16 if half == onnx.TensorProto.BFLOAT16 else torch.float16)
    if precision.startswith("int"):
        carried(reference, pruned, weights)
    if half == onnx.TensorProto.FLOAT16 and family != "qwen3":  # the CPU has kernels for those
        actual = OnnxEngine(tmp_path / "out", "cpu").log_probabilities(IDS)
        assert (actual - reference.log_probabilities(IDS)).abs().max() <= 0.05


@pytest.mark.parametrize(
    "removed, widths",
    [
        pytest.param({0}, (48, 48, 48, 48), id="first attention"),
        pytest.param({3}, (48, 48, 48, 48), id="last attention"),
        pytest.param({1, 2}, (48, 33, 48, 48), id="two in a row"),
        pytest.param({0, 1, 3}, (48, 48, 48, 48), id="all attentions but one"),
        pytest.param(set(), (0, 48, 48, 0), id="first and last FFN"),
        pytest.param({0, 3}, (0, 48, 48, 0), id="first and last layer whole"),
    ],
)
@pytest.mark.parametrize("family", ["granite", "gemma3_text", "phi3"])
def test_layouts(
    family: str, removed: set[int], widths: tuple[int, ...], small_tokenizer: Path, tmp_path: Path
) -> None:
    """Llama, whose layers Mistral's and Qwen's are like, has its own such test."""
    pruned = pruned_pico(tmp_path, small_tokenizer, family, next(iter(VARIANTS[family])), removed, widths)
    export_onnx(pruned, tmp_path / "out")
    graph = check_graph(tmp_path / "out")
    assert sum(node.op_type == "GroupQueryAttention" for node in graph.node) == 4 - len(removed)
    engine, reference = OnnxEngine(tmp_path / "out"), TransformersEngine(pruned, dtype=torch.float32)
    assert engine.attending_layers == [layer for layer in range(4) if layer not in removed]
    assert (engine.log_probabilities(IDS) - reference.log_probabilities(IDS)).abs().max() <= 1e-3
    assert list(stream_tokens(tmp_path / "out", IDS, 8))[:8] == engine.generate(IDS, 8)


def test_gemma_that_looks_ahead_is_refused(small_tokenizer: Path, tmp_path: Path) -> None:
    pruned = pruned_pico(tmp_path, small_tokenizer, "gemma3_text", "alternating", use_bidirectional_attention=True)
    with pytest.raises(SenteiError, match="use_bidirectional_attention is set"):
        export_onnx(pruned, tmp_path / "out")
