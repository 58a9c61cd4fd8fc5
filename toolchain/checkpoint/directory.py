"""Model directories in and out: config, safetensors shards, tokenizer files. Weights are streamed, never held whole."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from toolchain.architecture.families import Family, family_of
from toolchain.architecture.layout import LayerLayout, read_layout
from toolchain.architecture.tensor_check import check_layer_tensors
from toolchain.checkpoint.safetensors_writer import DTYPES, write_safetensors
from toolchain.errors import SenteiError, is_out_of_memory, reason_of
from toolchain.json_files import read_json_object
from toolchain.safetensors_files import check_header_size, shards_in

MAX_SHARD_BYTES = 5_000_000_000
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# Beside a model's weights Transformers adds the adapter to them without a word, and other loaders do not.
_ADAPTER = "adapter_config.json"
# Rotary frequencies, which checkpoints of Llama 2's time hold for each layer: no model reads them.
_COMPUTED = ".rotary_emb.inv_freq"
_COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor: its file, shape and dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self, name: str) -> torch.Tensor:
        """Reads the tensor, whose name the file knows, as stored.

        Raises:
            SenteiError: The file is damaged.
        """
        try:
            with safe_open(self.file, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            # The library reads the header, and has torch open the file once more: it may be gone by then.
            if is_out_of_memory(error):
                raise
            raise SenteiError(f"{self.file}: tensor {name} cannot be read ({reason_of(error)}).") from error


@dataclass(frozen=True)
class Checkpoint:
    """An opened and checked model directory; its weights stay on disk.

    Attributes:
        directory: Where it is.
        config: ``config.json`` as written.
        family: Its entry in the table of families.
        layout: One entry a decoder layer.
        tensors: What the safetensors headers list, by name.
    """

    directory: Path
    config: Mapping[str, Any]
    family: Family
    layout: tuple[LayerLayout, ...]
    tensors: Mapping[str, TensorInfo]

    @property
    def is_pruned(self) -> bool:
        """Whether any layer differs from the others."""
        return "per_layer_config" in self.config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype most of the weights are stored in."""
        stored = [info.dtype for info in self.tensors.values() for _ in info.shape]
        return max(set(stored), key=stored.count)

    @property
    def num_parameters(self) -> int:
        """All stored parameters; tied embeddings count once."""
        return sum(torch.Size(info.shape).numel() for info in self.tensors.values())

    @property
    def num_block_parameters(self) -> int:
        """Parameters of the decoder blocks, norms included: what sparsity is a fraction of."""
        prefix = f"{self.family.layers}."
        return sum(torch.Size(i.shape).numel() for name, i in self.tensors.items() if name.startswith(prefix))

    @property
    def weight_bytes(self) -> int:
        """Size of all stored tensors in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor as stored.

        Raises:
            SenteiError: The file is damaged.
        """
        return self.tensors[name].read(name)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, by name."""
        return {name: info.shape for name, info in self.tensors.items()}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every tensor's name, dtype, shape and bytes, sorted by name."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(f"{name} {info.dtype} {list(info.shape)}\n".encode())
            digest.update(self.read(name).reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether dtype, shape and raw bytes are equal: a NaN is equal to the same NaN, and 0 is not equal to -0."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def resolve_model(model: str) -> Path:
    """Turns a local directory or a hub id into a local directory, downloading from the hub if need be.

    Raises:
        SenteiError: Neither a directory nor a model the hub can give.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith(".") or path.parent.is_dir():
        raise SenteiError(f"Model directory {model} does not exist.", "Give a directory, or a hub id such as org/name.")
    from huggingface_hub import snapshot_download

    try:
        # Beside the weights, some models have them once more in their makers' own form. The card says the licence.
        return Path(
            snapshot_download(
                model,
                allow_patterns=["*.json", "*.safetensors", *_COMPANIONS, "README.md"],
                ignore_patterns=["consolidated*.safetensors"],
            )
        )
    except Exception as error:  # whatever the hub client raises, the reader needs the same sentence
        raise SenteiError(
            f"{model} is neither a directory here nor could it be fetched from the hub ({type(error).__name__}).",
            "Check the name and the connection, or give a local directory.",
        ) from error


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` → ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def model_name(directory: Path) -> str:
    """What a model is called: its directory's name, or the hub's id if that is where the hub client keeps it."""
    directory = directory.resolve()
    repository = directory.parent.parent.name
    if directory.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return directory.name


def open_checkpoint(directory: Path) -> Checkpoint:
    """Opens a model directory and checks config, layout and safetensors headers against each other.

    Raises:
        SenteiError: Missing or empty directory, unsupported family, pickle-only weights, damaged safetensors, or
            tensors that do not fit the layout.
    """
    config = read_config(directory)
    family = family_of(config)
    if config.get("quantization_config"):
        raise SenteiError(
            f"{directory}/config.json has a quantization_config; quantised checkpoints are not supported.",
            f"Give the unquantised model ({', '.join(DTYPES)}).",
        )
    layout = read_layout(config)
    tensors = read_headers(directory)
    checkpoint = Checkpoint(directory, config, family, layout, tensors)
    check_layer_tensors(str(directory), family, layout, checkpoint.shapes)
    if not any(info.shape for info in tensors.values()):
        raise SenteiError(f"{directory} holds no weights but single numbers.")
    return checkpoint


def opened(model: Path | Checkpoint) -> Checkpoint:
    """A checkpoint from its directory; one that is open already comes back as it is.

    Raises:
        SenteiError: See :func:`open_checkpoint`.
    """
    return model if isinstance(model, Checkpoint) else open_checkpoint(model)


def companion_files(directory: Path) -> list[Path]:
    """The files that travel with the weights: tokenizer, chat template, generation config, licence."""
    found = {path for pattern in _COMPANIONS for path in directory.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.suffix not in {".py", ".bin", ".safetensors"})


def copy_companions(source: Path, target: Path) -> None:
    """Copies :func:`companion_files` from one model directory into another."""
    for path in companion_files(source):
        shutil.copyfile(path, target / path.name)


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Writes ``config.json``."""
    (directory / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(
    directory: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    load: Callable[[str], torch.Tensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_tensor: Callable[[str], None] = lambda name: None,
) -> None:
    """Writes safetensors, one file or numbered shards, with an index; holds one tensor in memory at a time.

    Args:
        directory: An existing directory.
        tensors: Shape and dtype by name, in the order to write.
        load: Returns a tensor of that name, shape and dtype.
        max_shard_bytes: No shard is larger, unless a single tensor is.
        on_tensor: Called after each tensor, for progress.

    Raises:
        OSError: The disk is full or not writable.
    """
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (shape, dtype) in tensors.items()}
    shards: list[list[str]] = [[]]
    for name in tensors:
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + sizes[name] > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, {name: tensors[name] for name in names}, load, on_tensor=on_tensor)
        weight_map |= dict.fromkeys(names, file)
    # Also for a single file: without an index vLLM takes every *.safetensors, the plan's scores too, for weights.
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_config(directory: Path) -> dict[str, Any]:
    """Reads ``config.json`` and nothing else.

    Raises:
        SenteiError: There is none, it is damaged, or a LoRA adapter lies beside it.
    """
    if not directory.is_dir():
        raise SenteiError(f"Model directory {directory} does not exist.")
    path = directory / "config.json"
    if not path.is_file():
        what = "has no config.json" if any(directory.iterdir()) else "is empty"
        raise SenteiError(f"Model directory {directory} {what}.", "Give a directory in Hugging Face format.")
    check_no_adapter(directory)
    return read_json_object(path)


def check_no_adapter(directory: Path) -> None:
    """Refuses a model directory with a LoRA adapter in it: what its weights are would depend on who loads them.

    Raises:
        SenteiError: There is one.
    """
    adapter = directory / _ADAPTER
    if adapter.exists() or adapter.is_symlink():
        raise SenteiError(
            f"{adapter} lies beside a model's weights, and Transformers would add that adapter to them.",
            f"Merge the adapter first (merge_and_unload of PEFT), or move {_ADAPTER} into a directory of its own.",
        )


def _shard_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if index.is_file():
        names = shards_in(index)
        for name in names:
            if not (directory / name).is_file():
                raise SenteiError(f"{directory}: shard {name} is missing.", "Download or copy the model again.")
        return [directory / name for name in names]
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern)]
    if pickles:
        raise SenteiError(
            f"{directory} holds its weights only as pickle ({sorted(pickles)[0]}), which can run code when loaded.",
            "Convert it to safetensors first.",
        )
    raise SenteiError(f"{directory} holds no safetensors weights.", f"Expected {_SINGLE} or {_INDEX}.")


def read_headers(directory: Path, dtypes: Mapping[str, torch.dtype] = DTYPES) -> dict[str, TensorInfo]:
    """Lists a directory's tensors by name, from its safetensors headers; those that are computed are left out.

    Args:
        directory: With one file or an index of several.
        dtypes: The ones that may be there, by safetensors' names.

    Raises:
        SenteiError: No weights, pickle only, damaged files, or another dtype.
    """
    tensors: dict[str, TensorInfo] = {}
    for path in _shard_files(directory):
        check_header_size(path)
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    if name.endswith(_COMPUTED):
                        continue
                    header = file.get_slice(name)
                    dtype = dtypes.get(header.get_dtype())
                    if dtype is None:
                        raise SenteiError(
                            f"{path}: tensor {name} is stored as {header.get_dtype()}; quantised checkpoints are not "
                            "supported.",
                            f"Give the unquantised model ({', '.join(DTYPES)}).",
                        )
                    tensors[name] = TensorInfo(path, tuple(header.get_shape()), dtype)
        except (SafetensorError, OSError) as error:
            raise SenteiError(
                f"{path} is corrupt or truncated ({reason_of(error)}).", "Download or copy it again."
            ) from error
    return tensors
