"""How many tokens a model reads at once, and what is longer: refused, or told of where the config extends it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from toolchain.architecture.layout import positive
from toolchain.errors import SenteiError

# Rope scalings whose max_position_embeddings may be the length before scaling; vLLM multiplies it by the factor too.
# With "llama3" and "longrope" it is always the length after scaling.
_MOST_TOKENS = 2**31
_EXTENDED_BY_FACTOR = ("dynamic", "linear", "yarn")


@dataclass(frozen=True)
class ContextLength:
    """Tokens that a model reads at once.

    Attributes:
        stated: ``max_position_embeddings``, or the family's default in Transformers where the config has none.
        extended: The most that its rope scaling may reach; ``stated`` without one.
    """

    stated: int
    extended: int


def context_length(config: Mapping[str, Any]) -> ContextLength:
    """Reads the context length from ``config.json``, in Transformers 4's words or in 5's.

    Raises:
        SenteiError: ``max_position_embeddings`` is no number of tokens.
    """
    if config.get("max_position_embeddings") is None:
        stated = AutoConfig.for_model(config["model_type"]).max_position_embeddings
    else:
        stated = positive(config, "max_position_embeddings", at_most=_MOST_TOKENS)
    reached = [stated, *(_reached(rope, stated) for rope in _rope_settings(config))]
    return ContextLength(stated, max(reached))


def check_context(
    directory: Path,
    config: Mapping[str, Any],
    num_tokens: int,
    *,
    asked: str,
    hint: str = "",
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Checks that a model can read so many tokens at once.

    Args:
        directory: The model's.
        config: Its ``config.json``.
        num_tokens: Longest sequence that it will be given.
        asked: What asked for that, as the sentence begins.
        hint: How to ask for less.
        note: Told where only the rope scaling makes room.

    Raises:
        SenteiError: It cannot: its positions end before.
    """
    length = context_length(config)
    if num_tokens > length.extended:
        raise SenteiError(f"{asked}: {directory} reads at most {length.extended} tokens at once.", hint)
    if num_tokens > length.stated:
        note(
            f"{asked}: {directory} states {length.stated} tokens, and reads more only by its rope scaling. "
            "Its quality there may be lower."
        )


def check_window(
    directory: Path, config: Mapping[str, Any], seq_len: int, *, note: Callable[[str], None] = lambda text: None
) -> None:
    """Checks that a model can read windows of ``seq_len`` tokens; see :func:`check_context`."""
    hint = f"Give at most --seq-len {context_length(config).extended}."
    check_context(directory, config, seq_len, asked=f"--seq-len {seq_len}", hint=hint, note=note)


def _rope_settings(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The model's rope settings: one, or one for each kind of layer."""
    found = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(found, Mapping):
        return []
    nested = [each for each in found.values() if isinstance(each, Mapping)]
    return nested or [found]


def _reached(rope: Mapping[str, Any], stated: int) -> int:
    factor = rope.get("factor")
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in _EXTENDED_BY_FACTOR or not isinstance(factor, int | float):
        return stated
    before = rope.get("original_max_position_embeddings")
    return int(min((before if isinstance(before, int) and before > 0 else stated) * factor, _MOST_TOKENS))
