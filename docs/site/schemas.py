"""A JSON Schema as a page that people read: one table of fields per object."""

from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]
# How a schema limits a value, and how a person writes that.
_LIMITS = {
    "minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}",
    "minLength": "at least {} characters", "maxLength": "at most {} characters", "pattern": "matches `{}`",
    "minItems": "at least {} items", "maxItems": "at most {} items",
}  # fmt: skip


def schema_page(schema: Schema, *, schema_file: str) -> str:
    """The page, in Markdown.

    Args:
        schema: As ``docs/write_schemas.py`` writes it: its title is the name of the file that it describes.
        schema_file: Where the schema is, relative to the page.
    """
    lines = [f"# {schema['title']}", "", f"For programs and editors: [JSON Schema]({schema_file})", ""]
    lines += _object(schema)
    for name, definition in sorted(schema.get("$defs", {}).items()):
        lines += [f"## {name}", "", *_object(definition)]
    return "\n".join(lines)


def _object(schema: Schema) -> Iterator[str]:
    if description := schema.get("description"):
        yield from (_prose(description), "")
    if "properties" not in schema:
        yield from (f"Type: {type_of(schema)}", "")
        return
    required = schema.get("required", ())
    yield from ("| field | type | if left out |", "|---|---|---|")
    for name, field in schema["properties"].items():
        default = "required" if name in required else _value(field["default"]) if "default" in field else "absent"
        meaning = f"<br>{_cell(_prose(field['description']))}" if "description" in field else ""
        yield f"| `{name}` | {_cell(type_of(field))}{meaning} | {_cell(default)} |"
    yield ""


def type_of(schema: Schema) -> str:
    """What a value may be, in words; an object of the same file is a link to its table."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(map(type_of, schema[key]))
    if "const" in schema:
        return _value(schema["const"])
    if "enum" in schema:
        return ", ".join(map(_value, schema["enum"]))
    limits = [words.format(schema[key]) for key, words in _LIMITS.items() if key in schema]
    return ", ".join([_plain_type(schema), *limits])


def _plain_type(schema: Schema) -> str:
    kind = schema.get("type", "any value")
    if kind == "array" and "prefixItems" in schema:
        return f"list of {', '.join(map(type_of, schema['prefixItems']))}"
    if kind == "array":
        return f"list of {type_of(schema.get('items', {}))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        return f"object of {type_of(schema['additionalProperties'])} by name"
    return str(kind)


def _value(value: object) -> str:
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def _prose(docstring: str) -> str:
    """A docstring's text; its list of attributes becomes a list."""
    text, heading, attributes = docstring.partition("\nAttributes:\n")
    if not heading:
        return text
    listed = []
    for line in attributes.splitlines():
        name, colon, meaning = line.strip().partition(": ")
        if colon and line.startswith("    ") and not line.startswith("     "):
            listed.append(f"- `{name}`: {meaning}")
        elif line.strip():
            listed.append(f"  {line.strip()}")
    return "\n".join([text, *listed])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
