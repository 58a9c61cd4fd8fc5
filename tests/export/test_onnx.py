"""ONNX exports against Transformers, in both runtimes; every way in which layers can differ."""

import hashlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from benchmarks.onnx_speed import build_with_vendor
from export.onnx_graph import Precision, export_onnx
from serving.engines.genai import stream_tokens
from serving.engines.onnxruntime import OnnxEngine
from serving.engines.transformers import TransformersEngine
from serving.onnx_export.files import check_files
from tests.conftest import SMALL_VOCABULARY, make_pico, prune_by_hand
from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import copy_companions, open_checkpoint
from toolchain.errors import MissingDependencyError, SenteiError
from toolchain.model.loading import load_tokenizer
from toolchain.model.slicing import write_pruned

TEXT = (
    "The history of bread is long. People first baked flat cakes of ground grain on hot stones, and later learned to "
    "let the dough rise. Photosynthesis turns light, water and carbon dioxide into sugar and oxygen."
)
IDS = list(range(100, 140))


@pytest.fixture(scope="module")
def pruned_fp32(pruned_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "pruned"
    export_onnx(pruned_demo, out)
    return out


@pytest.fixture(scope="module")
def ids(demo_model: Path) -> list[int]:
    return load_tokenizer(demo_model)(TEXT)["input_ids"]


@pytest.fixture
def prune_pico(tmp_path: Path, small_tokenizer: Path) -> Callable[..., Path]:
    """Makes a pico model with heads wide enough for ONNX Runtime, and prunes it."""

    def make(removed: set[int] = frozenset(), width: Callable[[int], int] = lambda layer: 48, **overrides) -> Path:  # type: ignore[assignment]
        source, pruned = tmp_path / "source", tmp_path / "pruned"
        source.mkdir()
        pruned.mkdir()
        make_pico(source, **({"head_dim": 16, "vocab_size": SMALL_VOCABULARY} | overrides))
        copy_companions(small_tokenizer, source)
        prune_by_hand(source, pruned, removed_attention=removed, width=width)
        return pruned

    return make


def steps(engine: OnnxEngine, ids: list[int], prefill: int) -> torch.Tensor:
    """Log-probabilities from a short prefill and then token after token with the KV cache."""
    cache = engine.new_cache(1, len(ids))
    rows = [engine.step(cache, [ids[:prefill]])[0]]
    rows += [engine.step(cache, [[token]])[0] for token in ids[prefill:]]
    return torch.from_numpy(np.concatenate(rows)).log_softmax(-1)


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.acceptance), "int4"])
def test_an_unpruned_model_gives_the_vendors_own_graph(demo_model: Path, tmp_path: Path, precision: Precision) -> None:
    """Node for node and byte for byte, so one is as fast as the other: how both are placed in memory is chance."""
    source, ours, vendors = tmp_path / "source", tmp_path / "ours", tmp_path / "vendors"
    source.mkdir()
    make_pico(source, head_dim=16, intermediate_size=64)
    copy_companions(demo_model, source)
    export_onnx(source, ours, precision=precision)
    build_with_vendor(source, vendors, precision)
    check_files(vendors)  # what the vendor writes is on the closed list
    first, second = (onnx.load(each / "model.onnx") for each in (ours, vendors))
    assert list(first.graph.node) == list(second.graph.node)
    assert list(first.graph.input) == list(second.graph.input)
    assert list(first.graph.output) == list(second.graph.output)
    assert {each.name: each for each in first.graph.initializer} == {
        each.name: each for each in second.graph.initializer
    }


@pytest.mark.parametrize("model, exported", [("demo_model", "demo_onnx"), ("pruned_demo", "pruned_fp32")])
def test_agrees_with_transformers(model: str, exported: str, ids: list[int], request: pytest.FixtureRequest) -> None:
    source, out = request.getfixturevalue(model), request.getfixturevalue(exported)
    reference = TransformersEngine(source, dtype=torch.float32)
    expected = reference.log_probabilities(ids)
    engine = OnnxEngine(out)
    assert (engine.log_probabilities(ids) - expected).abs().max() <= 1e-3
    assert (steps(engine, ids, prefill=5) - expected).abs().max() <= 1e-3
    tokens = reference.generate(ids[:20], 24)
    assert engine.generate(ids[:20], 24) == tokens
    streamed = list(stream_tokens(out, ids[:20], 24))
    assert streamed == tokens[: len(streamed)]
    assert len(streamed) == 24 or streamed[-1] == 2  # genai stops at the end-of-sequence token


def test_only_attending_layers_have_a_cache(pruned_fp32: Path, demo_onnx: Path) -> None:
    graph = onnx.load(pruned_fp32 / "model.onnx", load_external_data=False).graph
    layers = [layer for layer in range(30) if layer not in (0, 12)]
    expected = [f".{layer}.{kind}" for kind in ("key", "value") for layer in layers]
    caches = [value.name for value in graph.input if value.name.startswith("past_key_values")]
    assert sorted(caches) == sorted(f"past_key_values{name}" for name in expected)
    assert {value.name for value in graph.output} == {"logits", *(f"present{name}" for name in expected)}
    assert sum(node.op_type == "GroupQueryAttention" for node in graph.node) == 28
    assert not [node.name for node in graph.node if "layers.0/attn" in node.name or "layers.12/attn" in node.name]
    assert OnnxEngine(pruned_fp32).attending_layers == layers
    assert OnnxEngine(demo_onnx).attending_layers == list(range(30))


@pytest.mark.parametrize("exported", ["demo_onnx", "pruned_fp32"])
def test_graph_is_valid(exported: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(exported) / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":
            # ONNX Runtime registers it in the standard domain, where ONNX itself does not know it.
            node.domain = "com.microsoft"
    checked = path.with_name("checked.onnx")
    onnx.save(model, checked)
    onnx.checker.check_model(checked)  # by path, so that external data is checked too
    checked.unlink()


def test_batch_is_dynamic(pruned_fp32: Path, ids: list[int]) -> None:
    engine = OnnxEngine(pruned_fp32)
    prompts = [ids[:12], ids[12:19], ids[19:20]]
    batch = engine.new_cache(3, 30)
    together = [*zip(*(engine.step(batch, rows) for rows in (prompts, [[5], [6], [7]])), strict=True)]
    for prompt, token, logits in zip(prompts, (5, 6, 7), together, strict=True):
        alone = engine.step(engine.new_cache(1, 13), [[*prompt, token]])[0]
        assert np.abs(alone - np.concatenate(logits)).max() <= 1e-3
    assert engine.generate_batch(prompts, 8) == [engine.generate(prompt, 8) for prompt in prompts]


def test_files(pruned_demo: Path, pruned_fp32: Path) -> None:
    summary = json.loads((pruned_fp32 / "sentei_export.json").read_text())
    checkpoint = open_checkpoint(pruned_demo)
    assert summary["source_fingerprint"] == checkpoint.fingerprint
    assert summary["precision"] == "fp32"
    assert summary["removed_attention"] == [0, 12]
    assert summary["intermediate_size"] == [layer.intermediate_size for layer in checkpoint.layout]
    for name, facts in summary["files"].items():
        data = (pruned_fp32 / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (facts["bytes"], facts["sha256"])
    # A tied embedding is stored once: the data file is no larger than the weights, the rotary tables and padding.
    assert summary["files"]["model.onnx.data"]["bytes"] < 4 * checkpoint.num_parameters + 4_000_000
    written = {path.name for path in pruned_fp32.iterdir()}
    assert {"genai_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= written
    assert load_tokenizer(pruned_fp32)(TEXT) == load_tokenizer(pruned_demo)(TEXT)
    settings = json.loads((pruned_fp32 / "genai_config.json").read_text())
    assert settings["model"]["eos_token_id"] == 2 and settings["model"]["context_length"] == 8192
    assert str(pruned_demo.parent) not in (pruned_fp32 / "genai_config.json").read_text()


def test_config_of_a_gguf_import_flows_through(demo_model: Path, demo_onnx: Path) -> None:
    config = open_checkpoint(demo_model).config
    model = onnx.load(demo_onnx / "model.onnx")
    epsilons = {a.f for node in model.graph.node for a in node.attribute if a.name == "epsilon"}
    assert epsilons == {np.float32(config["rms_norm_eps"])}
    cosines = next(onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "cos_cache")
    frequencies = config["rope_parameters"]["rope_theta"] ** -(np.arange(32) / 32)
    np.testing.assert_allclose(cosines[100], np.cos(100 * frequencies), atol=1e-4)


def test_int4(pruned_demo: Path, demo_model: Path, ids: list[int], tmp_path: Path) -> None:
    for source, name in ((demo_model, "demo"), (pruned_demo, "pruned")):
        summary = export_onnx(source, tmp_path / name, precision="int4")
        assert summary["files"]["model.onnx.data"]["bytes"] < 0.25 * 4 * open_checkpoint(source).num_parameters
        engine = OnnxEngine(tmp_path / name)
        streamed = list(stream_tokens(tmp_path / name, ids[:20], 16))
        assert streamed == engine.generate(ids[:20], 16)[: len(streamed)]
        logits = engine.log_probabilities(ids)
        # The rows differ in how they are computed: activations are rounded to int8 over other blocks.
        assert (steps(engine, ids, prefill=5).argmax(-1) == logits.argmax(-1)).float().mean() >= 0.9
        expected = TransformersEngine(source, dtype=torch.float32).log_probabilities(ids)
        divergence = (expected.exp() * (expected - logits)).sum(-1).mean()
        assert divergence <= 0.5
        if source is demo_model:  # the hand-pruned one knows too little for its likeliest token to mean much
            assert (expected.argmax(-1) == logits.argmax(-1)).float().mean() >= 0.7


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize(
    "removed, width",
    [
        pytest.param({0}, lambda layer: 48, id="first attention"),
        pytest.param({3}, lambda layer: 48, id="last attention"),
        pytest.param({1, 2}, lambda layer: 40 + layer, id="two in a row"),
        pytest.param({0, 1, 3}, lambda layer: 48, id="all attentions but one"),
        pytest.param({0, 1, 2, 3}, lambda layer: 48, id="all attentions"),
        pytest.param(set(), lambda layer: 0 if layer in (0, 3) else 48, id="first and last FFN"),
        pytest.param({0}, lambda layer: 0 if layer == 0 else 48, id="first layer whole"),
        pytest.param({3}, lambda layer: 0 if layer == 3 else 48, id="last layer whole"),
        pytest.param({2}, lambda layer: 0, id="every FFN"),
        pytest.param({1}, lambda layer: 1, id="width 1"),
        pytest.param({1}, lambda layer: (5, 17, 33, 47)[layer], id="widths of no block"),
    ],
)
def test_layouts(
    prune_pico: Callable[..., Path], removed: set[int], width: Callable[[int], int], precision: str, tmp_path: Path
) -> None:
    pruned, out = prune_pico(removed, width), tmp_path / "out"
    summary = export_onnx(pruned, out, precision=precision)  # type: ignore[arg-type]
    engine, reference = OnnxEngine(out), TransformersEngine(pruned, dtype=torch.float32)
    assert engine.attending_layers == [layer for layer in range(4) if layer not in removed]
    assert summary["removed_ffn"] == [layer for layer in range(4) if width(layer) == 0]
    tokens = engine.generate(IDS, 8)
    assert list(stream_tokens(out, IDS, 8)) == tokens
    actual, expected = engine.log_probabilities(IDS), reference.log_probabilities(IDS)
    if precision == "fp32":
        assert (actual - expected).abs().max() <= 1e-4
        assert tokens == reference.generate(IDS, 8)
    else:
        # Random weights have nearly flat logits: no top-1 agreement to expect, but the same distribution.
        assert (expected.exp() * (expected - actual)).sum(-1).mean() <= 0.3


@pytest.mark.parametrize(
    "overrides",
    [
        {"tie_word_embeddings": True, "hidden_size": 40},
        {"attention_bias": True, "mlp_bias": True},
        {"rms_norm_eps": 0.3, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            }
        },
        {"num_key_value_heads": 4, "hidden_act": "gelu"},
        {"num_hidden_layers": 1, "intermediate_size": SMALL_VOCABULARY},
    ],
    ids=["tied", "biases", "epsilon and theta", "linear rope", "llama3 rope", "no groups", "vocabulary-wide FFN"],
)  # fmt: skip
def test_config_variants(prune_pico: Callable[..., Path], overrides: dict[str, object], tmp_path: Path) -> None:
    wide = "intermediate_size" in overrides
    pruned = prune_pico(set() if wide else {1}, lambda layer: SMALL_VOCABULARY if wide else 33, **overrides)
    export_onnx(pruned, tmp_path / "out")
    expected = TransformersEngine(pruned, dtype=torch.float32).log_probabilities(IDS)
    assert (OnnxEngine(tmp_path / "out").log_probabilities(IDS) - expected).abs().max() <= 1e-4
    export_onnx(pruned, tmp_path / "int4", precision="int4")
    actual = OnnxEngine(tmp_path / "int4").log_probabilities(IDS)
    assert (expected.exp() * (expected - actual)).sum(-1).mean() <= 0.3


def test_int4_pads_incomplete_blocks_with_zeros(demo_model: Path, tmp_path: Path) -> None:
    """A width of 33 must give what 64 neurons give of which the last 31 are zero."""
    source = tmp_path / "source"
    make_pico(source, head_dim=16, intermediate_size=64)
    copy_companions(demo_model, source)
    checkpoint = open_checkpoint(source)
    layout = [LayerLayout(attention=True, intermediate_size=33)] * 4
    (tmp_path / "narrow").mkdir()
    write_pruned(checkpoint, layout, [np.arange(33)] * 4, tmp_path / "narrow")
    from safetensors.torch import load_file, save_file

    weights = load_file(source / "model.safetensors")
    for name, weight in weights.items():
        if "gate_proj" in name or "up_proj" in name:
            weight[33:] = 0
        elif "down_proj" in name:
            weight[:, 33:] = 0
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    results = []
    for name in ("source", "narrow"):
        export_onnx(tmp_path / name, tmp_path / f"{name}-int4", precision="int4")
        results.append(OnnxEngine(tmp_path / f"{name}-int4").log_probabilities(IDS))
    assert (results[0] - results[1]).abs().max() <= 1e-4
    graph = onnx.load(tmp_path / "narrow-int4" / "model.onnx", load_external_data=False).graph
    widths = {a.i for node in graph.node if "down_proj" in node.name for a in node.attribute if a.name == "K"}
    assert widths == {33}


def test_stdout_stays_clean_and_progress_is_told(
    pico16: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    before = list(logging.getLogger().handlers), logging.getLogger().level
    export_onnx(
        pico16, tmp_path / "out", precision="int4", on_progress=lambda line: (lines.append(line), print("x"))[0]
    )
    assert set(capfd.readouterr().out.split()) == {"x"}
    assert "Loading the model" in lines and "Reading layer 3" in lines
    assert (list(logging.getLogger().handlers), logging.getLogger().level) == before


@pytest.fixture
def pico16(prune_pico: Callable[..., Path]) -> Path:
    return prune_pico({1})


def test_same_model_same_bytes_and_the_plan_travels_along(pico16: Path, tmp_path: Path) -> None:
    plan = json.dumps({"base_model": {"name": "org/base", "weights_sha256": "00ff"}})
    (pico16 / "plan.json").write_text(plan)
    first = export_onnx(pico16, tmp_path / "a", precision="int4")
    second = export_onnx(pico16, tmp_path / "b", precision="int4")
    assert first == second
    assert (tmp_path / "a" / "plan.json").read_text() == plan
    proto = onnx.load(tmp_path / "a" / "model.onnx", load_external_data=False)
    told = {each.key: each.value for each in proto.metadata_props}
    assert told["sentei.base_model"] == "org/base" and told["sentei.base_model_sha256"] == "00ff"
    assert told["sentei.plan_sha256"] == hashlib.sha256(plan.encode()).hexdigest()
    assert told["sentei.source_fingerprint"] == first["source_fingerprint"]


def test_failure_leaves_nothing(pico16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    export_onnx(pico16, out)
    before = (out / "model.onnx").read_bytes()
    from export.genai_builder import PrunedBuilder

    def full(self: PrunedBuilder, out: Path, metadata: object) -> None:
        (out / "model.onnx").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(PrunedBuilder, "save", full)
    with pytest.raises(OSError, match="No space"):
        export_onnx(pico16, out, force=True)
    assert (out / "model.onnx").read_bytes() == before
    with pytest.raises(OSError, match="No space"):
        export_onnx(pico16, tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "pruned", "out"}
    with pytest.raises(SenteiError, match="not empty"):
        export_onnx(pico16, out)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"head_dim": 8}, "head_dim is 8"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "original_max_position_embeddings": 32,
                }
            },
            "longrope.*not in llama",
        ),
        ({"hidden_act": "mish"}, "mish"),
    ],
)
def test_unsupported_models(
    prune_pico: Callable[..., Path], overrides: dict[str, object], message: str, tmp_path: Path
) -> None:
    pruned = prune_pico({1}, **overrides)
    with pytest.raises(SenteiError, match=message):
        export_onnx(pruned, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "pruned"}


@pytest.mark.parametrize(
    "precision, device, instead",
    [("fp16", "cpu", "fp32, int8, int4"), ("bf16", "cpu", "fp32"), ("fp32", "cuda", "fp16, bf16")],
)
def test_pairs_of_precision_and_device(
    pico16: Path, precision: str, device: str, instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolchain.model.loading.load_model", None)  # refused before weights are loaded
    with pytest.raises(SenteiError, match=f"no {precision} .* on {device}; it has {instead}"):
        export_onnx(pico16, tmp_path / "out", precision=precision, device=device)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("verification.json", '{"passed": false}', "differs from the checkpoint it was made from"),
        ("verification.json", "{", "is damaged"),
        ("plan.json", "{}", "is damaged"),
    ],
)
def test_files_that_speak_against_it(pico16: Path, file: str, content: str, message: str, tmp_path: Path) -> None:
    (pico16 / file).write_text(content)
    with pytest.raises(SenteiError, match=rf"{file} .*{message}"):
        export_onnx(pico16, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_no_tokenizer(pico16: Path, tmp_path: Path) -> None:
    for path in pico16.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(SenteiError, match="tokenizer"):
        export_onnx(pico16, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_missing_library(pico16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "export.genai_builder", raising=False)
    monkeypatch.delattr(sys.modules["export"], "genai_builder", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai.models.builders.base", None)
    with pytest.raises(MissingDependencyError, match=r"^onnxruntime_genai\.models\S* is not .*sentei\[onnx\]"):
        export_onnx(pico16, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
