"""A pruned checkpoint with rounded matrices, through llm-compressor, for vLLM: pruning and quantising together.

llm-compressor and vLLM want different versions of the same libraries, so it runs in an environment of its own
(:mod:`export.quantize_worker`). Nothing that it writes is trusted: here every tensor is compared with its source.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from toolchain.checkpoint.directory import (
    Checkpoint,
    copy_companions,
    open_checkpoint,
    read_config,
    same_bits,
    write_config,
)
from toolchain.checkpoint.quantized import QuantizedCheckpoint, open_quantized
from toolchain.checkpoint.rounding_error import measure_rounding, rounding_checks
from toolchain.checkpoint.verification_document import VERIFICATION_FILE, ExportVerification
from toolchain.errors import CheckFailedError, SenteiError
from toolchain.json_files import read_json_object
from toolchain.outputs import check_output_directory, new_directory, writes_directory
from toolchain.safetensors_files import let_others_read

PYTHON_VARIABLE = "SENTEI_QUANTIZE_PYTHON"
_ROOT = Path(__file__).resolve().parents[1]
# What vLLM has fast int4 kernels for; a larger group needs less room, a smaller one divides more widths.
_GROUP_SIZES = (128, 64, 32)
# Whether rounding needs to see text.
SCHEMES: Mapping[str, bool] = {"fp8": False, "int8": False, "w4a16": True}
_TAIL_LINES = 8


def needs_text(scheme: str) -> bool:
    """Whether a scheme is calibrated with text.

    Raises:
        SenteiError: There is no such scheme.
    """
    if scheme not in SCHEMES:
        raise SenteiError(f"--scheme {scheme!r} is not known.", f"Use {', '.join(SCHEMES)}.")
    return SCHEMES[scheme]


@writes_directory
def quantize(
    directory: Path,
    out: Path,
    *,
    scheme: str,
    windows: torch.Tensor | None = None,
    force: bool = False,
    on_line: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Writes a quantised checkpoint that vLLM serves with the sentei plugin, and compares every tensor with its source.

    Args:
        directory: A checkpoint, pruned or not.
        out: The directory to create.
        scheme: ``fp8`` and ``int8`` round weights row by row and what goes into a matrix token by token; ``w4a16``
            rounds weights alone, in groups along a row, by GPTQ.
        windows: int64 ``[num_samples, seq_len]``, what ``w4a16`` is calibrated with.
        force: Replace ``out`` if it is not empty.
        on_line: Called with each line that llm-compressor says.

    Returns:
        What ``verification.json`` holds.

    Raises:
        SenteiError: Unknown scheme, not a good checkpoint, already quantised, widths that no group size divides, or no
            llm-compressor; or it failed.
        CheckFailedError: What it wrote is not what should have been written.
    """
    assert needs_text(scheme) == (windows is not None)
    check_output_directory(out, force=force, inputs=[directory])
    checkpoint = open_checkpoint(directory)
    group_size = pick_group_size(checkpoint) if scheme == "w4a16" else None
    python = find_python()
    with new_directory(out, force=force) as partial, tempfile.TemporaryDirectory(dir=partial) as scratch:
        job: dict[str, Any] = {"scheme": scheme, "group_size": group_size, "windows": None}
        job |= {"source": str(directory.resolve()), "out": str(partial.resolve())}
        if windows is not None:
            job["windows"] = str(Path(scratch) / "windows.safetensors")
            save_file({"ids": windows.contiguous()}, job["windows"])
        versions = _run(python, job, Path(scratch), on_line)
        let_others_read(partial)
        _dress(checkpoint, partial, scheme)
        found = _compare(checkpoint, partial, scheme) | {"quantised_with": versions}
        verification = ExportVerification.model_validate(found)
        (partial / VERIFICATION_FILE).write_text(verification.to_json(), encoding="utf-8")
    return verification.content()


def pick_group_size(checkpoint: Checkpoint) -> int:
    """The largest group that divides the inputs of every matrix, so that all layers have the same.

    Raises:
        SenteiError: None does; names a matrix in the way.
    """
    inputs = {name: shape[1] for name, shape in _linear_shapes(checkpoint).items()}
    for group_size in _GROUP_SIZES:
        if not any(in_features % group_size for in_features in inputs.values()):
            return group_size
    odd = [name for name, in_features in inputs.items() if in_features % _GROUP_SIZES[-1]]
    raise SenteiError(
        f"{checkpoint.directory}: w4a16 rounds in groups of {' or '.join(map(str, _GROUP_SIZES))} inputs, and none "
        f"divides the {inputs[odd[0]]} of {odd[0]} ({len(odd)} such matrices).",
        "Prune with --align 64, or quantise with --scheme int8 or fp8.",
    )


def find_python() -> str:
    """The Python that has llm-compressor: the one named by the environment, this one, or what the Makefile builds.

    Raises:
        SenteiError: There is none.
    """
    if named := os.environ.get(PYTHON_VARIABLE):
        if shutil.which(named) is None:
            raise SenteiError(f"{PYTHON_VARIABLE} is {named}, which is no program.", "Name a Python interpreter.")
        return named
    if importlib.util.find_spec("llmcompressor") is not None:
        return sys.executable
    built = _ROOT / ".venv-quantize" / "bin" / "python"
    if built.is_file():
        return str(built)
    raise SenteiError(
        "llm-compressor is not installed; it needs an environment of its own, beside vLLM's.",
        f"Build it with: make quantize-env. Or install requirements/quantize.txt where you like, and let "
        f"{PYTHON_VARIABLE} name that Python.",
    )


def _run(python: str, job: Mapping[str, Any], scratch: Path, on_line: Callable[[str], None]) -> dict[str, str]:
    """Has the other environment do the job; returns the versions of what did it."""
    job_file = scratch / "job.json"
    job_file.write_text(json.dumps(job), encoding="utf-8")
    # This very sentei, and nothing else of the environment it is installed in, whose libraries are other versions.
    packages = scratch / "packages"
    packages.mkdir()
    for name in ("toolchain", "export"):
        (packages / name).symlink_to(_ROOT / name)
    environment = {**os.environ, "PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        [python, "-P", "-m", "export.quantize_worker", str(job_file)],
        stdin=subprocess.PIPE,  # by which the worker knows that this process has not died
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=environment,
    )
    last_lines: deque[str] = deque(maxlen=_TAIL_LINES)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            last_lines.append(line.rstrip())
            on_line(line.rstrip())
        code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    done = job_file.with_suffix(".done")
    if code or not done.is_file():
        hint = "Signal 9 is often the system's answer to full memory." if code == -9 else ""
        said = "\n".join(last_lines)
        raise SenteiError(f"llm-compressor ({python}) ended with exit code {code}. Its last words:\n{said}\n", hint)
    return read_json_object(done)


def _dress(checkpoint: Checkpoint, out: Path, scheme: str) -> None:
    """Makes of what llm-compressor wrote a directory like any other of ours: config, companions, plan, model card."""
    # Of its config only what it added: the rest is the source's, to the letter.
    added = read_config(out).get("quantization_config")
    write_config(out, {**checkpoint.config, "quantization_config": added})
    copy_companions(checkpoint.directory, out)
    if (checkpoint.directory / "plan.json").is_file():
        shutil.copyfile(checkpoint.directory / "plan.json", out / "plan.json")
    card = checkpoint.directory / "README.md"
    if card.is_file():
        note = (
            f"\n## Quantised\n\nThe matrices of the decoder layers were then rounded with `sentei quantize --scheme "
            f"{scheme}`; embeddings, head and norms are untouched. Sizes and cost above are those before. vLLM serves "
            "this directory as it does the unquantised one; Transformers does not load it.\n"
        )
        (out / "README.md").write_text(card.read_text(encoding="utf-8") + note, encoding="utf-8")


def _linear_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The matrices of the decoder layers, which are what is rounded, by name."""
    prefix = f"{checkpoint.family.layers}."
    return {
        name: info.shape
        for name, info in checkpoint.tensors.items()
        if name.startswith(prefix) and len(info.shape) == 2
    }


def _compare(checkpoint: Checkpoint, out: Path, scheme: str) -> dict[str, Any]:
    """Opens what was written as a reader would; what is not rounded must be the same, the rest a fair rounding."""
    written = open_quantized(out)
    wanted = _linear_shapes(checkpoint)
    if written.layout != checkpoint.layout or dict(written.matrices) != wanted:
        odd = sorted(set(written.matrices.items()) ^ set(wanted.items()))
        raise CheckFailedError(f"llm-compressor did not round the matrices of {checkpoint.directory}: {odd[:1]}.")
    if written.scheme.name != scheme:
        raise CheckFailedError(f"llm-compressor rounded to {written.scheme.name}, not to {scheme}.")
    num_equal = _check_the_rest(checkpoint, written)
    matrices = [measure_rounding(name, scheme, written.matrix(name), checkpoint.read(name)) for name in sorted(wanted)]
    checks = {"differing_tensors": {"passed": True, "value": 0, "limit": 0}} | rounding_checks(matrices)
    if bad := [name for name, each in checks.items() if not each["passed"]]:
        raise CheckFailedError(
            f"{checks[bad[0]]['matrix']} is no fair rounding of the source's: {bad[0]} is "
            f"{checks[bad[0]]['value']:.3g}, above {checks[bad[0]]['limit']}.",
            "If the text is short, calibrate with more of it.",
        )
    return {
        "schema_version": 1,
        "sentei_version": version("sentei"),
        "passed": True,
        "engine": "safetensors",
        "scheme": scheme,
        "group_size": written.scheme.group_size,
        "source_fingerprint": checkpoint.fingerprint,
        "num_matrices": len(matrices),
        "num_other_tensors": num_equal,
        "source_weight_bytes": checkpoint.weight_bytes,
        "weight_bytes": written.weight_bytes,
        "checks": checks,
    }


def _check_the_rest(checkpoint: Checkpoint, written: QuantizedCheckpoint) -> int:
    """Compares what is not rounded bit by bit, in the dtype it is stored in; returns the number of tensors."""
    expected = set(checkpoint.tensors) - set(written.matrices)
    found = set(written.tensors) - written.parts
    # A tied head that the source stores beside its embedding is stored once now.
    if checkpoint.config.get("tie_word_embeddings", False):
        expected -= {"lm_head.weight"}
        found -= {"lm_head.weight"}
    if odd := sorted(expected ^ found):
        raise CheckFailedError(f"What llm-compressor wrote has other tensors than {checkpoint.directory}: {odd[0]}.")
    for name in sorted(expected):
        tensor = written.read(name)
        if not same_bits(checkpoint.read(name).to(tensor.dtype), tensor):
            raise CheckFailedError(f"{name} is not rounded, and yet differs from {checkpoint.directory}.")
    return len(expected)
