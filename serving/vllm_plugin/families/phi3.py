"""Pruned Phi-3."""

from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.phi3 import Phi3ForCausalLM

from serving.vllm_plugin.models import PrunedLlamaLike


class PrunedPhi3ForCausalLM(PrunedLlamaLike, Phi3ForCausalLM):
    """vLLM's Phi-3 with layers that differ."""

    decoder_layer = LlamaDecoderLayer
