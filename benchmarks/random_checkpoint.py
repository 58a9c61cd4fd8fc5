"""Checkpoints of random weights and a real model's shape, and what pruning makes of their shapes: for measuring speed.

    python benchmarks/random_checkpoint.py models --shape llama-3-8b --sparsity 0.14 --sparsity 0.25

writes ``models/original`` and ``models/pruned-0.25``. Widths and the number of attentions are those of the
published split (``sentei prune --method 2ssp``), nearly the same in every layer; which neurons and which layers'
attentions go makes no difference to speed, and is not searched for. The tokenizer is the demo model's: nothing is
downloaded.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import LlamaConfig

from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import copy_companions, open_checkpoint, write_config, write_weights
from toolchain.model.gguf import demo_gguf, import_gguf
from toolchain.model.slicing import write_pruned
from toolchain.prune.budget.allocation import allocate, block_parameters

SHAPES: Mapping[str, Mapping[str, object]] = {
    "llama-3-8b": {
        "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "small": {
        "num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 448, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 60000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    },
}  # fmt: skip


def main(
    out: Annotated[Path, typer.Argument(help="Directory for the checkpoints.")],
    *,
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "llama-3-8b",
    sparsity: Annotated[list[float] | None, typer.Option(help="Of the decoder blocks; several if wanted.")] = None,
    align: Annotated[int, typer.Option(help="FFN widths are multiples of this.")] = 64,
) -> None:
    """Writes the original, and one pruned checkpoint for each sparsity; what is there already is left alone."""
    original = out / "original"
    if not original.exists():
        partial = out / "original.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        generate(partial, SHAPES[shape])
        partial.rename(original)
    for each in sparsity or []:
        pruned = out / f"pruned-{each:g}"
        if not pruned.exists():
            partial = out / f"pruned-{each:g}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            prune_shape(original, partial, each, align=align)
            partial.rename(pruned)
            print(
                f"{pruned}: {open_checkpoint(pruned).weight_bytes / open_checkpoint(original).weight_bytes:.3f} bytes"
            )


def generate(directory: Path, shape: Mapping[str, object], *, max_shard_bytes: int = 5_000_000_000) -> None:
    """A Llama in bfloat16, the same for the same shape and kind of device, one tensor in memory at a time."""
    config = LlamaConfig(**shape, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    hidden, width = config.hidden_size, config.intermediate_size
    key_width = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        of_layer = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (key_width, hidden),
            "self_attn.v_proj": (key_width, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}.weight": size for name, size in of_layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def load(name: str) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name], dtype=torch.bfloat16)
        generator = torch.Generator(device).manual_seed(seed)
        return (torch.randn(shapes[name], generator=generator, device=device) * 0.03).to("cpu", torch.bfloat16)

    directory.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        import_gguf(demo_gguf(), Path(temporary) / "demo")
        copy_companions(Path(temporary) / "demo", directory)
    write_config(directory, config.to_dict())
    tensors = {name: (size, torch.bfloat16) for name, size in shapes.items()}
    write_weights(directory, tensors, load, max_shard_bytes=max_shard_bytes)


def prune_shape(original: Path, directory: Path, sparsity: float, *, align: int) -> None:
    """The shape that ``--method 2ssp`` would give it: the first neurons stay, and the first layers' attentions go."""
    checkpoint = open_checkpoint(original)
    allocation = allocate(block_parameters(checkpoint), sparsity, align=align)
    layout = [
        LayerLayout(attention=layer >= allocation.num_attention_removals, intermediate_size=width)
        for layer, width in enumerate(allocation.widths)
    ]
    directory.mkdir(parents=True)
    write_pruned(checkpoint, layout, [np.arange(width, dtype=np.int64) for width in allocation.widths], directory)


if __name__ == "__main__":
    typer.run(main)
