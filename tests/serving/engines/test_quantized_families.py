"""Every family pruned, then quantised by llm-compressor, in vLLM: it computes with the rounded matrices."""

from statistics import median

import pytest

from export.quantize import quantize
from tests.serving.engines.test_quantized_in_vllm import differences_from_rounded
from tests.serving.vllm_plugin.test_vllm_families import PROMPTS, SPLIT, ask_vllm, wide_pico

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.compatibility(
        "quantised", "`sentei quantize` in fp8 and int8; vLLM computes with the rounded matrices"
    ),
]
# The finest dtype that the scheme's kernel on a CPU takes, and the largest median difference in nats. The median, since
# inputs are rounded too: where a sum in another order moves one across a step, the tokens behind it differ visibly.
LIMITS = {"fp8": ("float32", 1e-4), "int8": ("bfloat16", 0.2)}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory):
    """By family and scheme: the pruned model, the quantised one, and vLLM's answers."""
    directory = tmp_path_factory.mktemp("quantised-families")
    models, jobs = {}, []
    for family, variant in SPLIT:
        pruned = wide_pico(directory, family, variant)
        for scheme, (dtype, _) in LIMITS.items():
            out = directory / f"{family}-{scheme}"
            quantize(pruned, out, scheme=scheme)
            models[family, scheme] = pruned, out
            jobs.append({"directory": str(out), "dtype": dtype})
    answers = ask_vllm(directory, jobs)
    return {key: (*models[key], answer) for key, answer in zip(models, answers, strict=True)}


@pytest.mark.parametrize("scheme", LIMITS)
@pytest.mark.parametrize("family", [family for family, _ in SPLIT])
def test_vllm_computes_with_the_rounded_matrices(quantised, family: str, scheme: str):
    pruned, out, answer = quantised[family, scheme]
    assert "refused" not in answer, answer["refused"]
    differences = differences_from_rounded(pruned, out, PROMPTS, answer)
    assert median(differences) < LIMITS[scheme][1]
    assert max(differences) < 2
