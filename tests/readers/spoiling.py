"""How good files are spoiled: as hypothesis strategies over their bytes, and as bombs."""

import copy
import json
from typing import Any

from hypothesis import strategies as st


class Raw(str):
    """JSON text that goes in as it is."""


def _nested(depth: int, opening: str = "[", closing: str = "]") -> Raw:
    return Raw(opening * depth + closing * depth)


# What a field may hold instead: wrong kinds, numbers at every edge, text that is no Unicode, nestings.
ODD: list[Any] = [
    None, True, False, 0, -1, 7, 1.5, -0.0, 1e-300, 10**6, 10**9, 10**12, 2**31, 2**63, 2**64, 2**70, 1e30, 1e149, "",
    "x", "0", "-0", "１", "٣", "00005", "../../etc/passwd", "/dev/zero", "..", "a\0b", "x" * 300, "auto", "float32",
    "load", [], {}, [[]], [None], [1], ["a", 1], {"a": {}}, {"0": {}}, [0] * 300, Raw("1e308"), Raw("-1e999"),
    Raw("NaN"), Raw("Infinity"), Raw('"\\ud800"'), Raw("9" * 400), Raw("9" * 5000), Raw('{"a":1,"a":2}'),
    Raw('{"\\udfff":1}'), _nested(40), _nested(200), _nested(3000), _nested(500, '{"a":', "}"),
]  # fmt: skip
KEYS = ["", "x", "１", "٣", "-0", "00005", "9" * 50, "9" * 5000, "__class__", "num_labels", "auto_map", "id2label"]


@st.composite
def spoiled_json(draw: st.DrawFn, good: bytes) -> bytes:
    """One to three fields of a JSON file replaced, deleted, repeated or added; or its bytes spoiled."""
    if draw(st.integers(0, 5)) == 0:
        return draw(spoiled_bytes(good))
    document = copy.deepcopy(json.loads(good))
    raws: list[Raw] = []
    for _ in range(draw(st.integers(1, 3))):
        node, key = _pick(draw, document)
        if node is None:
            return draw(spoiled_bytes(good))
        _spoil(draw, node, key, raws)
    text = json.dumps(document)
    for number, raw in enumerate(raws):
        text = text.replace(f'"<raw {number}>"', raw)
    return text.encode()


def _pick(draw: st.DrawFn, node: Any) -> tuple[Any, Any]:
    """A place in a document, deep or not."""
    found: tuple[Any, Any] = (None, None)
    while isinstance(node, (dict, list)) and node:
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        found = node, key
        node = node[key]
        if draw(st.integers(0, 2)) == 0:
            break
    return found


def _spoil(draw: st.DrawFn, node: Any, key: Any, raws: list[Raw]) -> None:
    action = draw(st.sampled_from(("replace", "replace", "replace", "delete", "add")))
    value = copy.deepcopy(draw(st.sampled_from(ODD)))
    if isinstance(value, Raw):
        raws.append(value)
        value = f"<raw {len(raws) - 1}>"
    if action == "delete":
        del node[key]
    elif action == "replace":
        node[key] = value
    elif isinstance(node, dict):
        node[draw(st.sampled_from([*KEYS, *sorted(node)]))] = value
    else:
        node.insert(0, value)


@st.composite
def spoiled_bytes(draw: st.DrawFn, good: bytes) -> bytes:
    """Cut short, with bytes replaced, with a number at an edge, or something else altogether."""
    action = draw(st.sampled_from(("cut", "replace", "replace", "edge", "insert", "other")))
    place = draw(st.integers(0, max(0, min(len(good), draw(st.sampled_from((16, 200, 10**9)))) - 1)))
    if action == "cut":
        return good[:place]
    if action == "replace":
        new = draw(st.binary(min_size=1, max_size=8))
        return good[:place] + new + good[place + len(new) :]
    if action == "edge":
        edge = draw(st.sampled_from((0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1))).to_bytes(8, "little")
        return good[:place] + edge + good[place + 8 :]
    if action == "insert":
        return good[:place] + draw(st.binary(min_size=1, max_size=20)) + good[place:]
    return draw(st.one_of(st.binary(max_size=200), st.text(max_size=50).map(str.encode)))


MEGABYTES = 5
# Whole files that take far more than their size, or far longer, if read carelessly.
BOMBS: dict[str, bytes] = {
    "lists": b"[" + b"[]," * (MEGABYTES * 350_000) + b"1]",
    "objects": b"[" + b"{}," * (MEGABYTES * 350_000) + b"1]",
    "deep": b"[" * (MEGABYTES * 1_000_000),
    "deep and closed": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "repeated key": b"{" + b",".join(b'"%x":1' % n for n in range(MEGABYTES * 80_000)) + b',"ffff":1}',
    "numbers": b"[" + b"1e10," * (MEGABYTES * 200_000) + b"1e999]",
    "digits": b"[" + b"9" * (MEGABYTES * 1_000_000) + b"]",
    "too large": b'{"a": "' + b"x" * 200_000_000 + b'"}',
}
