"""The nemotron-nas export through llama.cpp's own converter into llama.cpp: same answers as Transformers."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers

from export.decilm import export_nemotron_nas
from serving.engines.transformers import TransformersEngine
from tests.conftest import prune_by_hand
from tests.families import make_family_pico

VOCAB_SIZE = 320
PROMPTS = [torch.randint(3, VOCAB_SIZE, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (20, 33)]
VARIANTS = [
    ("llama", "grouped"),
    ("llama", "biased-tied"),
    ("llama", "llama3"),
    ("qwen2", "grouped"),
    ("phi3", "grouped"),
]


def save_llama_tokenizer(directory: Path) -> None:
    """Of Llama 2's kind, which the converter takes for this form: byte pairs with bytes to fall back to."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [f"▁t{number}" for number in range(len(tokens), VOCAB_SIZE)]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def pruned_and_converted(directory: Path, family: str, variant: str) -> tuple[Path, Path]:
    """A random model of four layers: one whole, one without attention, one with nothing, one narrow."""
    source, pruned, exported, gguf = (directory / name for name in ("source", "pruned", "exported", "model.gguf"))
    directory.mkdir()
    make_family_pico(source, family, variant, hidden_size=128, intermediate_size=512, vocab_size=VOCAB_SIZE)
    save_llama_tokenizer(source)
    pruned.mkdir()
    prune_by_hand(source, pruned, removed_attention={1, 2}, width=(512, 256, 0, 256).__getitem__)
    assert export_nemotron_nas(pruned, exported)["llama_cpp_obstacle"] is None
    command = [sys.executable, "-m", "convert_hf_to_gguf", str(exported), "--outtype", "f32", "--outfile", str(gguf)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-4000:]
    return pruned, gguf


@pytest.mark.acceptance
@pytest.mark.skipif(not importlib.util.find_spec("xllamacpp"), reason="needs pip install -e '.[llama-cpp]'")
def test_llama_cpp_agrees_with_transformers(tmp_path: Path):
    models = [pruned_and_converted(tmp_path / f"{family}-{variant}", family, variant) for family, variant in VARIANTS]
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([{"file": str(gguf), "prompts": PROMPTS} for _, gguf in models]))
    command = [sys.executable, "-m", "tests.serving.llama_cpp_answers", str(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr[-4000:]
    for (pruned, _), answers in zip(models, json.loads(Path(f"{jobs}.answers").read_text()), strict=True):
        reference = TransformersEngine(pruned, dtype=torch.float32)
        for prompt, positions in zip(PROMPTS, answers, strict=True):
            expected = reference.log_probabilities(prompt)
            for position, found in enumerate(positions):
                assert len(found) == 10
                assert all(abs(value - float(expected[position, token])) < 1e-3 for token, value in found)
