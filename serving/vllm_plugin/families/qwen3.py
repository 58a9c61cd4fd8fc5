"""Pruned Qwen3."""

from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM

from serving.vllm_plugin.models import PrunedModel


class PrunedQwen3ForCausalLM(PrunedModel, Qwen3ForCausalLM):
    """vLLM's Qwen3 with layers that differ."""

    decoder_layer = Qwen3DecoderLayer
