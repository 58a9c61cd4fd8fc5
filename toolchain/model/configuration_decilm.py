"""The config class of checkpoints in DeciLM's form, whose layers differ (sentei export nemotron-nas).

A server reads this file when it is started with trust_remote_code. It makes each layer's entry of `block_configs` in
config.json readable as attributes, which the server's model class expects, and does nothing else.
"""

from typing import Any

from transformers import PretrainedConfig


class Block(dict[str, Any]):
    """An object of config.json whose entries can be read as attributes; still a dict, so it can be saved."""

    def __getattr__(self, name: str) -> Any:
        """Reads an entry."""
        if name in self:
            return self[name]
        raise AttributeError(name)


class DeciLMConfig(PretrainedConfig):
    """Everything config.json holds, as attributes."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), **others: Any) -> None:
        """Takes the entries of config.json.

        Args:
            block_configs: One object a layer, with `attention` and `ffn`.
            others: The rest.
        """
        self.block_configs = [Block({part: Block(said) for part, said in block.items()}) for block in block_configs]
        super().__init__(**others)
