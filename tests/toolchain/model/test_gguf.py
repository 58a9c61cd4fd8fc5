"""GGUF files that cannot be imported, or lie where the result would go: one sentence, and the file stays."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from toolchain.checkpoint.directory import open_checkpoint
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
    writer = gguf.GGUFWriter(file, "chatglm")
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


def test_the_header_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a vocabulary of 262144 words that is a minute each time."""
    file = tmp_path / "tiny.gguf"
    _write_tiny_llama(file)
    parsed, reader = [], gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: parsed.append(Path(path)) or reader(path))
    import_gguf(file, tmp_path / "out")
    assert parsed == [file]
    assert open_checkpoint(tmp_path / "out").config["num_hidden_layers"] == 1


def _write_tiny_llama(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    words = ["<s>", "</s>", "a", "b", "ab", "c", "d", "e"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * 6)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    tensors = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {"token_embd.weight": (len(words), 32), "output.weight": (len(words), 32), "output_norm.weight": (32,)}
    for name, shape in tensors.items():
        writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
