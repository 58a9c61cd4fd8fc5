"""Pruned Llama."""

from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

from serving.vllm_plugin.models import PrunedLlamaLike


class PrunedLlamaForCausalLM(PrunedLlamaLike, LlamaForCausalLM):
    """vLLM's Llama with layers that differ."""

    decoder_layer = LlamaDecoderLayer
