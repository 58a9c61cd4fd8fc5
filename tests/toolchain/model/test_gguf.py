"""GGUF files that cannot be imported, or lie where the result would go: one sentence, and the file stays."""

from pathlib import Path

import pytest
from gguf import GGUFWriter

from toolchain.errors import SenteiError
from toolchain.model import gguf as gguf_import
from toolchain.model.gguf import import_gguf


@pytest.mark.parametrize("force", [False, True])
def test_the_file_is_not_replaced_by_what_is_made_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool):
    file = tmp_path / "model" / "model.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF, and so on")
    monkeypatch.setattr(gguf_import, "_model_class", lambda gguf, header: pytest.fail("went on"))
    with pytest.raises(SenteiError, match="would replace the input" if force else "is not empty"):
        import_gguf(file, file.parent, force=force)
    assert file.is_file()


def test_an_architecture_that_cannot_be_read_is_named(tmp_path: Path):
    file = tmp_path / "model.gguf"
    writer = GGUFWriter(file, "chatglm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(SenteiError, match="chatglm"):
        import_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_file_is_named(tmp_path: Path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(SenteiError, match=r"model\.gguf cannot be read"):
        import_gguf(file, tmp_path / "out")
