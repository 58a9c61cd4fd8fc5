"""The names of what lies beside an output while it is unfinished."""

from dataclasses import dataclass
from pathlib import Path

PARTIAL, REPLACED, LOCK = "partial", "replaced", "lock"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of work that ``--resume`` goes on with.

    Attributes:
        suffix: The work lies in ``<out>.<suffix>``.
        noun: One of it, for messages.
        signs: Patterns below that directory; sentei has left nothing there that matches none of them.
        identity_file: Holds what the work depends on; ``None`` where each file's name says that.
    """

    suffix: str
    noun: str
    signs: tuple[str, ...]
    identity_file: str | None = None

    def directory(self, out: Path) -> Path:
        """Where the work towards an output lies."""
        return beside(out, self.suffix)


SEARCH = Kind(
    suffix="search",
    noun="search",
    signs=("inputs.json*", "plan.*", "*/inputs.json*", "*/plan.*"),
    identity_file="inputs.json",
)
HEALING = Kind(suffix="heal", noun="healing", signs=("inputs.json*",), identity_file="inputs.json")
PARTS = Kind(
    suffix="parts",
    noun="run",
    signs=("*-????????????????.json*", "*-????????????????.safetensors*", "models", "plans"),
)
BENCHMARK = Kind(
    suffix="unfinished",
    noun="benchmark",
    signs=("settings.json*", "measured.jsonl*", "not_started.json"),
    identity_file="settings.json",
)
PROFILE = Kind(suffix="profile", noun="profile", signs=("inputs.json*",), identity_file="inputs.json")
UNHEALED = Kind(suffix="unhealed", noun="pruning with healing", signs=("inputs.json*",), identity_file="inputs.json")

_KINDS = (SEARCH, HEALING, PARTS, BENCHMARK, PROFILE, UNHEALED)
SUFFIXES = (PARTIAL, REPLACED, LOCK, *(kind.suffix for kind in _KINDS))


def beside(out: Path, suffix: str) -> Path:
    """``<out>.<suffix>``, where what belongs to an output lies while it is unfinished.

    Unlike ``with_name`` it takes ``.`` and ``/``, so that :func:`toolchain.outputs.check_output_directory` is what
    refuses them.
    """
    return out.parent / f"{out.name}.{suffix}"
