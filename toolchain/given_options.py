"""Options of an engine as a person gives them, word by word."""

from collections.abc import Sequence

# With it vLLM's KV cache holds all tokens in layers with a sliding window, too.
NO_SLIDING_CACHE = "--disable-hybrid-kv-cache-manager"


def given_options(options: Sequence[str]) -> dict[str, str]:
    """Each option's value, by its name with dashes; empty for an option without one.

    As for vLLM, underscores in a name mean dashes, and of an option that is given twice the last counts.
    """
    pairs: dict[str, str] = {}
    name = ""
    for text in options:
        if text.startswith("-"):
            name, _, value = text.partition("=")
            name = name.replace("_", "-")
            pairs[name] = value
        elif name:
            pairs[name] = text
    return pairs
