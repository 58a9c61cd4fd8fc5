"""Compares an export with the checkpoint it was made from: same prompts through both, and weight by weight.

What is compared, and with what (:mod:`serving.verify.answers` says how answers differ, in nats; and
:mod:`serving.verify.judge` how far they may: a multiple of the model's own noise):

- A checkpoint for vLLM or Transformers: every tensor must equal its source's, cast to the stored dtype.
  Log-probabilities are compared with the source in float32.
- A nemotron-nas export (vLLM alone runs it): every tensor must equal its source's rows. Otherwise as above.
- ONNX: every weight that is not rounded must equal its source's, cast. Log-probabilities are compared with the source
  in float32, over batches of prompts of unequal length, prefill, tokens one by one with the KV cache, and one prompt as
  long as the context (at most 1024 tokens).
- ONNX in int4 or int8: also, every matrix must be a fair rounding of its source's. Rounding alone moves a small
  model's log-probabilities more than many a fault would (demo model: 0.98 nats on average; any one ``down_proj`` times
  1.5: 0.21 or more), so the arithmetic is compared with the source *carrying the export's own rounded matrices*. What
  rounding did to the model is told as ``rounding_*``; its perplexity and its likeliest tokens have limits.
- ONNX for CUDA where there is no CUDA: on the CPU, which runs some of it; else weights alone, and the verdict says so.
- A quantised checkpoint for vLLM: likewise, and every tensor that is not rounded must equal its source's.
- Where the engine rounds what goes into a matrix, so does the reference. A difference in the last bit then decides how
  a number is rounded, and grows into one as large as rounding makes. The noise has that in it: it is measured between
  references that both carry the rounded matrices and both round what goes into them.

The reference runs on a device, with one layer in memory at a time. It reads the checkpoint once to compare weights, and
once for each pass: one in float32, one for the noise, and one more where matrices are rounded.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from serving.engines.spec import ENGINES, EngineSpec
from serving.engines.transformers import TransformersEngine
from serving.onnx_export.files import is_onnx_export
from serving.verify import decilm, quantized_weights
from serving.verify.answers import GREEDY_TOKENS, Answers, Sequences, answers_of, ask
from serving.verify.card import write_into_card
from serving.verify.judge import Checks, judge, judge_rounding, limits_from
from serving.verify.measure import measure
from serving.verify.reference import Computing
from serving.verify.rounded import RoundedMatrices, distances
from toolchain.checkpoint.directory import Checkpoint, dtype_name, open_checkpoint, same_bits
from toolchain.checkpoint.export_document import EXPORT_FILE, ExportRecord
from toolchain.checkpoint.quantized import is_quantized, open_quantized
from toolchain.checkpoint.rounding_error import check_limit, rounding_checks
from toolchain.checkpoint.verification_document import VERIFICATION_FILE, AnswersVerification
from toolchain.documents import read_document
from toolchain.errors import SenteiError
from toolchain.model.decilm import is_nemotron_nas
from toolchain.model.loading import bos_of, load_tokenizer
from toolchain.outputs import write_text
from toolchain.progress import Progress, no_progress

EngineName = Literal["auto", "transformers", "vllm", "onnx"]
_WINDOWS, _WINDOW_TOKENS = 8, 64
_LONGEST_PROMPT = 1024
_NOT_IN_VLLM = "Transformers ran the export, not vLLM: run sentei verify on the server's machine, too."
_PROMPTS = (
    "The capital of France is Paris, and the capital of Japan is Tokyo. The capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Wer im Winter die Bäume schneidet, erntet im Sommer mehr Äpfel. Deshalb",
    "剪定は、木の形を整えるために枝を切ることです。冬に",
    "Once upon a time there was a gardener who pruned her trees every winter. One morning she found",
    "Question: A train travels 60 kilometres in 45 minutes. How fast is it?\nAnswer:",
    "Le chat est assis sur le tapis et regarde la pluie tomber. Soudain,",
    "La poda de los árboles frutales se hace en invierno, cuando",
    "修剪可以让果树更健康，因为",
    "Dear Sir or Madam,\n\nThank you for your order of 12 March. We are sorry to tell you that",
    '{"name": "Ada Lovelace", "born": 1815, "known_for": ["mathematics", "computing"], "city":',
    "In 1953, the structure of DNA was described by James Watson and Francis Crick, using X-ray images taken by",
)


# How checkpoints for vLLM may be rounded.
QUANTISED = ("fp8", "int8", "w4a16")
_ONNX_PRECISIONS = {"fp32": "onnx-float32", "fp16": "float16", "bf16": "bfloat16", "int8": "onnx-int8", "int4": "int4"}


@dataclass(frozen=True, kw_only=True)
class _Export:
    """What is verified.

    Attributes:
        directory: Where it is.
        source: The checkpoint it was made from.
        engine: What runs it.
        precision: What its weights are stored in, or how they are rounded.
    """

    directory: Path
    source: Checkpoint
    engine: EngineSpec
    precision: str


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """What was found in an export's weights.

    Attributes:
        checks: By name.
        rounded: Its rounded matrices; ``None`` if none are.
        computed_in: What the engine computes in.
    """

    checks: Checks
    rounded: RoundedMatrices | None
    computed_in: torch.dtype


def verify(
    exported: Path,
    against: Path,
    *,
    engine: EngineName = "auto",
    text: Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Compares an export with its checkpoint; the verdict goes into its ``verification.json`` and model card.

    Args:
        exported: What ``sentei export`` wrote.
        against: The checkpoint it was made from.
        engine: What runs the export: onnx for ONNX exports, else vllm (``auto``: where installed) or transformers.
        text: Prompts are windows of this text instead of the built-in ones.
        device: Where the reference is computed, and the export by Transformers.
        dtype: What the reference is computed in.
        offload: Also run an export that Transformers runs one layer at a time, even where all fit.
        progress: Told of answers, weights and the reference's layers.

    Returns:
        What ``verification.json`` holds; ``passed`` says whether every check did.

    Raises:
        SenteiError: Not an export, not a good checkpoint, an engine that cannot run it, or too little text; or the
            model's answers are not finite in what the engine computes in.
        MissingDependencyError: The engine is not installed.
    """
    source = open_checkpoint(against)
    picked = _pick_engine(exported, engine)
    prompts = _prompts(source, text, long=picked.reads_onnx)
    export = _Export(directory=exported, source=source, engine=picked, precision=_precision(exported, picked, source))
    computing = Computing(dtype=dtype, device=device, offload=offload, progress=progress)
    answers, not_run = _ask_export(export, computing, prompts)
    weights = _check_weights(export, progress)
    measured, limits, checks = None, {}, weights.checks
    if answers is not None:
        rounded, computed_in = weights.rounded, weights.computed_in
        measured = measure(source, computing, prompts, answers, rounded=rounded, computed_in=computed_in)
        limits = limits_from(measured.noise, judges_maxima=computed_in == dtype == torch.float32)
        checks |= judge(measured.differences, limits) | judge_rounding(export.precision, measured.rounding)
    verdict = {
        "schema_version": 1,
        "sentei_version": version("sentei"),
        "passed": all(check["passed"] for check in checks.values()),
        "engine": picked.name,
        "dtype": export.precision.removeprefix("onnx-"),
        "not_run": not_run,
        "source_fingerprint": source.fingerprint,
        "prompts": text.name if text else "built-in",
        "num_prompts": len(prompts),
        "num_tokens": sum(map(len, prompts)),
        **(measured.content() if measured else {}),
        "tolerances": limits,
        "checks": checks,
    }
    return _write(exported, AnswersVerification.model_validate(verdict))


def _write(exported: Path, verification: AnswersVerification) -> dict[str, Any]:
    """Writes the verdict into the export's directory and model card, and returns it."""
    write_text(exported / VERIFICATION_FILE, verification.to_json())
    write_into_card(exported, verification.content())
    return verification.content()


def _ask_export(export: _Export, computing: Computing, prompts: Sequences) -> tuple[Answers | None, str]:
    """The export's answers, and what could not be run."""
    with computing.progress(f"Answers of {export.engine.name}", 1) as advance:
        found = _answers_of_export(export, computing, prompts)
        advance()
    return found


def _answers_of_export(export: _Export, computing: Computing, prompts: Sequences) -> tuple[Answers | None, str]:
    if export.engine.reads_onnx:
        return _ask_onnx(export.directory, prompts)
    if is_nemotron_nas(export.directory):
        return ask(decilm.start_vllm(export.directory, export.source), prompts), ""
    if export.engine.is_vllm:
        from serving.engines.vllm import VllmEngine

        return ask(VllmEngine(export.directory), prompts), ""
    checkpoint = open_checkpoint(export.directory)
    if computing.fits(checkpoint, checkpoint.dtype):
        return ask(TransformersEngine(export.directory, device=computing.device), prompts), _NOT_IN_VLLM
    engine = computing.open(checkpoint, checkpoint.dtype)
    try:
        told = "The export was run layer by layer, so without a KV cache: no greedy tokens were compared."
        return answers_of(engine, prompts), f"{told} {_NOT_IN_VLLM}"
    finally:
        engine.close()


def _ask_onnx(exported: Path, prompts: Sequences) -> tuple[Answers | None, str]:
    """Answers of an ONNX export, and what could not be run; without CUDA, the CPU is tried."""
    from serving.engines.onnxruntime import OnnxEngine, missing_provider
    from serving.onnx_export.files import check_files, read_settings

    missing = missing_provider(read_settings(exported).device)
    if missing is None:
        return ask(OnnxEngine(exported), prompts), ""
    check_files(exported)  # what is wrong with them is no fault of the CPU's
    try:
        return ask(OnnxEngine(exported, "cpu"), prompts), f"{missing} It was run on the CPU instead."
    except SenteiError:
        return None, f"{missing} The CPU cannot run it: weights were compared, answers were not."


def _check_weights(export: _Export, progress: Progress) -> _Weights:
    """Compares all that is stored with the source, tensor by tensor."""
    with progress("Weights", 1) as advance:
        found = _compared_weights(export)
        advance()
    return found


def _compared_weights(export: _Export) -> _Weights:
    source, directory = export.source, export.directory
    if export.engine.reads_onnx:
        from serving.engines.onnxruntime import runs_on
        from serving.verify.onnx_weights import OnnxWeights

        onnx = OnnxWeights(source, directory / "model.onnx")
        differing, computed_in = onnx.count_differing(), onnx.dtype
        rounded = onnx.rounded_matrices(on_cpu=runs_on(directory) == "cpu")
    elif export.precision in QUANTISED:
        quantised = open_quantized(directory)
        differing = quantized_weights.count_differing(source, quantised)
        rounded, computed_in = quantized_weights.rounded_matrices(quantised), quantised.dtype
    else:
        opened = _open(directory, source)
        differing, rounded, computed_in = _count_differing(source, opened), None, opened.dtype
    checks = {"differing_tensors": check_limit(differing, 0)}
    if rounded is not None:
        checks |= rounding_checks(distances(source, rounded))
    return _Weights(checks=checks, rounded=rounded, computed_in=computed_in)


def _pick_engine(exported: Path, engine: EngineName) -> EngineSpec:
    if is_nemotron_nas(exported):
        return _vllm_alone(exported, engine, "a nemotron-nas export", hint="Use vllm.")
    is_onnx = is_onnx_export(exported)
    if not is_onnx and is_quantized(exported):
        return _vllm_alone(exported, engine, "quantised", hint="Use --engine vllm.")
    picked: str = engine
    if engine == "auto":
        picked = "onnx" if is_onnx else "vllm" if importlib.util.find_spec("vllm") else "transformers"
    if is_onnx != ENGINES[picked].reads_onnx:
        kind = "an ONNX export" if is_onnx else "no ONNX export"
        raise SenteiError(f"{exported} is {kind}; engine {picked!r} cannot run it.", "Use --engine auto.")
    return ENGINES[picked]


def _vllm_alone(exported: Path, engine: EngineName, kind: str, *, hint: str) -> EngineSpec:
    if engine != "auto" and not ENGINES[engine].is_vllm:
        raise SenteiError(f"{exported} is {kind}; engine {engine!r} cannot run it.", hint)
    return ENGINES["vllm"]


def _open(exported: Path, source: Checkpoint) -> Checkpoint:
    return decilm.open_nas(exported, source) if is_nemotron_nas(exported) else open_checkpoint(exported)


def _precision(exported: Path, engine: EngineSpec, source: Checkpoint) -> str:
    """What weights are stored in, or how they are rounded; ``onnx-`` sets apart what others have as well."""
    if engine.is_vllm and is_quantized(exported):
        return open_quantized(exported).scheme.name
    if not engine.reads_onnx:
        return dtype_name(_open(exported, source).dtype)
    path = exported / EXPORT_FILE
    try:
        precision = read_document(path, ExportRecord).precision
    except SenteiError as error:
        raise SenteiError(f"{path} is missing or damaged, so the precision is unknown.", "Export again.") from error
    if precision not in _ONNX_PRECISIONS:
        raise SenteiError(f"{path}: precision {precision!r} is not known.", f"Known: {', '.join(_ONNX_PRECISIONS)}.")
    return _ONNX_PRECISIONS[precision]


def _prompts(source: Checkpoint, text: Path | None, *, long: bool) -> list[list[int]]:
    tokenizer = load_tokenizer(source.directory)
    context = int(source.config.get("max_position_embeddings") or _WINDOW_TOKENS + GREEDY_TOKENS)
    longest = min(_WINDOW_TOKENS, context - GREEDY_TOKENS)
    if text is None:
        ids = [tokenizer(prompt)["input_ids"] for prompt in _PROMPTS]
        prompts = [each[:longest] for each in ids]
        if long:
            endless = [token for each in ids for token in each] * (_LONGEST_PROMPT // len(ids))
            # Last: greedy tokens follow the first ones, and need room.
            prompts.append(endless[: min(_LONGEST_PROMPT, context)])
        return prompts
    from toolchain.text.windows import load_windows

    bos = bos_of(source.family, tokenizer)
    return load_windows(text, tokenizer, num_samples=_WINDOWS, seq_len=longest, bos=bos).ids.tolist()


def _count_differing(source: Checkpoint, exported: Checkpoint) -> int:
    """Tensors of the export that are not their source's, cast."""
    if is_nemotron_nas(exported.directory):
        return decilm.count_differing(source, exported)
    names = set(source.tensors) ^ set(exported.tensors)
    return len(names) + sum(1 for _ in _differing(source, exported))


def _differing(source: Checkpoint, exported: Checkpoint) -> Iterator[str]:
    for name in set(source.tensors) & set(exported.tensors):
        found = exported.read(name)
        if not same_bits(source.read(name).to(found.dtype), found):
            yield name
