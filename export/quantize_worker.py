"""Rounds a checkpoint's matrices with llm-compressor: run as ``python -m export.quantize_worker JOB.json``.

Runs in llm-compressor's own environment, whose libraries do not go together with vLLM's; sentei need not be installed
there. :mod:`export.quantize` starts it, and checks what it writes.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from toolchain.lifetime import end_with_parent
from toolchain.model.loading import load_model

_MAX_SHARD = "5GB"


def main(job_file: Path) -> None:
    """Does one job: reads ``source``, writes config and weights into ``out``, and its versions beside the job."""
    job = json.loads(job_file.read_text(encoding="utf-8"))
    model = load_model(Path(job["source"]))
    calibration: dict[str, Any] = {}
    if job["windows"]:
        # "sequential" has each layer calibrated by what the rounded layers before it give.
        calibration = {"dataset": _batches(load_file(job["windows"])["ids"]), "pipeline": "sequential"}
    _quantize(model, _recipe(job["scheme"], job["group_size"]), calibration)
    # A model's own temperature and the like are refused in what is saved without sampling; its file is carried over.
    model.generation_config = GenerationConfig()
    model.save_pretrained(job["out"], save_compressed=True, max_shard_size=_MAX_SHARD)
    versions = {name: version(name) for name in ("llmcompressor", "compressed-tensors", "torch", "transformers")}
    job_file.with_suffix(".done").write_text(json.dumps(versions), encoding="utf-8")


def _recipe(scheme: str, group_size: int | None) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    if scheme == "w4a16":
        weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=group_size, symmetric=True)
        groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
        return GPTQModifier(config_groups=groups, ignore=["lm_head"])
    preset = {"fp8": "FP8_DYNAMIC", "int8": "W8A8"}[scheme]
    return QuantizationModifier(targets="Linear", scheme=preset, ignore=["lm_head"])


def _batches(ids: torch.Tensor) -> torch.utils.data.DataLoader:
    """One window a batch, from int64 ``[num_samples, seq_len]``."""
    windows = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in ids]
    return torch.utils.data.DataLoader(windows, batch_size=1, shuffle=False)  # type: ignore[arg-type]


def _quantize(model: Any, recipe: Any, calibration: dict[str, Any]) -> None:
    from llmcompressor import oneshot

    # It adds 1 to Gemma's norms for the while and takes it off again, which leaves other last bits.
    vectors = {name: each.detach().clone() for name, each in model.named_parameters() if each.ndim == 1}
    oneshot(model=model, recipe=recipe, **calibration)
    for name, vector in vectors.items():
        model.get_parameter(name).data.copy_(vector)


if __name__ == "__main__":
    end_with_parent()
    try:
        main(Path(sys.argv[1]))
    except Exception as error:
        if os.environ.get("SENTEI_TRACEBACK"):
            raise
        sys.exit(f"{type(error).__name__}: {error}")  # the last words that a user is told
