"""YAML that people write: values mean what they look like, and whatever is wrong ends in a sentence."""

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.gate.document import GateDocument
from toolchain.errors import SenteiError
from toolchain.yaml_documents import read_yaml_document
from toolchain.yaml_lines import read_yaml

ANY_FILE = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_words_stay_words_and_lines_are_known(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text("a: no\nb:\n  - 12:30\n  - 0x10\nc: {d: 1e3, e: true, f: ~, g: '1'}\nh: 2026-01-01\n")
    found = read_yaml(path)
    assert found.content == {
        "a": "no", "b": ["12:30", "0x10"], "c": {"d": 1000.0, "e": True, "f": None, "g": "1"}, "h": "2026-01-01",
    }  # fmt: skip
    assert [found.line_of(place) for place in (("a",), ("b", 1), ("c", "g"), ("c", "missing"), ("h",))] == [
        1,
        4,
        5,
        5,
        6,
    ]


@pytest.mark.parametrize(
    "text", ["a: [1", "a: *x", "a: !!python/name:os.system x", "a: 1\n---\nb: 2", "a: 1\na: 2", "\ta: 1"]
)
def test_what_may_mean_something_else_is_refused(tmp_path: Path, text: str):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SenteiError, match=r"a\.yaml"):
        read_yaml(tmp_path / "a.yaml")


keys = st.sampled_from([*GateDocument.model_fields, "job", "x"])
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner),
    max_leaves=12,
)  # fmt: skip


@ANY_FILE
@given(st.binary(max_size=60) | st.text(alphabet="a:-[]{}&*!'\"\n #,?|>%@1", max_size=60).map(str.encode) | plain.map(
    lambda value: yaml.safe_dump(value).encode()
))  # fmt: skip
def test_any_file_is_read_or_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    try:
        read_yaml_document(path, GateDocument, hint="")
    except SenteiError as error:
        assert str(path) in str(error)
