"""Compares an export with the checkpoint it was made from: same prompts through both, and weight by weight.

What is compared, and with what (log-probabilities in nats, at each engine's ten likeliest tokens and the actual next
one; greedy tokens by how much less likely than its own first choice the reference finds them):

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
- A quantised checkpoint for vLLM: likewise, and every tensor that is not rounded must equal its source's. Where the
  scheme rounds what goes into a matrix, so does the reference. A difference in the last of 16 bits then decides how a
  number is rounded, and grows into one as large as rounding makes: vLLM may differ by that much more, and how much it
  is, is measured between the reference with and without rounding.
"""

import importlib.util
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from serving.engines.spec import ENGINES, EngineSpec
from serving.engines.transformers import Engine, TransformersEngine
from serving.onnx_export.files import is_onnx_export
from serving.verify import decilm
from serving.verify.card import write_into_card
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

EngineName = Literal["auto", "transformers", "vllm", "onnx"]
Checks = dict[str, dict[str, Any]]  # by name, as they are written
_TOP_K = 10
_GREEDY_PROMPTS, _GREEDY_TOKENS = 4, 16
_WINDOWS, _WINDOW_TOKENS = 8, 64
_LONGEST_PROMPT = 1024
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


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """Largest accepted differences, in nats; ``None`` is not checked.

    Attributes:
        max_difference: Of any log-probability, absolute.
        mean_difference: Of log-probabilities, absolute, on average. Few very sensitive tokens can dominate it.
        median_difference: Of log-probabilities, absolute.
        greedy_margin: How much less likely than its first choice the reference finds a greedy token, on average; one
            token counts as 1 at most.
    """

    max_difference: float | None = None
    mean_difference: float
    median_difference: float
    greedy_margin: float


@dataclass(frozen=True, kw_only=True)
class Differences:
    """How an engine's answers differ from the reference's; see :class:`Tolerances`.

    Attributes:
        max_difference: See there.
        mean_difference: See there.
        median_difference: See there.
        kl_divergence: Of the engine's next-token distribution from the reference's, in nats, on average over positions;
            all tokens but the engine's likeliest count as one, so this is at most the divergence of the whole.
        top1_agreement: Fraction of positions with the same likeliest token.
        greedy_margin: See :class:`Tolerances`.
        greedy_agreement: Fraction of greedy tokens that are the reference's own first choice.
        perplexity_ratio: Perplexity of the prompts' own tokens, over the reference's.
    """

    max_difference: float
    mean_difference: float
    median_difference: float
    kl_divergence: float
    top1_agreement: float
    greedy_margin: float
    greedy_agreement: float
    perplexity_ratio: float


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What an engine said: log-probabilities for each prompt, greedy tokens after the first few."""

    log_probabilities: list[list[dict[int, float]]]
    greedy: list[list[int]]


# Measured on the demo model, on itself pruned by 25 %, and on itself with attention gone in layers 0 and 12; each in
# vLLM, Transformers and ONNX Runtime where they can (largest of max | mean | median | greedy margin):
#   float32   1.8e-3 | 1.6e-5 | 8e-6  | 0        float16   2.0 | 0.013 | 0.006 | 2e-4
#   bfloat16  9.1    | 0.11   | 0.049 | 4e-3     int4      2.0 | 0.11  | 0.079 | 0.13
# Maxima come from a few tokens to which a model without its first attention is very sensitive; outside float32 they
# tell nothing. After some commas the first choice of such a model is 9.5 nats apart in Transformers' own float32 and
# bfloat16: hence the cap on a greedy token's margin. A cache that is never read: 0.25. A fault in one down_proj,
# smallest over the demo model's layers: times 1.05 in float32 0.33 | 0.026; times 1.5 in bfloat16 a mean of 0.21 and a
# median of 0.137.
TOLERANCES: Mapping[str, Tolerances] = {
    "float32": Tolerances(max_difference=5e-3, mean_difference=1e-4, median_difference=5e-5, greedy_margin=1e-3),
    "float16": Tolerances(mean_difference=0.05, median_difference=0.02, greedy_margin=0.1),
    "bfloat16": Tolerances(mean_difference=0.3, median_difference=0.1, greedy_margin=0.1),
    "onnx-float32": Tolerances(max_difference=1e-3, mean_difference=1e-4, median_difference=5e-5, greedy_margin=1e-3),
    "onnx-int8": Tolerances(mean_difference=0.3, median_difference=0.15, greedy_margin=0.2),
    "int4": Tolerances(mean_difference=0.3, median_difference=0.15, greedy_margin=0.2),
    # Of quantised checkpoints, computed in bfloat16. Measured on the demo model pruned by 25 %, mean | median | greedy
    # margin: w4a16 0.062 | 0.047 | 4e-3; int8, whose tolerances grow by what rounding does, 0.34 | 0.24 | 0.02.
    "fp8": Tolerances(mean_difference=0.3, median_difference=0.1, greedy_margin=0.1),
    "int8": Tolerances(mean_difference=0.3, median_difference=0.1, greedy_margin=0.1),
    "w4a16": Tolerances(mean_difference=0.3, median_difference=0.1, greedy_margin=0.1),
}
# Of checkpoints for vLLM.
QUANTISED = ("fp8", "int8", "w4a16")
_ONNX_PRECISIONS = {"fp32": "onnx-float32", "fp16": "float16", "bf16": "bfloat16", "int8": "onnx-int8", "int4": "int4"}
# Of ONNX, by what rounding may do: largest fraction of other likeliest tokens, and factor on perplexity. Measured on
# the demo model: int8 0.016 | 1.002, int4 0.16 | 1.12; on itself with attention gone in layers 12 and 27: int8 0.057 |
# 1.011, int4 0.32 | 1.42. With attention gone in layers 0 and 12 it has lost most of what it knew; int8 does 0.085 |
# 1.07 there, and int4 0.41 | 1.55, which is refused: nobody should serve that.
_ROUNDING_EFFECTS = {"onnx-int8": (0.15, 1.1), "int4": (0.4, 1.5)}
_LARGEST_MARGIN = 1.0


def verify(
    exported: Path, against: Path, *, engine: EngineName = "auto", text: Path | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Compares an export with its checkpoint; the verdict goes into its ``verification.json`` and model card.

    Args:
        exported: What ``sentei export`` wrote.
        against: The checkpoint it was made from.
        engine: What runs the export: onnx for ONNX exports, else vllm (``auto``: where installed) or transformers.
        text: Prompts are windows of this text instead of the built-in ones.
        device: Where Transformers computes.

    Returns:
        What ``verification.json`` holds; ``passed`` says whether every check did.

    Raises:
        SenteiError: Not an export, not a good checkpoint, an engine that cannot run it, or too little text.
        MissingDependencyError: The engine is not installed.
    """
    source = open_checkpoint(against)
    picked = _pick_engine(exported, engine)
    prompts = _prompts(source, text, long=picked.reads_onnx)
    precision = _precision(exported, picked, source)
    answers, not_run = _ask_export(exported, picked, device, source, prompts)
    reference = TransformersEngine(against, dtype=torch.float32, device=device)
    noise: dict[str, float] = {}
    rounding = _rounding_effects(reference, prompts, answers) if answers and _is_rounded(precision) else {}
    if picked.reads_onnx:
        checks = _check_onnx_weights(exported, reference, precision, rounding)
    elif precision in QUANTISED:
        checks, noise = _check_quantised_weights(exported, source, reference, prompts)
    else:
        checks = {"differing_tensors": check_limit(_count_differing(source, _open(exported, source)), 0)}
    differences = asdict(compare(reference, prompts, answers)) if answers else {}
    reference.close()
    tolerances = _tolerances(precision, noise)
    checks |= {name: check_limit(differences[name], limit) for name, limit in tolerances.items() if differences}
    verdict = {
        "schema_version": 1,
        "sentei_version": version("sentei"),
        "passed": all(check["passed"] for check in checks.values()),
        "engine": picked.name,
        "dtype": precision.removeprefix("onnx-"),
        "not_run": not_run,
        "source_fingerprint": source.fingerprint,
        "prompts": text.name if text else "built-in",
        "num_prompts": len(prompts),
        "num_tokens": sum(map(len, prompts)),
        **differences,
        **rounding,
        "tolerances": tolerances,
        "checks": checks,
    }
    write_text(exported / VERIFICATION_FILE, AnswersVerification.model_validate(verdict).to_json())
    write_into_card(exported, verdict)
    return verdict


def _tolerances(precision: str, noise: Mapping[str, float]) -> dict[str, float]:
    limits = asdict(TOLERANCES[precision])
    return {name: limit + noise.get(name, 0.0) for name, limit in limits.items() if limit is not None}


def _is_rounded(precision: str) -> bool:
    return precision in _ROUNDING_EFFECTS or precision in QUANTISED


def _rounding_effects(
    reference: TransformersEngine, prompts: Sequence[Sequence[int]], answers: Answers
) -> dict[str, float]:
    """What rounding did to the model; the reference must still have the source's weights."""
    return {f"rounding_{name}": value for name, value in asdict(compare(reference, prompts, answers)).items()}


def _check_onnx_weights(
    exported: Path, reference: TransformersEngine, precision: str, rounding: Mapping[str, float]
) -> Checks:
    """Checks the weights and what their rounding did; afterwards the reference carries the export's own matrices."""
    from serving.verify import onnx_weights

    graph = exported / "model.onnx"
    checks = {"differing_tensors": check_limit(onnx_weights.count_differing(reference.model, graph), 0)}
    if precision in _ROUNDING_EFFECTS:
        checks |= rounding_checks(onnx_weights.replace_with_rounded(reference.model, graph))
    if rounding:
        other, factor = _ROUNDING_EFFECTS[precision]
        checks["rounding_top1_disagreement"] = check_limit(1 - rounding["rounding_top1_agreement"], other)
        checks["rounding_perplexity_ratio"] = check_limit(rounding["rounding_perplexity_ratio"], factor)
    return checks


def _check_quantised_weights(
    exported: Path, source: Checkpoint, reference: TransformersEngine, prompts: Sequence[Sequence[int]]
) -> tuple[Checks, dict[str, float]]:
    """Checks the weights; afterwards the reference carries the export's own matrices.

    Returns:
        The checks, and how far the reference itself moves where the scheme rounds what goes into a matrix.
    """
    from serving.verify import quantized_weights

    quantised = open_quantized(exported)
    unrounded = _answers(reference, prompts) if quantised.scheme.input_bits else None
    checks = {"differing_tensors": check_limit(quantized_weights.count_differing(source, quantised), 0)}
    checks |= rounding_checks(quantized_weights.replace_with_rounded(reference.model, quantised))
    return checks, asdict(compare(reference, prompts, unrounded)) if unrounded else {}


def _ask_export(
    exported: Path, engine: EngineSpec, device: str, source: Checkpoint, prompts: Sequence[Sequence[int]]
) -> tuple[Answers | None, str]:
    """The export's answers, and what could not be run."""
    if engine.reads_onnx:
        return _ask_onnx(exported, prompts)
    return _ask(_start(exported, engine, device, source), prompts), ""


def _ask_onnx(exported: Path, prompts: Sequence[Sequence[int]]) -> tuple[Answers | None, str]:
    """Answers of an ONNX export, and what could not be run; without CUDA, the CPU is tried."""
    from serving.engines.onnxruntime import OnnxEngine, missing_provider
    from serving.onnx_export.files import check_files, read_settings

    missing = missing_provider(read_settings(exported).device)
    if missing is None:
        return _ask(OnnxEngine(exported), prompts), ""
    check_files(exported)  # what is wrong with them is no fault of the CPU's
    try:
        return _ask(OnnxEngine(exported, "cpu"), prompts), f"{missing} It was run on the CPU instead."
    except SenteiError:
        return None, f"{missing} The CPU cannot run it: weights were compared, answers were not."


def _ask(engine: Engine, prompts: Sequence[Sequence[int]]) -> Answers:
    """Takes the answers and closes the engine, so that only one model is in memory at a time."""
    try:
        return _answers(engine, prompts)
    finally:
        engine.close()


def _answers(engine: Engine, prompts: Sequence[Sequence[int]]) -> Answers:
    return Answers(
        log_probabilities=engine.top_log_probabilities(prompts, _TOP_K),
        greedy=[engine.generate(prompt, _GREEDY_TOKENS) for prompt in prompts[:_GREEDY_PROMPTS]],
    )


def compare(reference: TransformersEngine, prompts: Sequence[Sequence[int]], answers: Answers) -> Differences:
    """Measures an engine's answers against a reference model, one forward pass a prompt.

    Args:
        reference: The model that is taken to be right.
        prompts: Token ids.
        answers: To the same prompts.
    """
    differences: list[float] = []
    surprises: list[float] = []
    divergences: list[float] = []
    same_top: list[bool] = []
    for prompt, positions in zip(prompts, answers.log_probabilities, strict=True):
        expected = reference.log_probabilities(prompt).cpu()
        for actual, row, found in zip(prompt[1:], expected, positions, strict=False):
            surprises.append(float(row[actual]) - found[actual])
            differences += [abs(value - float(row[token])) for token, value in found.items()]
            divergences.append(_divergence({token: float(row[token]) for token in found}, found))
            same_top.append(max(found, key=found.__getitem__) == int(row.argmax()))
    margins: list[float] = []
    for prompt, tokens in zip(prompts, answers.greedy, strict=False):
        expected = reference.log_probabilities([*prompt, *tokens]).cpu()[len(prompt) - 1 : -1]
        chosen = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        margins += (expected.max(-1).values - chosen).clamp(max=_LARGEST_MARGIN).tolist()
    return Differences(
        max_difference=max(differences),
        mean_difference=statistics.fmean(differences),
        median_difference=statistics.median(differences),
        kl_divergence=statistics.fmean(divergences),
        top1_agreement=statistics.fmean(same_top),
        greedy_margin=statistics.fmean(margins),
        greedy_agreement=statistics.fmean(margin == 0 for margin in margins),
        perplexity_ratio=math.exp(statistics.fmean(surprises)),
    )


def _divergence(expected: Mapping[int, float], found: Mapping[int, float]) -> float:
    """KL divergence of ``found`` from ``expected``: log-probabilities of some tokens; all others count as one."""

    def with_rest(of_tokens: Mapping[int, float]) -> list[float]:
        rest = 1 - sum(math.exp(value) for value in of_tokens.values())
        # What is left of 1 in float32 is noise below this.
        return [*(of_tokens[token] for token in expected), math.log(max(rest, 1e-7))]

    return sum(math.exp(p) * (p - q) for p, q in zip(with_rest(expected), with_rest(found), strict=True))


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


def _start(exported: Path, engine: EngineSpec, device: str, source: Checkpoint) -> Engine:
    if is_nemotron_nas(exported):
        return decilm.start_vllm(exported, source)
    if engine.is_vllm:
        from serving.engines.vllm import VllmEngine

        return VllmEngine(exported)
    return TransformersEngine(exported, device=device)


def _precision(exported: Path, engine: EngineSpec, source: Checkpoint) -> str:
    """The key into :data:`TOLERANCES`."""
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
    context = int(source.config.get("max_position_embeddings") or _WINDOW_TOKENS + _GREEDY_TOKENS)
    longest = min(_WINDOW_TOKENS, context - _GREEDY_TOKENS)
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
