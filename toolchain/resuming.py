"""What is said of unfinished work that is in the way, or that was made from other inputs.

Search, healing and evaluation say the same; ``docs/decisions/unfinished-work.md`` says what else they have in common.
"""

from pathlib import Path

from toolchain.errors import SenteiError


def interrupted(directory: Path, what: str) -> SenteiError:
    """What to say where unfinished work would be overwritten.

    Args:
        directory: Where it lies.
        what: One of it: ``search``, ``healing``, ``run``.
    """
    return SenteiError(
        f"{directory} holds an interrupted {what}.", "Add --resume to go on from there, or --force to start over."
    )


def made_otherwise(directory: Path, done: str, difference: str) -> SenteiError:
    """What to say where unfinished work cannot be resumed, since the inputs are not those that it began with.

    Args:
        directory: Where it lies.
        done: How it came to be: ``searched``, ``trained``.
        difference: The first input that differs, with what it was and what it is.
    """
    return SenteiError(
        f"{directory} was {done} with another {difference}.",
        "Run the same command as before, or use --force to start over.",
    )
