"""``VLLM_BATCH_INVARIANT`` on a GPU for which vLLM has tuned tiles, as far as that can be seen without one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.serving.vllm_plugin.test_vllm_families import wide_pico

pytestmark = pytest.mark.usefixtures("vllm")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The question that vLLM asks, put to a model on a Hopper GPU whose table holds the shapes given."""
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig
    from vllm.model_executor.determinism import batch_invariant_configs
    from vllm.platforms.interface import DeviceCapability

    from serving.vllm_plugin.registration import register

    register()
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")

    def ask(directory: Path, *shapes: tuple[int, int]) -> bool:
        model = ModelConfig(model=str(directory), dtype="bfloat16", skip_tokenizer_init=True, max_model_len=64)
        on_hopper = SimpleNamespace(is_cuda=lambda: True, get_device_capability=lambda: DeviceCapability(9, 0))
        with monkeypatch.context() as patch:
            patch.setattr("vllm.platforms.current_platform", on_hopper)
            table = batch_invariant_configs._BATCH_INVARIANT_MATMUL_TUNED_CONFIGS
            patch.setitem(table, "hopper", dict.fromkeys(shapes))
            config: Any = SimpleNamespace(model_config=model, parallel_config=ParallelConfig())
            before = model.hf_text_config
            answer = VllmConfig._uses_breakable_cudagraph_for_batch_invariance(config)
        assert model.hf_text_config is before
        return answer

    return ask


def test_each_width_is_asked_for(asked: Any, tmp_path: Path):
    """Without the plugin vLLM stops: it asks for one width, which Transformers refuses if layers differ."""
    model = wide_pico(tmp_path, "llama", "grouped")  # widths 50 and 96 of 96, hidden 128, and two without an FFN
    assert asked(model, (2 * 50, 128))
    assert asked(model, (128, 96))
    assert asked(model, (128, 128))  # attention's output
    assert not asked(model, (2 * 48, 128), (128, 48))


def test_other_models_are_asked_as_ever(asked: Any, tmp_path: Path):
    wide_pico(tmp_path, "llama", "grouped")
    assert asked(tmp_path / "llama-grouped", (2 * 96, 128))
    assert not asked(tmp_path / "llama-grouped", (2 * 50, 128))
