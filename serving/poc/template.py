"""The commented ``poc.yaml`` that ``sentei poc init`` writes, in English or Japanese."""

from pathlib import Path

_TEMPLATES = Path(__file__).with_name("templates")


def template(language: str) -> str:
    """The template in a language, ``en`` or ``ja``."""
    return (_TEMPLATES / f"poc.{language}.yaml").read_text(encoding="utf-8")
