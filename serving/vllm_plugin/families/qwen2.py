"""Pruned Qwen2."""

from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM

from serving.vllm_plugin.models import PrunedModel


class PrunedQwen2ForCausalLM(PrunedModel, Qwen2ForCausalLM):
    """vLLM's Qwen2 with layers that differ."""

    decoder_layer = Qwen2DecoderLayer
