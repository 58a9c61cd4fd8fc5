"""How many tokens a model reads at once, and what is longer: refused, or told of where the config extends it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from toolchain.architecture.layout import positive
from toolchain.errors import SenteiError

# Rope scalings whose max_position_embeddings may be the length before scaling. With "llama3" and "longrope", and in
# Gemma 3 with any scaling, it is always the length after scaling.
_MOST_TOKENS = 2**31
_EXTENDED_BY_FACTOR = ("dynamic", "linear", "yarn")
# vLLM (0.32, vllm/config/model.py) multiplies it by the factor with these alone: it takes YaRN's for the one after.
_MULTIPLIED_BY_VLLM = ("dynamic", "linear")


@dataclass(frozen=True)
class ContextLength:
    """Tokens that a model reads at once.

    Attributes:
        stated: ``max_position_embeddings``, or the family's default in Transformers where the config has none.
        extended: The most that its rope scaling may reach; ``stated`` without one.
        servable: The most that vLLM takes.
        original: With LongRoPE, ``original_max_position_embeddings``: the most with its short factors. A vLLM that may
            take more uses the long factors for every prompt, however short. 0 without LongRoPE.
    """

    stated: int
    extended: int
    servable: int
    original: int = 0


def context_length(config: Mapping[str, Any]) -> ContextLength:
    """Reads the context length from ``config.json``, in Transformers 4's words or in 5's.

    Raises:
        SenteiError: ``max_position_embeddings`` is no number of tokens.
    """
    if config.get("max_position_embeddings") is None:
        stated = AutoConfig.for_model(config["model_type"]).max_position_embeddings
    else:
        stated = positive(config, "max_position_embeddings", at_most=_MOST_TOKENS)
    ropes = _rope_settings(config)
    scaled = [] if str(config.get("model_type")).startswith("gemma3") else ropes
    return ContextLength(
        stated,
        extended=max([stated, *(_reached(rope, stated) for rope in scaled)]),
        servable=max([stated, *(_reached(rope, stated) for rope in scaled if _kind(rope) in _MULTIPLIED_BY_VLLM)]),
        original=_original(config, ropes),
    )


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


def _kind(rope: Mapping[str, Any]) -> object:
    return rope.get("rope_type", rope.get("type"))


def _reached(rope: Mapping[str, Any], stated: int) -> int:
    factor = rope.get("factor")
    if _kind(rope) not in _EXTENDED_BY_FACTOR or not isinstance(factor, int | float):
        return stated
    before = rope.get("original_max_position_embeddings")
    return int(min((before if isinstance(before, int) and before > 0 else stated) * factor, _MOST_TOKENS))


def _original(config: Mapping[str, Any], ropes: Sequence[Mapping[str, Any]]) -> int:
    if not any("short_factor" in rope for rope in ropes):
        return 0
    name = "original_max_position_embeddings"
    # Transformers and vLLM take the config's own, then the family's default, then what the rope settings say.
    default = {name: getattr(AutoConfig.for_model(config["model_type"]), name, None)}
    found = next((each for each in (config, default, *ropes) if each.get(name) is not None), None)
    return positive(found, name, at_most=_MOST_TOKENS) if found else 0
