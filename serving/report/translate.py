"""The report's words. English is the message itself; every other language is a table of messages in ``locale/``."""

import tomllib
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

Language = Literal["en", "ja"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
_TABLES = Path(__file__).parent / "locale"


class Say:
    """Says a message in one language. What a language's table lacks is said in English.

    Attributes:
        language: As HTML's ``lang`` names it.
    """

    def __init__(self, language: Language) -> None:
        """Reads the language's table."""
        self.language = language
        self._table = _table(language)

    def __call__(self, message: str, **values: Any) -> str:
        """The message with its values put in, as ``%(name)s``; with no values, a percent sign is only that."""
        said = self._table.get(message, message)
        return said % values if values else said


@cache
def _table(language: Language) -> dict[str, str]:
    if language == "en":
        return {}
    return tomllib.loads((_TABLES / f"{language}.toml").read_text(encoding="utf-8"))


ENGLISH = Say("en")
