"""Quantised pruned models in vLLM: nothing missing, nothing too large, and the same answers as the rounded matrices."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from serving.engines.transformers import TransformersEngine
from serving.verify.quantized_weights import rounded_matrices
from serving.verify.rounded import carry, round_inputs
from serving.vllm_plugin.weights import CompleteWeights
from tests.quantized import quantization_config, round_matrix, write_quantized
from toolchain.architecture.families import FAMILIES
from toolchain.architecture.layout import LayerLayout
from toolchain.architecture.rounding_scheme import rounding_schemes
from toolchain.checkpoint.quantized import open_quantized
from toolchain.errors import SenteiError

HIDDEN, WIDTH = 32, 64


class Loaded(nn.Module):
    """A vLLM model as far as loading goes: it takes everything, as vLLM's loader does for linear layers."""

    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012 (as in vLLM)

    def load_weights(self, weights):
        return {name for name, _ in weights}


def linear(out_features, in_features, scheme):
    """A linear layer with the parameters that vLLM gives it."""
    parts, _ = round_matrix(torch.ones(out_features, in_features), scheme)
    module = nn.Module()
    for name, tensor in parts.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return module


class Model(CompleteWeights, Loaded):
    """One layer without attention."""

    def __init__(self, scheme):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Module()])
        self.model.layers[0].mlp = nn.Module()
        self.model.layers[0].mlp.gate_up_proj = linear(2 * WIDTH, HIDDEN, scheme)
        self.model.layers[0].mlp.down_proj = linear(HIDDEN, WIDTH, scheme)
        self.layout = (LayerLayout(attention=False, intermediate_size=WIDTH),)
        self.family = FAMILIES["llama"]
        self.schemes = rounding_schemes({"quantization_config": quantization_config(scheme)})


def stored(scheme, width=WIDTH):
    """What a checkpoint with an FFN of that width holds for the layer."""
    shapes = {"gate_proj": (width, HIDDEN), "up_proj": (width, HIDDEN), "down_proj": (HIDDEN, width)}
    return {
        f"model.layers.0.mlp.{name}.{part}": tensor
        for name, shape in shapes.items()
        for part, tensor in round_matrix(torch.ones(shape), scheme)[0].items()
    }


PARTS = [("int8", "weight"), ("int8", "weight_scale"), ("fp8", "weight"), ("fp8", "weight_scale")]
PARTS += [("w4a16", "weight_packed"), ("w4a16", "weight_scale")]


@pytest.mark.parametrize("scheme", ["int8", "fp8", "w4a16"])
def test_complete_weights_load(scheme):
    weights = stored(scheme)
    assert Model(scheme).load_weights(weights.items()) == set(weights)


@pytest.mark.parametrize(("scheme", "part"), PARTS)
@pytest.mark.parametrize("module", ["up_proj", "down_proj"])
def test_a_missing_part_fails(scheme, part, module):
    weights = stored(scheme)
    del weights[f"model.layers.0.mlp.{module}.{part}"]
    with pytest.raises(SenteiError, match=rf"has no tensor model\.layers\.0\.mlp\.{module}\.{part} \(1 missing\)"):
        Model(scheme).load_weights(weights.items())


@pytest.mark.parametrize(("scheme", "part"), PARTS)
@pytest.mark.parametrize("module", ["up_proj", "down_proj"])
def test_a_part_of_another_width_fails(scheme, part, module):
    name = f"model.layers.0.mlp.{module}.{part}"
    weights, wider = stored(scheme), stored(scheme, width=WIDTH + 32)
    if wider[name].shape == weights[name].shape:
        assert (module, part) == ("down_proj", "weight_scale")  # one scale a row, however long the row
        return
    with pytest.raises(
        SenteiError, match=rf"{module}\.{part} has shape .*, but config\.json says intermediate_size 64"
    ):
        Model(scheme).load_weights((weights | {name: wider[name]}).items())


def test_a_format_of_vllms_own_is_left_to_it():
    """Such as bitsandbytes, whose weights are bytes in a row."""
    model = Model("int8")
    model.schemes = ()
    weights = {name: torch.zeros(7, 1, dtype=torch.uint8) for name in stored("int8")}
    assert model.load_weights(weights.items()) == set(weights)


PROMPTS = [[1, 504, 3575, 282, 4649, 314], [504, 253, 2429, 260, 9, 77, 1234, 5]]
# The finest dtype that each scheme's kernel on a CPU takes, and the largest mean difference in it. Measured: 4e-2,
# 3e-3, 7e-7. In bfloat16 the random model's own arithmetic makes 4e-2, and rounding it to 4 bits makes 0.4.
VLLM = {"int8": ("bfloat16", 0.1), "w4a16": ("float16", 0.02), "fp8": ("float32", 1e-4)}


@pytest.fixture(scope="module")
def vllm_answers(vllm, pruned_wide, tmp_path_factory):
    """What real vLLM says of each scheme, and its directory."""
    directory = tmp_path_factory.mktemp("quantised")
    jobs = []
    for scheme, (dtype, _) in VLLM.items():
        write_quantized(pruned_wide, directory / scheme, scheme)
        jobs.append({"directory": str(directory / scheme), "prompts": PROMPTS, "dtype": dtype})
    file = directory / "jobs.json"
    file.write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.vllm_answers", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads((directory / "jobs.json.answers").read_text())
    return {scheme: (directory / scheme, each) for scheme, each in zip(VLLM, answers, strict=True)}


@pytest.mark.acceptance
@pytest.mark.parametrize("scheme", VLLM)
def test_vllm_computes_with_the_rounded_matrices(pruned_wide, vllm_answers, scheme):
    directory, found = vllm_answers[scheme]
    assert "refused" not in found, found
    differences = differences_from_rounded(pruned_wide, directory, PROMPTS, found)
    assert sum(differences) / len(differences) < VLLM[scheme][1]


def differences_from_rounded(source, directory, prompts, answer):
    """Of vLLM's log-probabilities from those of the source with the rounded matrices, in nats."""
    reference = TransformersEngine(source, dtype=torch.float32)
    rounded = rounded_matrices(open_quantized(directory))
    carry(reference.model, rounded)
    round_inputs(reference.model, rounded)
    differences = []
    for prompt, positions in zip(prompts, answer["log_probabilities"], strict=True):
        expected = reference.log_probabilities(prompt)
        for row, entry in zip(expected, positions, strict=False):
            differences += [abs(value - float(row[token])) for token, value in entry]
    return differences
