"""GGUF files that cannot be imported, or lie where the result would go: one sentence, and the file stays.

If Transformers leaves something out of a model without a word, another model would be called the original.
"""

import string
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import SenteiError
from toolchain.model import gguf as gguf_import
from toolchain.model.gguf import import_gguf
from toolchain.model.gguf_header import read_gguf_header


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


def scaled(kind: gguf.RopeScalingType | None, factor: float | None) -> Callable[[gguf.GGUFWriter], None]:
    def write(writer: gguf.GGUFWriter) -> None:
        if kind is not None:
            writer.add_rope_scaling_type(kind)
        if factor is not None:
            writer.add_rope_scaling_factor(factor)

    return write


KINDS = gguf.RopeScalingType


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ({"more": {"rope_freqs.weight": (4,)}}, "are scaled .tensor 'rope_freqs.weight'"),  # Llama 3.1
        ({"more": {"rope_factors_long.weight": (4,)}}, "tensor 'rope_factors_long.weight'"),  # Phi-3 128k
        ({"add": scaled(KINDS.YARN, 4.0)}, "rope.scaling.type is 'yarn'"),
        ({"add": scaled(KINDS.LINEAR, 8.0)}, "rope.scaling.factor is 8.0"),  # Gemma 3 4B
        ({"add": scaled(None, 8.0)}, "rope.scaling.factor is 8.0"),
        ({"add": lambda writer: writer.add_float32("llama.rope.scale_linear", 8.0)}, "rope.scale_linear is 8.0"),
        ({"add": lambda writer: writer.add_sliding_window(16)}, "looks back 16 tokens"),
        ({"more": {"blk.0.attn_q.bias": (32,)}}, r"holds 'blk.0.attn_q.bias', for which .* no place \(1 such\)"),
        ({"without": "blk.0.ffn_up.weight"}, r"has no tensor blk.0.ffn_up.weight \(1 missing\)"),
        # Gemma 3 27B, whose scale of attention is neither in the file nor what its class says.
        ({"architecture": "gemma3", "add": lambda writer: writer.add_key_length(16)}, "query_pre_attn_scalar"),
    ],
)
def test_a_file_that_would_become_another_model_is_refused(tmp_path: Path, written: Any, says: str):
    _write_tiny_llama(tmp_path / "tiny.gguf", **written)
    with pytest.raises(SenteiError, match=says):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "written",
    [
        {"add": scaled(KINDS.NONE, 8.0)},
        {"add": scaled(KINDS.LINEAR, 1.0)},
        {"add": scaled(KINDS.LINEAR, 0.0)},
        {"add": lambda writer: writer.add_sliding_window(64)},
        {"without": "output.weight"},
    ],
)
def test_what_scales_nothing_is_imported(tmp_path: Path, written: Any):
    _write_tiny_llama(tmp_path / "tiny.gguf", **written)
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").config["num_hidden_layers"] == 1


_LAYER = ("attn_norm", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
_APART = (*_LAYER, "attn_q", "attn_k", "attn_v", "ffn_gate")


@pytest.mark.parametrize(
    ("architecture", "layer"),
    [
        ("llama", [f"{name}.weight" for name in _APART]),
        ("qwen2", [*(f"{name}.weight" for name in _APART), "attn_q.bias", "attn_k.bias", "attn_v.bias"]),
        ("qwen3", [f"{name}.weight" for name in (*_APART, "attn_q_norm", "attn_k_norm")]),
        ("phi3", [f"{name}.weight" for name in (*_LAYER, "attn_qkv")]),
        (
            "gemma3",
            [
                f"{name}.weight"
                for name in (*_APART, "attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm")
            ],
        ),
    ],
)
def test_what_llama_cpp_writes_of_each_family_has_its_place(tmp_path: Path, architecture: str, layer: list[str]):
    names = ["token_embd.weight", "output_norm.weight", *(f"blk.0.{name}" for name in layer)]
    shapes = dict.fromkeys(names, (64, 64)) | {"token_embd.weight": (32064, 32)}
    _write_tiny_llama(tmp_path / "tiny.gguf", architecture=architecture, tensors=shapes, add=_as_its_class_has_it)
    gguf_import._model_class(tmp_path / "tiny.gguf", read_gguf_header(tmp_path / "tiny.gguf"))


def _as_its_class_has_it(writer: gguf.GGUFWriter) -> None:
    if writer.arch == "gemma3":
        writer.add_key_length(256)
    if writer.arch == "phi3":  # whose padding token is the 32000th
        writer.add_vocab_size(32064)


NAMES = st.text(string.ascii_lowercase + "._", min_size=1, max_size=30)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "uint8": st.integers(0, 2**8 - 1), "int8": st.integers(-(2**7), 2**7 - 1), "uint16": st.integers(0, 2**16 - 1),
    "int16": st.integers(-(2**15), 2**15 - 1), "uint32": st.integers(0, 2**32 - 1),
    "int32": st.integers(-(2**31), 2**31 - 1), "uint64": st.integers(0, 2**64 - 1),
    "int64": st.integers(-(2**63), 2**63 - 1), "float32": st.floats(width=32, allow_nan=False),
    "float64": st.floats(allow_nan=False), "bool": st.booleans(), "string": st.text(min_size=1, max_size=30),
    "array": st.lists(st.integers(0, 9), min_size=1, max_size=5),
}  # fmt: skip
ENTRIES = st.sampled_from(sorted(VALUES)).flatmap(lambda kind: st.tuples(st.just(kind), VALUES[kind]))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=st.dictionaries(NAMES, ENTRIES, max_size=6), tensors=st.sets(NAMES, max_size=4))
def test_the_header_is_what_was_written(tmp_path: Path, entries: Any, tensors: set[str]):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for key, (kind, value) in entries.items():
        getattr(writer, f"add_{kind}")(f"k.{key}", value)
    for name in sorted(tensors):
        writer.add_tensor(name, np.ones((2, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf_header(tmp_path / "model.gguf")
    scalars = {f"k.{key}": value for key, (kind, value) in entries.items() if kind != "array"}
    assert header.values == {"general.architecture": "llama", **scalars}
    assert header.tensor_names == tensors
    assert header.num_elements == 6 * len(tensors)


def _write_tiny_llama(
    path: Path,
    *,
    architecture: str = "llama",
    more: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    tensors: Mapping[str, tuple[int, ...]] | None = None,
    without: str = "",
    add: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    add(writer)
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
    written = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    written |= {"token_embd.weight": (len(words), 32), "output.weight": (len(words), 32), "output_norm.weight": (32,)}
    written = dict(written if tensors is None else tensors) | more
    written.pop(without, None)
    for name, shape in written.items():
        writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
