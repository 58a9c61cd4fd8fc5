"""Reads ``poc.yaml``: every mistake ends with its line, what is wrong, and what to write."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from serving.poc.document import PocDocument
from serving.poc.yaml_lines import LinedYaml, Place, read_yaml
from toolchain.errors import SenteiError

_TEMPLATE = "sentei poc init writes a file with all keys."
_BELOW = "keys below it, indented"
_KINDS = {
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "bool_type": "true or false", "string_type": "a text", "list_type": "a list, such as [a, b]",
    "dict_type": _BELOW, "model_type": _BELOW, "model_attributes_type": _BELOW,
}  # fmt: skip
_SHOWN = 40


def read_poc(path: Path) -> PocDocument:
    """Reads and checks a file; the files that it names are looked at later.

    Raises:
        SenteiError: ``poc.yaml line N: what is wrong``, for the first mistake.
    """
    found = read_yaml(path)
    if not isinstance(found.content, dict):
        raise SenteiError(f"{path} line 1: this is not a list of keys.", _TEMPLATE)
    try:
        return PocDocument.model_validate(found.content)
    except ValidationError as error:
        # A misspelt key is also missing: what is there and unknown says more.
        errors: list[Mapping[str, Any]] = sorted(
            error.errors(include_url=False),
            key=lambda each: (each["type"] != "extra_forbidden", found.line_of(_place(each["loc"], found))),
        )
        raise _told(path, found, errors) from error


def _place(loc: Sequence[str | int], found: LinedYaml) -> Place:
    """Pydantic's place, without the names of a union's members."""
    place: Place = ()
    node: Any = found.content
    for part in loc:
        # A union's member, or a key that is missing, is no place.
        if part in (node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()):
            node, place = node[part], (*place, part)
    return place


def _told(path: Path, found: LinedYaml, errors: Sequence[Mapping[str, Any]]) -> SenteiError:
    first = errors[0]
    place = _place(first["loc"], found)
    if not place and first["type"] == "value_error":
        # What several keys together make wrong is told with the first of them.
        place = (str(first["ctx"]["error"]).partition(" ")[0].rstrip(":"),)
    what, hint = _said(first, place)
    return SenteiError(f"{path} line {found.line_of(place)}: {what}.", hint)


def _said(error: Mapping[str, Any], place: Place) -> tuple[str, str]:
    """What is wrong, and what to write."""
    kind, name = error["type"], ".".join(map(str, place)) or "the file"
    context = error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(str(error["loc"][-1]), place[:-1])
    if kind == "missing":
        missing = str(error["loc"][-1])
        where = (
            f"{'.'.join(map(str, error['loc'][:-1]))} has no {missing}"
            if len(error["loc"]) > 1
            else f"{missing} is missing"
        )
        return where, f"Add {missing}: to it. {_TEMPLATE}"
    if kind == "value_error":
        return f"{name}: {context['error']}" if place else str(context["error"]), ""
    if kind == "literal_error":
        return f"{name} is {_shown(error['input'])}", f"Write {context['expected'].replace(chr(39), '')}."
    if kind in _KINDS:
        if error["loc"][-1] in ("int", "float"):  # either will do
            kind = "float_type"
        return f"{name} is {_shown(error['input'])}", f"Write {_KINDS[kind]}."
    limits = {"greater_than": ("gt", "more than"), "greater_than_equal": ("ge", "at least"),
              "less_than_equal": ("le", "at most"), "less_than": ("lt", "less than")}  # fmt: skip
    if kind in limits:
        bound, words = limits[kind]
        return f"{name} is {_shown(error['input'])}", f"Write a number that is {words} {context[bound]}."
    if kind in ("too_short", "string_too_short"):
        return f"{name} is empty", "Write one at least."
    return f"{name} is {_shown(error['input'])}", f"{error['msg']}."


def _shown(value: object) -> str:
    if value is None:
        return "empty"
    text = ", ".join(value) if isinstance(value, dict) else repr(value)
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    return f"a set of keys ({text})" if isinstance(value, dict) else text


def _unknown_key(key: str, above: Place) -> tuple[str, str]:
    """A key that is not known: the nearest that is, here or elsewhere in the file."""
    known = _keys()
    here = known.get(above, ())
    where = f" in {'.'.join(map(str, above))}" if above else ""
    if near := difflib.get_close_matches(key, here, n=1, cutoff=0.5):
        return f"{key} is not known{where}", f"Did you mean {near[0]}?"
    if elsewhere := [place for place, keys in known.items() if key in keys]:
        belongs = ".".join(map(str, elsewhere[0])) or "the left margin"
        return f"{key} is not known{where}", f"It belongs below {belongs}." if elsewhere[
            0
        ] else "Write it at the left margin."
    return f"{key} is not known{where}", f"Known here: {', '.join(here)}."


def _keys() -> dict[Place, tuple[str, ...]]:
    """The keys of the file, by the place of what they stand below."""
    found: dict[Place, tuple[str, ...]] = {}

    def visit(model: type[BaseModel], place: Place) -> None:
        found[place] = tuple(model.model_fields)
        for name, field in model.model_fields.items():
            for kind in (field.annotation, *get_args(field.annotation)):
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    visit(kind, (*place, name))

    visit(PocDocument, ())
    return found
