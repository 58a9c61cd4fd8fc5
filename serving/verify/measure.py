"""How far an export's answers are from its checkpoint's, beside how far the checkpoint's own move: its noise."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from serving.verify.answers import Answers, Differences, Sequences, answers_of, compare
from serving.verify.judge import MARGINS, noise_by_check, other_dtype
from serving.verify.reference import CheckpointReference, Computing
from serving.verify.rounded import RoundedMatrices
from toolchain.checkpoint.directory import Checkpoint, dtype_name
from toolchain.errors import SenteiError


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured.

    Attributes:
        differences: Of the export's answers from the reference's.
        noise: Of the model's own answers, computed as the engine computes, from the reference's.
        noise_dtype: What those were computed in.
        rounding: Of the export's answers from those of the checkpoint before it was rounded; ``None`` if it was not.
        reference: Where and how the reference was computed.
    """

    differences: Differences
    noise: Differences
    noise_dtype: torch.dtype
    rounding: Differences | None
    reference: dict[str, Any]

    def content(self) -> dict[str, Any]:
        """As ``verification.json`` has it."""
        rounding = {} if self.rounding is None else asdict(self.rounding)
        return {
            **asdict(self.differences),
            **{f"rounding_{name}": value for name, value in rounding.items()},
            "reference": self.reference,
            "noise": {"dtype": dtype_name(self.noise_dtype), **noise_by_check(self.noise)},
            "margins": dict(MARGINS),
        }


def measure(
    source: Checkpoint,
    computing: Computing,
    prompts: Sequences,
    answers: Answers,
    *,
    rounded: RoundedMatrices | None,
    computed_in: torch.dtype,
) -> Measured:
    """Measures an export's answers, and the noise they are judged by.

    Args:
        source: The checkpoint the export was made from.
        computing: Where and how references are computed.
        prompts: Token ids.
        answers: The export's.
        rounded: Its rounded matrices.
        computed_in: What its engine computes in.

    Raises:
        SenteiError: The model's own answers are not finite.
    """
    noise_dtype, rounding = other_dtype(computed_in, computing.dtype), None
    num_passes = 2 if rounded is None else 3
    with computing.progress("Checkpoint's answers", num_passes * len(source.layout)) as advance:
        noisy = computing.open(source, noise_dtype, advance)
        if rounded is not None:
            noisy.carry(rounded)
        moved = _answers_and_close(noisy, prompts)
        reference = computing.open(source, computing.dtype, advance)
        if rounded is not None:
            [rounding] = compare(reference, prompts, answers)
            reference.carry(rounded)
        differences, noise = compare(reference, prompts, answers, moved)
    reference.close()
    described = {"device": computing.device, "dtype": dtype_name(computing.dtype)}
    return Measured(
        differences=differences, noise=noise, noise_dtype=noise_dtype, rounding=rounding, reference=described
    )


def _answers_and_close(reference: CheckpointReference, prompts: Sequences) -> Answers:
    answers = answers_of(reference, prompts)
    dtype = dtype_name(reference.dtype)
    reference.close()
    if not all(value > -float("inf") for row in answers.log_probabilities for at in row for value in at.values()):
        raise SenteiError(
            f"Computed in {dtype}, the checkpoint's own answers are not finite: no engine can do better.",
            "Export it in another dtype (bfloat16 or float32).",
        )
    return answers
