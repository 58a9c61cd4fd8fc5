"""Pruned Granite."""

from vllm.model_executor.models.granite import GraniteDecoderLayer, GraniteForCausalLM

from serving.vllm_plugin.models import PrunedModel


class PrunedGraniteForCausalLM(PrunedModel, GraniteForCausalLM):
    """vLLM's Granite with layers that differ."""

    decoder_layer = GraniteDecoderLayer
