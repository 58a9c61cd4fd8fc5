"""The streaming writer: what it writes, the safetensors library reads."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from toolchain.checkpoint.safetensors_writer import write_safetensors

TENSORS = {
    "half": torch.arange(3, dtype=torch.float16),
    "配列": torch.arange(6, dtype=torch.float32).view(2, 3).T,
    "brain": torch.tensor([[1.5, -2.0], [float("inf"), float("nan")]], dtype=torch.bfloat16),
    "scalar": torch.tensor(7.0),
    "empty": torch.zeros(0, 4),
    "double": torch.tensor([1e300], dtype=torch.float64),
}


def shapes() -> dict:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def test_the_library_reads_it_bit_for_bit(tmp_path: Path):
    write_safetensors(tmp_path / "x.safetensors", shapes(), TENSORS.__getitem__)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        bits = [each.contiguous().reshape(-1).view(torch.uint8) for each in (found[name], tensor)]
        assert torch.equal(*bits), name
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path):
    alive: list[str] = []

    def load(name: str) -> torch.Tensor:
        assert not alive
        alive.append(name)
        return TENSORS[name]

    write_safetensors(tmp_path / "x.safetensors", shapes(), load, on_tensor=lambda name: alive.remove(name))
    assert not alive


def test_a_tensor_of_another_shape_is_our_own_mistake(tmp_path: Path):
    with pytest.raises(AssertionError, match="double"):
        write_safetensors(tmp_path / "x.safetensors", shapes(), lambda name: torch.zeros(1))
