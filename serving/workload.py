"""What each repeat asks of each model: lengths, how many requests, and how they arrive."""

from dataclasses import dataclass

# Added to the seed: a warm-up with a repeat's own prompts would leave them in a prefix cache.
WARMUP_SEED = 1_000_003


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One load.

    Attributes:
        input_len: Tokens of every prompt.
        output_len: Tokens of every answer; end-of-sequence is ignored.
        concurrency: Requests in flight: one batch for Transformers and ONNX, ``--max-concurrency`` for vLLM.
        num_prompts: Requests a repeat.
        seed: Of the random token ids the prompts are made of; repeat *r* uses ``seed + r`` for both models.
    """

    input_len: int
    output_len: int
    concurrency: int
    num_prompts: int
    seed: int
