"""Pipeline stages: what vLLM makes of one without attention, and that it is refused before."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolchain.architecture.layout import LayerLayout
from toolchain.errors import SenteiError

pytestmark = pytest.mark.usefixtures("vllm")


def layers(attending: str) -> list[LayerLayout]:
    return [LayerLayout(attention=each == "a", intermediate_size=64) for each in attending]


def kv_cache_blocks(stages: list[str]) -> list[int]:
    """What vLLM itself allocates for stages: of each, kinds of layers, ``s`` sliding, ``f`` full, ``-`` neither."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    shape: dict[str, Any] = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
    kinds = {"f": FullAttentionSpec(**shape), "s": SlidingWindowSpec(**shape, sliding_window=64)}
    specs = [
        {f"{stage}.{index}": kinds[kind] for index, kind in enumerate(of_stage) if kind in kinds}
        for stage, of_stage in enumerate(stages)
    ]
    found = get_kv_cache_configs(vllm_config(), specs, [2**24] * len(stages))
    return [each.num_blocks for each in found]


def vllm_config() -> Any:
    from vllm.config import VllmConfig

    config = VllmConfig()
    config.model_config = SimpleNamespace(max_model_len=128, original_max_model_len=None)
    config.cache_config.kv_cache_layout = "LBHNC"  # the CPU's, which an engine asks its workers for
    return config


def test_what_vllm_makes_of_a_stage_without_attention():
    """The reason for the refusal: if this fails, vLLM has learnt it."""
    assert len(set(kv_cache_blocks(["ff", "f-"]))) == 1
    assert len(set(kv_cache_blocks(["ssf", "ss-"]))) == 1  # layers of one kind are enough
    with pytest.raises((ZeroDivisionError, AssertionError)):
        kv_cache_blocks(["ff", "--"])


@pytest.mark.parametrize(
    ("attending", "stages", "sentence"),
    [
        ("aaaa--", 3, r"stage 2 \(layers 4 to 5\) has no attention.*Set VLLM_PP_LAYER_PARTITION=2,1,3\."),
        ("--aa", 2, r"stage 0 \(layers 0 to 1\) has no attention.*Set VLLM_PP_LAYER_PARTITION=3,1\."),
        ("a---", 2, r"stage 1 .*Serve with at most 1 stages: 1 layers attend\."),
    ],
)
def test_it_is_refused_with_a_way_out(attending: str, stages: int, sentence: str):
    from serving.vllm_plugin.stages import check_stages

    with pytest.raises(SenteiError, match=sentence):
        check_stages(layers(attending), stages)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 8))
def test_the_way_out_is_one(attending: list[bool], stages: int):
    from serving.vllm_plugin.stages import check_stages

    layout = [LayerLayout(attention=each, intermediate_size=64) for each in attending]
    try:
        check_stages(layout, stages)
    except SenteiError as error:
        if found := re.search(r"PARTITION=([\d,]+)", str(error)):
            with pytest.MonkeyPatch.context() as environment:
                environment.setenv("VLLM_PP_LAYER_PARTITION", found[1])
                check_stages(layout, stages)
        else:
            assert sum(attending) < stages
