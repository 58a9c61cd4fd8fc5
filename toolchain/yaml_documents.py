"""Reads a YAML file that a person wrote: every mistake ends with its line, what is wrong, and what to write."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from toolchain.errors import SenteiError
from toolchain.yaml_lines import LinedYaml, Place, read_yaml

AnyModel = TypeVar("AnyModel", bound=BaseModel)
_BELOW = "keys below it, indented"
_KINDS = {
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "bool_type": "true or false", "string_type": "a text", "list_type": "a list, such as [a, b]",
    "dict_type": _BELOW, "model_type": _BELOW, "model_attributes_type": _BELOW,
}  # fmt: skip
_LIMITS = {
    "greater_than": ("gt", "more than"), "greater_than_equal": ("ge", "at least"),
    "less_than_equal": ("le", "at most"), "less_than": ("lt", "less than"),
}  # fmt: skip
_SHOWN = 40


def read_yaml_document(path: Path, model: type[AnyModel], *, hint: str) -> AnyModel:
    """Reads a file and checks it against its model.

    Args:
        path: The file.
        model: What it should hold.
        hint: Where a reader finds all keys.

    Raises:
        SenteiError: ``PATH line N: what is wrong``, for the first mistake.
    """
    found = read_yaml(path)
    if not isinstance(found.content, dict):
        raise SenteiError(f"{path} line 1: this is not a list of keys.", hint)
    try:
        return model.model_validate(found.content)
    except ValidationError as error:
        # A misspelt key is also missing: what is there and unknown says more.
        errors: list[Mapping[str, Any]] = sorted(
            error.errors(include_url=False),
            key=lambda each: (each["type"] != "extra_forbidden", found.line_of(_place(each["loc"], found))),
        )
        place = _place(errors[0]["loc"], found)
        if not place and errors[0]["type"] == "value_error":
            # What several keys together make wrong is told with the first of them.
            place = (str(errors[0]["ctx"]["error"]).partition(" ")[0].rstrip(":"),)
        what, more = _said(errors[0], place, model, hint)
        raise SenteiError(f"{path} line {found.line_of(place)}: {what}.", more) from error


def _place(loc: Sequence[str | int], found: LinedYaml) -> Place:
    """Pydantic's place, without the names of a union's members."""
    place: Place = ()
    node: Any = found.content
    for part in loc:
        # A union's member, or a key that is missing, is no place.
        if part in (node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()):
            node, place = node[part], (*place, part)
    return place


def _said(error: Mapping[str, Any], place: Place, model: type[BaseModel], hint: str) -> tuple[str, str]:
    """What is wrong, and what to write."""
    kind, name = error["type"], ".".join(map(str, place)) or "the file"
    context, last = error.get("ctx", {}), str(error["loc"][-1]) if error["loc"] else ""
    if kind == "extra_forbidden":
        return _unknown_key(last, place[:-1], model)
    if kind == "missing":
        *above, _ = map(str, error["loc"])
        return f"{'.'.join(above)} has no {last}" if above else f"{last} is missing", f"Add {last}: to it. {hint}"
    if kind == "value_error":
        return f"{name}: {context['error']}" if place else str(context["error"]), ""
    shown = f"{name} is {_shown(error['input'])}"
    if kind == "literal_error":
        return shown, f"Write {context['expected'].replace(chr(39), '')}."
    if kind in _KINDS:
        # Of a union of numbers the first member is named, and either will do.
        return shown, f"Write {'a number' if last in ('int', 'float') else _KINDS[kind]}."
    if kind in _LIMITS:
        bound, words = _LIMITS[kind]
        return shown, f"Write a number that is {words} {context[bound]}."
    if kind in ("too_short", "string_too_short"):
        return f"{name} is empty", "Write one at least."
    return shown, f"{error['msg']}."


def _shown(value: object) -> str:
    if value is None:
        return "empty"
    text = ", ".join(map(str, value)) if isinstance(value, dict) else repr(value)
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    return f"a set of keys ({text})" if isinstance(value, dict) else text


def _unknown_key(key: str, above: Place, model: type[BaseModel]) -> tuple[str, str]:
    """A key that is not known: the nearest that is, here or elsewhere in the file."""
    known = _keys(model, ())
    here = known.get(above, ())
    what = f"{key} is not known{f' in {chr(46).join(map(str, above))}' if above else ''}"
    if near := difflib.get_close_matches(key, here, n=1, cutoff=0.5):
        return what, f"Did you mean {near[0]}?"
    if elsewhere := [place for place, keys in known.items() if key in keys]:
        belongs = ".".join(map(str, elsewhere[0]))
        return what, f"It belongs below {belongs}." if belongs else "Write it at the left margin."
    return what, f"Known here: {', '.join(here)}."


def _keys(model: type[BaseModel], place: Place) -> dict[Place, tuple[str, ...]]:
    """The keys of the file, by the place of what they stand below."""
    found: dict[Place, tuple[str, ...]] = {place: tuple(model.model_fields)}
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= _keys(kind, (*place, name))
    return found
