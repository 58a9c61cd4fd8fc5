"""Do LoRA adapters fit a pruned checkpoint? Asked before a server starts; the plugin asks when vLLM loads one."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from toolchain.checkpoint.directory import Checkpoint, open_checkpoint
from toolchain.errors import SenteiError
from toolchain.json_files import parse_json
from toolchain.safetensors_files import check_header_size

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Which dimension of an adapter's matrix is the weight's own: A is [rank, in], B is [out, rank], the weight [out, in].
_SIDES = {"lora_A": (1, 1), "lora_B": (0, 0)}


def check_adapters(directory: Path, options: Sequence[str]) -> None:
    """Checks the local adapters that ``--lora-modules`` names among vLLM's options, before a server starts.

    An adapter of the unpruned model fits where its parts were kept: what it has for removed attention has no place, and
    is left out (said on stderr). Where a width differs, it cannot be used.

    Raises:
        SenteiError: An adapter that does not fit, or cannot be read.
    """
    adapters = [(name, path) for name, path in _named(options) if path.is_dir()]
    if adapters:
        checkpoint = open_checkpoint(directory)
        for name, path in adapters:
            if left_out := _check(checkpoint, name, path):
                print(
                    f"Adapter {name}: {len(left_out)} of its modules were removed from this checkpoint and are left "
                    f"out, {left_out[0]} first.",
                    file=sys.stderr,
                )


def _named(options: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Adapters by name; vLLM takes ``name=path`` and JSON objects, several after one option."""
    reading = False
    for option in options:
        if option.startswith("--"):
            key, _, value = option.partition("=")
            reading = key.replace("_", "-") == "--lora-modules"
            option = value
        if reading and option.startswith("{"):
            try:
                adapter = parse_json(option, "--lora-modules")
                yield str(adapter["name"]), Path(str(adapter["path"]))
            except (SenteiError, KeyError) as error:
                raise SenteiError(f"--lora-modules {option}: not an object with name and path.") from error
        elif reading and "=" in option:
            name, _, path = option.partition("=")
            yield name, Path(path)


def _check(checkpoint: Checkpoint, name: str, adapter: Path) -> list[str]:
    """Returns the modules that the checkpoint does not have any more."""
    left_out = []
    for key, shape in _shapes(adapter):
        module, _, kind = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if kind not in _SIDES:
            continue
        weight = checkpoint.tensors.get(f"{module}.weight")
        if weight is None:
            left_out += [module] if module not in left_out else []
            continue
        if len(shape) != 2 or len(weight.shape) != 2:
            raise SenteiError(f"Adapter {name}: {key} has shape {list(shape)}, and is not a matrix, or not for one.")
        ours, its = (size[dimension] for size, dimension in zip((weight.shape, shape), _SIDES[kind], strict=True))
        if ours != its:
            raise SenteiError(
                f"Adapter {name}: {module} has {its} in {kind}, and {ours} in {checkpoint.directory}: the adapter was "
                "trained on the model before its FFNs were narrowed.",
                "Train it on the pruned model, or leave its FFN modules out.",
            )
    return left_out


def _shapes(adapter: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    if (adapter / _WEIGHTS).is_file():
        check_header_size(adapter / _WEIGHTS)
    try:
        with safe_open(adapter / _WEIGHTS, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                yield key, tuple(file.get_slice(key).get_shape())
    except (SafetensorError, OSError) as error:
        raise SenteiError(f"{adapter} holds no readable {_WEIGHTS} ({error}).") from error
