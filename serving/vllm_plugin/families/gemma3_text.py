"""Pruned Gemma 3."""

from vllm.model_executor.models.gemma3 import Gemma3DecoderLayer, Gemma3ForCausalLM

from serving.vllm_plugin.models import PrunedModel


class PrunedGemma3ForCausalLM(PrunedModel, Gemma3ForCausalLM):
    """vLLM's Gemma 3 with layers that differ."""

    decoder_layer = Gemma3DecoderLayer
