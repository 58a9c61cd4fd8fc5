"""Kits made by hand (of each engine, of one or two sides, signed or not), and the programs that run them."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.deploy_kit.facts import Kit, Side


def kit(
    *roles: str, engine: str = "vllm", on_gpu: bool = True, is_signed: bool = False, model_name: str = "small"
) -> Kit:
    sides = tuple(
        Side(
            role=role, engine=engine, on_gpu=on_gpu, is_signed=is_signed, was_verified=True, tag=f"{number:012x}",
            weight_bytes=270_000_000 - 50_000_000 * number, size_on_disk_bytes=280_000_000, kv_bytes_per_token=23_040,
            kv_bytes=lambda tokens: 23_040 * tokens, context=2048, most=2048,
        )  # type: ignore[arg-type]
        for number, role in enumerate(roles)
    )  # fmt: skip
    return Kit(
        sides=sides, model_name=model_name, name="small", registry="registry.example:5000/llm", max_model_len=2048,
        sentei_version="0.1.0",
    )  # fmt: skip


PAIR = ("original", "candidate")


def all_kinds() -> Iterator[Kit]:
    """One of each that has files of its own."""
    for roles in (PAIR, ("model",)):
        yield kit(*roles)
        yield kit(*roles, is_signed=True)
        yield kit(*roles, engine="onnx", on_gpu=False, is_signed=True)
        yield kit(*roles, engine="onnx", on_gpu=True)


def program(name: str) -> str:
    """Where a program is: on the path, or beside this Python. Skips the test where it is not installed."""
    found = shutil.which(name) or str(Path(sys.executable).with_name(name))
    if not Path(found).exists():
        pytest.skip(f"{name} is not installed")
    return found
