"""The nemotron-nas export: what its config says, how weights are split, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from export.decilm import export_nemotron_nas
from tests.command_line import refused, sentei
from tests.conftest import make_pico, prune_by_hand
from tests.families import make_family_pico
from toolchain.architecture.families import FAMILIES
from toolchain.checkpoint.directory import open_checkpoint, read_headers
from toolchain.errors import CheckFailedError, SenteiError
from toolchain.model.configuration_decilm import DeciLMConfig
from toolchain.model.decilm import config_class_source, nas_form


def pruned_family(directory: Path, family: str, variant: str, *, removed: set[int], widths: tuple[int, ...]) -> Path:
    source, out = directory / "source", directory / "pruned"
    make_family_pico(source, family, variant, intermediate_size=512)
    out.mkdir()
    prune_by_hand(source, out, removed_attention=removed, width=widths.__getitem__)
    return out


def exported(directory: Path, family: str, variant: str, **how: Any) -> tuple[Path, Path]:
    pruned = pruned_family(directory, family, variant, **how)
    export_nemotron_nas(pruned, directory / "out")
    return pruned, directory / "out"


def obstacle(directory: Path, **how: Any) -> str | None:
    how = {"family": "llama", "variant": "grouped", "removed": {1}, "widths": (512, 256, 512, 256)} | how
    return nas_form(open_checkpoint(pruned_family(directory, **how))).llama_cpp_obstacle


def read(directory: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return file.get_tensor(name)


def test_the_vocabulary(tmp_path: Path):
    _, out = exported(tmp_path, "llama", "grouped", removed={1, 3}, widths=(48, 7, 0, 512))
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["model_type"] == "nemotron-nas"
    assert config["auto_map"] == {"AutoConfig": "configuration_decilm.DeciLMConfig"}
    assert config["intermediate_size"] is None
    assert (config["head_dim"], config["dtype"]) == (8, "float32")
    assert not config["attention_bias"] and not config["qkv_bias"] and not config["mlp_bias"]
    attends = {"no_op": False, "replace_with_linear": False, "n_heads_in_group": 2}
    removed = {"no_op": True, "replace_with_linear": False, "n_heads_in_group": None}
    assert [block["attention"] for block in config["block_configs"]] == [attends, removed, attends, removed]
    assert [block["ffn"] for block in config["block_configs"]] == [
        {"no_op": not width, "replace_with_linear": False, "intermediate_size": width} for width in (48, 7, None, 512)
    ]


def test_the_directory(pico_model: Path, tmp_path: Path):
    (tmp_path / "source").mkdir()
    for path in pico_model.iterdir():
        (tmp_path / "source" / path.name).write_bytes(path.read_bytes())
    settings = json.loads((pico_model / "tokenizer_config.json").read_text())
    foreign = {**settings, "auto_map": {"AutoTokenizer": ["org/name--tokenization.Tokenizer", None]}}
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(foreign))
    told = export_nemotron_nas(tmp_path / "source", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "configuration_decilm.py", "tokenizer.json", "README.md", "verification.json"} < names
    assert (tmp_path / "out" / "configuration_decilm.py").read_bytes() == config_class_source()
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == settings
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "needs `trust_remote_code`" in readme
    assert "vllm serve DIR --trust-remote-code" in readme
    assert told == json.loads((tmp_path / "out" / "verification.json").read_text())
    assert (told["passed"], told["num_tensors"]) == (True, len(open_checkpoint(pico_model).tensors))


def test_a_head_dim_that_the_config_class_does_not_declare(tmp_path: Path):
    """Qwen2's: its attention follows it, and vLLM would read half of each head."""
    _, out = exported(tmp_path, "qwen2", "own-head-dim", removed={1}, widths=(48, 7, 0, 512))
    assert json.loads((out / "config.json").read_text())["head_dim"] == 16


def test_the_config_class_reads_it(tmp_path: Path):
    _, out = exported(tmp_path, "phi3", "longrope", removed={1}, widths=(48, 7, 0, 512))
    config = DeciLMConfig.from_pretrained(out)
    assert [block.attention.no_op for block in config.block_configs] == [False, True, False, False]
    assert [block.ffn.intermediate_size for block in config.block_configs] == [48, 7, None, 512]
    assert not hasattr(config.block_configs[0].ffn, "ffn_mult")
    assert config.rope_parameters["rope_type"] == "longrope"
    assert config.rope_parameters["original_max_position_embeddings"] == 16
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["block_configs"] == json.loads((out / "config.json").read_text())["block_configs"]


@pytest.mark.parametrize("variant", ["grouped", "sliding-tied"])
def test_fused_projections_are_split(tmp_path: Path, variant: str):
    pruned, out = exported(tmp_path, "phi3", variant, removed={1}, widths=(48, 7, 0, 512))
    source = open_checkpoint(pruned)
    names = set(read_headers(out))
    assert not any("qkv_proj" in name or "gate_up_proj" in name for name in names)
    assert ("lm_head.weight" in names) == (variant == "grouped")
    for layer, width in ((0, 48), (1, 7), (3, 512)):
        gate_up = source.read(f"model.layers.{layer}.mlp.gate_up_proj.weight")
        assert torch.equal(read(out, f"model.layers.{layer}.mlp.gate_proj.weight"), gate_up[:width])
        assert torch.equal(read(out, f"model.layers.{layer}.mlp.up_proj.weight"), gate_up[width:])
    qkv = source.read("model.layers.2.self_attn.qkv_proj.weight")
    parts = [read(out, f"model.layers.2.self_attn.{name}_proj.weight") for name in ("q", "k", "v")]
    assert torch.equal(torch.cat(parts), qkv)
    kv_rows = 16 if variant == "grouped" else 32
    assert [len(part) for part in parts] == [32, kv_rows, kv_rows]


@pytest.mark.parametrize(
    ("family", "variant", "biases"),
    [
        ("llama", "grouped", (False, False, False)),
        ("llama", "biased-tied", (True, True, True)),
        ("qwen2", "grouped", (True, False, False)),
    ],
)
def test_biases(tmp_path: Path, family: str, variant: str, biases: tuple[bool, bool, bool]):
    _, out = exported(tmp_path, family, variant, removed={1}, widths=(48, 7, 0, 512))
    config = json.loads((out / "config.json").read_text())
    assert (config["qkv_bias"], config["attention_bias"], config["mlp_bias"]) == biases
    names = set(read_headers(out))
    found = tuple(
        f"model.layers.0.{name}.bias" in names for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj")
    )
    assert found == biases


@pytest.mark.parametrize(
    ("family", "variant", "window", "mixed"),
    [
        ("mistral", "grouped", None, False),
        ("mistral", "sliding-tied", 6, False),
        ("qwen2", "grouped", None, False),
        ("qwen2", "alternating", 6, True),
        ("phi3", "sliding-tied", 6, False),
    ],
)
def test_sliding_windows(tmp_path: Path, family: str, variant: str, window: int | None, mixed: bool):
    _, out = exported(tmp_path, family, variant, removed={1}, widths=(48, 7, 0, 512))
    config = json.loads((out / "config.json").read_text())
    assert config.get("sliding_window") == window
    assert ("layer_types" in config) == mixed


def test_a_window_that_the_family_does_not_know_is_none(tmp_path: Path):
    make_pico(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "sliding_window": 4}))
    assert "sliding_window" not in nas_form(open_checkpoint(tmp_path / "source")).config


@pytest.mark.compatibility("nemotron-nas", "what it has no place for is refused by name")
@pytest.mark.parametrize(
    ("family", "variant", "reason"),
    [
        ("qwen3", "grouped", "'qwen3' has norms on queries and keys"),
        ("granite", "grouped", "'granite' has factors on embeddings"),
        ("gemma3_text", "alternating", "'gemma3_text' has norms behind attention and FFN"),
    ],
)
def test_families_that_have_more_than_llama_are_refused(
    tmp_path: Path, family: str, variant: str, reason: str, record_property: Callable[[str, str], None]
):
    make_family_pico(tmp_path / "source", family, variant)
    done = sentei("export", "nemotron-nas", tmp_path / "source", "-o", tmp_path / "out")
    refused(done, reason, "DeciLMForCausalLM has no place", "sentei export vllm", "llama, mistral, phi3, qwen2")
    assert not (tmp_path / "out").exists()
    record_property("refused", f"{reason}, for which DeciLMForCausalLM has no place")


def test_every_family_that_is_unlike_llama_says_how():
    """A family of which the table says nothing must be one whose tensors are Llama's."""
    like = {name for name, family in FAMILIES.items() if not family.unlike_llama}
    assert like == {"llama", "mistral", "phi3", "qwen2"}


def test_layer_0_without_attention_is_refused(tmp_path: Path):
    pruned = pruned_family(tmp_path, "llama", "grouped", removed={0, 2}, widths=(48, 48, 48, 48))
    done = sentei("export", "nemotron-nas", pruned, "-o", tmp_path / "out")
    refused(done, "layer 0 has no attention", "residual stream", "--protect attention:0", "sentei export vllm")
    assert not (tmp_path / "out").exists()


def test_another_activation_is_refused(tmp_path: Path):
    make_pico(tmp_path / "source", hidden_act="gelu")
    with pytest.raises(SenteiError, match="hidden_act is 'gelu', and DeciLMForCausalLM computes 'silu' alone"):
        export_nemotron_nas(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("hidden_size", [32, 96, 960, 3584])
def test_ffn_mult_gives_the_width_back(tmp_path: Path, hidden_size: int, monkeypatch: pytest.MonkeyPatch):
    """By the formula that vLLM and llama.cpp's converter have."""
    from toolchain.architecture.layout import LayerLayout
    from toolchain.model.decilm import _block

    config = {"hidden_size": hidden_size, "num_attention_heads": 4, "num_key_value_heads": 2}
    for width in range(256, 20000, 256):
        layer = LayerLayout(attention=True, intermediate_size=width)
        ffn_mult = _block(layer, config, with_ffn_mult=True)["ffn"]["ffn_mult"]
        inexact = int(2 * ffn_mult * hidden_size / 3)
        assert inexact + -inexact % 256 == width


def test_what_llama_cpp_can_have(tmp_path: Path):
    pruned = pruned_family(tmp_path, "llama", "llama3", removed={1, 2}, widths=(512, 256, 0, 256))
    form = nas_form(open_checkpoint(pruned))
    assert form.llama_cpp_obstacle is None
    blocks = form.config["block_configs"]
    assert [block["ffn"]["ffn_mult"] for block in blocks] == [24.0, 12.0, None, 12.0]
    assert all(isinstance(block["ffn"]["intermediate_size"], int | None) for block in blocks)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (
            {"widths": (512, 48, 256, 255)},
            r"multiples of 256, and layer 1 has 48 \(2 such layers; prune with --align 256",
        ),
        ({"widths": (512, 256, 0, 256)}, "layer 2 has no FFN, and llama.cpp would lose"),
        ({"removed": {3}, "widths": (512, 256, 512, 0)}, "layer 3 has no FFN, and llama.cpp would lose"),
        ({"variant": "yarn"}, r"leaves out this form's rope_parameters \(rope_type 'yarn'\)"),
        ({"variant": "multi-head"}, "takes hidden_size / num_attention_heads for head_dim, which is 16"),
        ({"family": "phi3", "variant": "sliding-tied"}, r"knows no sliding window \(here 6\)"),
    ],
)
def test_what_llama_cpp_would_get_wrong_it_is_not_given(tmp_path: Path, how: dict[str, Any], reason: str):
    import re

    said = obstacle(tmp_path, **how)
    assert said is not None and re.search(reason, said)


def test_what_reads_back_different_is_not_kept(pico_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from export import decilm as nemotron_nas

    write_weights = nemotron_nas.write_weights

    def write_one_wrong(out: Path, tensors: Any, load: Any, **options: Any) -> None:
        def load_wrong(name: str) -> torch.Tensor:
            tensor = load(name)
            return tensor.clone().fill_(0) if name.endswith("layers.1.mlp.down_proj.weight") else tensor

        write_weights(out, tensors, load_wrong, **options)

    monkeypatch.setattr(nemotron_nas, "write_weights", write_one_wrong)
    with pytest.raises(CheckFailedError, match=r"layers\.1\.mlp\.down_proj\.weight reads back different"):
        export_nemotron_nas(pico_model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_bad_requests(pico_model: Path, tmp_path: Path):
    with pytest.raises(SenteiError, match="would replace the input"):
        export_nemotron_nas(pico_model, pico_model, force=True)
    export_nemotron_nas(pico_model, tmp_path / "out")
    refused(sentei("export", "nemotron-nas", tmp_path / "out", "-o", tmp_path / "again"), "take no plugin")
    with pytest.raises(SenteiError, match="is not empty"):
        export_nemotron_nas(pico_model, tmp_path / "out")
