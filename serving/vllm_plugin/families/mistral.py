"""Pruned Mistral."""

from vllm.model_executor.models.mistral import MistralDecoderLayer, MistralForCausalLM

from serving.vllm_plugin.models import PrunedLlamaLike


class PrunedMistralForCausalLM(PrunedLlamaLike, MistralForCausalLM):
    """vLLM's Mistral with layers that differ."""

    decoder_layer = MistralDecoderLayer
