"""What a model directory says of its licence, whoever wrote it."""

import json

import pytest

from toolchain.checkpoint.licences import Licence, licence_of_card, stated_licences


def card(directory, metadata):
    (directory / "README.md").write_text(f"---\n{metadata}\n---\n# A model\n")


@pytest.mark.parametrize(
    ("metadata", "names"),
    [
        ("license: apache-2.0", ["apache-2.0"]),
        ("license: [mit, apache-2.0]", ["mit", "apache-2.0"]),
        ("license: other\nlicense_name: tongyi\nlicense_link: LICENSE", ["tongyi"]),
        ("license: other", ["other"]),
        ("language: en", []),
        ("license: {a: b}", []),
        ("license: [[mit]]", []),
        ("license: 7", []),
        (f"license: {'x' * 500}", []),
        ("license: [", []),
        ("license: !!python/object/apply:os.system [exit]", []),
    ],
)
def test_the_card(tmp_path, metadata, names):
    card(tmp_path, metadata)
    assert [each.name for each in stated_licences(tmp_path)] == names


def test_what_goes_into_another_card_reads_the_same(tmp_path):
    card(tmp_path, 'license: other\nlicense_name: "a: b\\n---"\nlicense_link: http://x')
    found = licence_of_card(tmp_path)
    card(tmp_path, "\n".join(f"{key}: {json.dumps(value)}" for key, value in found.items()))
    assert licence_of_card(tmp_path) == found and found["license_name"] == "a: b\n---"


def test_files(tmp_path):
    assert stated_licences(tmp_path) == []
    (tmp_path / "LICENSE.txt").write_text("Terms")
    (tmp_path / "LICENSE.md").write_bytes(b"\xff\xfe")
    (tmp_path / "LICENSES").mkdir()
    (tmp_path / "README.md").write_bytes(b"\xff")
    assert stated_licences(tmp_path) == [Licence(name="LICENSE.md"), Licence(name="LICENSE.txt", text="Terms")]
