"""Quantised directories read back as what they stand for, and what is wrong with one is named."""

import json

import pytest
import torch

from serving.forecast.model_facts import checkpoint_facts
from serving.verify.quantized_weights import round_inputs, rounded_matrices
from serving.verify.rounded import carry, distances
from serving.verify.rounded import round_inputs as with_rounded_inputs
from tests.command_line import refused, sentei
from tests.quantized import GROUP_SIZE, SCHEMES, write_quantized
from toolchain.architecture.rounding_scheme import RoundingScheme, rounding_schemes
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.checkpoint.quantized import is_quantized, open_quantized, open_servable
from toolchain.errors import SenteiError
from toolchain.model.loading import load_model

Q_PROJ = "model.layers.1.self_attn.q_proj"
DOWN_PROJ = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_matrices_read_back_as_what_was_meant(pruned_wide, tmp_path, scheme):
    meant = write_quantized(pruned_wide, tmp_path / "out", scheme)
    read, source = open_quantized(tmp_path / "out"), open_checkpoint(pruned_wide)
    assert read.scheme.name == scheme
    assert read.scheme.group_size == (GROUP_SIZE if scheme == "w4a16" else None)
    assert read.layout == source.layout
    assert (source.dtype, read.dtype) == (torch.float32, torch.bfloat16)
    assert set(read.matrices) == set(meant)
    for name, matrix in meant.items():
        assert torch.equal(read.matrix(name), matrix), name
    assert read.shapes == {name: info.shape for name, info in source.tensors.items()}
    assert set(source.tensors) - set(meant) == set(read.tensors) - read.parts


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounded_matrices_and_inputs_go_into_the_source_model(pruned_wide, tmp_path, scheme):
    meant = write_quantized(pruned_wide, tmp_path / "out", scheme)
    model, read = load_model(pruned_wide, dtype=torch.float32), open_quantized(tmp_path / "out")
    rounded = rounded_matrices(read)
    found = {each.name: each for each in distances(open_checkpoint(pruned_wide), rounded)}
    carry(model, rounded)
    with_rounded_inputs(model, rounded)
    assert set(found) == set(meant)
    assert all(0 < each.relative_error < 0.2 and abs(each.gain - 1) < 0.02 for each in found.values())
    inputs = torch.randn(5, meant[f"{Q_PROJ}.weight"].shape[1])
    expected = (round_inputs(inputs, read.scheme) if scheme != "w4a16" else inputs) @ meant[f"{Q_PROJ}.weight"].T
    assert torch.allclose(model.get_submodule(Q_PROJ)(inputs), expected)


def test_inputs_are_rounded_token_by_token():
    inputs = torch.tensor([[127.0, 1.4, -0.6], [1.27, 0.014, -0.006], [0.0, 0.0, 0.0]])
    scheme = RoundingScheme(num_bits=8, is_float=False, group_size=None, packed=False, symmetric=True, input_bits=8)
    expected = torch.tensor([[127.0, 1.0, -1.0], [1.27, 0.01, -0.01], [0.0, 0.0, 0.0]])
    assert torch.allclose(round_inputs(inputs, scheme), expected)


def test_a_quantised_model_is_nothing_to_prune(pruned_wide, tmp_path):
    for scheme in SCHEMES:
        write_quantized(pruned_wide, tmp_path / scheme, scheme)
        with pytest.raises(SenteiError, match=r"quantised checkpoints are not supported\. Give the unquantised"):
            open_checkpoint(tmp_path / scheme)
        assert is_quantized(tmp_path / scheme)
        assert open_servable(tmp_path / scheme).layout == open_checkpoint(pruned_wide).layout
    assert open_servable(pruned_wide) == open_checkpoint(pruned_wide)
    done = sentei("verify", tmp_path / "int8", "--against", pruned_wide, "--engine", "transformers")
    refused(done, "is quantised", "--engine vllm")


def spoil(name, tensor):
    """Puts another tensor in a place, or takes it away."""
    return lambda tensors: tensors.pop(name) if tensor is None else tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("scheme", "change", "sentence"),
    [
        ("int8", spoil(f"{Q_PROJ}.weight_scale", torch.ones(5, 1)), r"weight_scale has shape \[5, 1\]; a matrix"),
        ("int8", spoil(f"{Q_PROJ}.weight", None), r"there is no tensor .*q_proj\.weight\."),
        ("w4a16", spoil(f"{Q_PROJ}.weight_packed", None), r"there is no tensor .*q_proj\.weight_packed"),
        ("w4a16", spoil(f"{Q_PROJ}.weight_shape", torch.tensor([64])), "does not describe a matrix"),
        ("w4a16", spoil(f"{DOWN_PROJ}.weight_shape", torch.tensor([64, 128])), r"weight_scale has shape \[64, 2\]"),
        (
            "w4a16",
            spoil("model.layers.0.self_attn.q_proj.weight", torch.ones(2, 2)),
            "weights of the skipped self_attn",
        ),
        ("fp8", spoil("model.layers.3.input_layernorm.weight", None), "layer 3 has no weights of input_layernorm"),
    ],
)
def test_what_is_wrong_is_named(pruned_wide, tmp_path, scheme, change, sentence):
    write_quantized(pruned_wide, tmp_path / "out", scheme, change=change)
    with pytest.raises(SenteiError, match=sentence):
        open_quantized(tmp_path / "out")


@pytest.mark.parametrize("strategies", [("channel", "channel"), ("tensor",), ("block",)])
def test_other_schemes_are_refused(pruned_wide, tmp_path, strategies):
    write_quantized(pruned_wide, tmp_path / "out", "int8")
    config = json.loads((tmp_path / "out/config.json").read_text())
    group = config["quantization_config"]["config_groups"].pop("group_0")
    for number, strategy in enumerate(strategies):
        weights = {**group["weights"], "strategy": strategy, "num_bits": 8 - number}
        config["quantization_config"]["config_groups"][f"group_{number}"] = {**group, "weights": weights}
    assert len(rounding_schemes(config)) == (2 if len(strategies) == 2 else 0)
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(SenteiError, match="one scheme for all layers"):
        open_quantized(tmp_path / "out")
    del config["quantization_config"]["config_groups"]
    with pytest.raises(SenteiError, match="quantization_config is damaged"):
        rounding_schemes(config)


def test_facts_count_what_is_stored(pruned_wide, tmp_path):
    write_quantized(pruned_wide, tmp_path / "out", "int8")
    plain, rounded = checkpoint_facts(pruned_wide, None), checkpoint_facts(tmp_path / "out", None)
    assert (plain.precision, rounded.precision) == ("float32", "int8")
    assert rounded.num_parameters == plain.num_parameters
    assert rounded.block_matrix_parameters == plain.block_matrix_parameters
    scale_bytes = 4 * sum(shape[0] for shape in open_quantized(tmp_path / "out").matrices.values())
    assert plain.weight_bytes - rounded.weight_bytes == 3 * plain.block_matrix_parameters - scale_bytes
    halved = checkpoint_facts(pruned_wide, "bfloat16")
    assert halved.decode_weight_bytes - rounded.decode_weight_bytes == plain.block_matrix_parameters - scale_bytes
