"""What a kit must know of the exports that it deploys, read from their files."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from serving.forecast.model_facts import ModelFacts, checkpoint_facts, onnx_facts
from serving.onnx_export.files import is_onnx_export, read_settings
from serving.signing.signed_files import SIGNATURE_FILE
from toolchain.checkpoint.verification_document import VERIFICATION_FILE, VerificationDocument
from toolchain.documents import read_document
from toolchain.errors import CheckFailedError, SenteiError
from toolchain.model.decilm import is_nemotron_nas

Engine = Literal["vllm", "onnx"]
_GIB = 2**30
_LONGEST_NAME, _LONGEST_OBJECT_NAME = 200, 40
_REGISTRY = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]{1,5})?(/[a-z0-9]+([._-][a-z0-9]+)*)*")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the exports.

    Attributes:
        role: ``original``, ``candidate``, or ``model`` where there is only one.
        engine: What serves it.
        on_gpu: Whether it needs one.
        is_signed: Whether it has a signature, which its server then asks for.
        was_verified: Whether it says that it passed.
        tag: Of its image: another byte in a file, another tag.
        weight_bytes: Stored weights.
        size_on_disk_bytes: All files.
        kv_bytes_per_token: Of one sequence, where no layer has a sliding window.
        kv_bytes: Of one sequence, by its tokens.
        context: Tokens of a request that its server takes where it is told nothing else, and for which it was verified.
        most: Tokens that its server takes at most: more than ``context`` with LongRoPE in vLLM alone.
    """

    role: str
    engine: Engine
    on_gpu: bool
    is_signed: bool
    was_verified: bool
    tag: str
    weight_bytes: int
    size_on_disk_bytes: int
    kv_bytes_per_token: int
    kv_bytes: Callable[[int], int]
    context: int
    most: int


@dataclass(frozen=True, kw_only=True)
class Kit:
    """All that the templates are filled with.

    Attributes:
        sides: One or two, the original first.
        model_name: What clients call it.
        name: The same as Kubernetes, DNS and registries take it.
        registry: Where images are.
        max_model_len: Tokens of prompt and answer.
        sentei_version: Of the image.
    """

    sides: tuple[Side, ...]
    model_name: str
    name: str
    registry: str
    max_model_len: int
    sentei_version: str

    @property
    def server_image(self) -> str:
        """The image that serves."""
        return f"{self.registry}/{self.name}-server:{self.sentei_version}"

    def model_image(self, side: Side) -> str:
        """The image that holds a side's files."""
        return f"{self.registry}/{self.name}-{side.role}:{side.tag}"

    def object_name(self, side: Side) -> str:
        """What a side is called in Kubernetes and in Prometheus."""
        return f"{self.name}-{side.role}"

    def least_memory_gib(self, side: Side) -> int:
        """Weights and one request of the longest kind, rounded up: less can never do."""
        return -(-(side.weight_bytes + side.kv_bytes(self.max_model_len)) // _GIB)

    @property
    def has_shell_name(self) -> bool:
        """Whether a shell takes the name for one word; KServe pastes it into a command."""
        return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", self.model_name) is not None


def gather(
    directories: Sequence[Path], *, model_name: str | None, max_model_len: int | None, registry: str, version: str
) -> Kit:
    """Reads one or two exports.

    Args:
        directories: The original first.
        model_name: By default the first directory's name.
        max_model_len: By default as many tokens as both were verified for.
        registry: Host and path of a registry.
        version: Of sentei.

    Raises:
        CheckFailedError: One failed its verification.
        SenteiError: One cannot be served, they do not fit together, or a name cannot be used.
    """
    if not 1 <= len(directories) <= 2:
        raise SenteiError(f"{len(directories)} directories were given.", "Give the original and the candidate, or one.")
    roles = ("original", "candidate") if len(directories) == 2 else ("model",)
    sides = tuple(_side(directory, role) for directory, role in zip(directories, roles, strict=True))
    if len({(each.engine, each.on_gpu) for each in sides}) > 1:
        raise SenteiError(
            "One directory is for another engine or device than the other: what differs would not be the pruning.",
            "Export both in the same way.",
        )
    most = min(each.most for each in sides)
    if max_model_len is not None and max_model_len > most:
        raise SenteiError(f"--max-model-len {max_model_len} is more than the {most} tokens that its server takes.")
    name = directories[0].resolve().name if model_name is None else model_name
    if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable() or name != name.strip():
        raise SenteiError(
            f"{name!r} cannot be the name of a served model.", "Give another one with --served-model-name."
        )
    if not _REGISTRY.fullmatch(registry):
        raise SenteiError(
            f"--registry {registry!r} is no place of images.", "Write it as in registry.example:5000/llm."
        )
    return Kit(
        sides=sides, model_name=name, name=_object_name(name), registry=registry,
        max_model_len=max_model_len or min(each.context for each in sides),
        sentei_version=re.sub(r"[^\w.-]", "-", version),
    )  # fmt: skip


def _side(directory: Path, role: str) -> Side:
    if not directory.is_dir():
        raise SenteiError(f"Directory {directory} does not exist.", "Give what sentei export wrote.")
    is_onnx = is_onnx_export(directory)
    if not is_onnx and is_nemotron_nas(directory):
        raise SenteiError(
            f"{directory} needs remote code, which the kit's server does not run.", "Write it with sentei export vllm."
        )
    facts: ModelFacts = onnx_facts(directory) if is_onnx else checkpoint_facts(directory, None)
    return Side(
        role=role,
        engine="onnx" if is_onnx else "vllm",
        on_gpu=read_settings(directory).device == "cuda" if is_onnx else True,
        is_signed=(directory / SIGNATURE_FILE).is_file(),
        was_verified=_was_verified(directory),
        tag=_tag(directory),
        weight_bytes=facts.weight_bytes,
        size_on_disk_bytes=facts.size_on_disk_bytes,
        kv_bytes_per_token=facts.kv_bytes_per_token,
        kv_bytes=facts.kv_bytes,
        context=facts.served_len,
        most=facts.served_len if is_onnx else facts.max_len,
    )


def _was_verified(directory: Path) -> bool:
    if not (directory / VERIFICATION_FILE).is_file():
        return False
    document = read_document(directory / VERIFICATION_FILE, VerificationDocument)
    if document.failed_checks or not document.root.passed:
        raise CheckFailedError(f"{directory} failed its verification.", f"Export it again; see {VERIFICATION_FILE}.")
    return True


def _tag(directory: Path) -> str:
    """From the names and bytes of all files: a node keeps the image that it has for a tag."""
    digest = hashlib.sha256()
    for path in sorted(each for each in directory.rglob("*") if each.is_file()):
        digest.update(f"{path.relative_to(directory).as_posix()}\0".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def _object_name(name: str) -> str:
    """Lower-case letters, digits and dashes, a letter first: Kubernetes' names of services (RFC 1035)."""
    found = re.sub(r"[^a-z0-9]+", "-", name.lower())[:_LONGEST_OBJECT_NAME].strip("-")
    return found if found[:1].isalpha() else f"model-{found}".strip("-")
