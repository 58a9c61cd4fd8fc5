from pathlib import Path

import torch

from toolchain.checkpoint import open_checkpoint
from toolchain.modeling import load_model, load_tokenizer


def test_pruned_demo_generates_the_same_with_and_without_cache(pruned_demo: Path):
    model, tokenizer = load_model(pruned_demo, dtype=torch.float32), load_tokenizer(pruned_demo)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    cached, uncached = (
        model.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)
    assert open_checkpoint(pruned_demo).is_pruned
