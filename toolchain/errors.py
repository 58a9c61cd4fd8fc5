"""What can go wrong, in words for the person who can put it right.

Raised anywhere below ``toolchain.cli``, caught once in ``toolchain.cli.app.main``. Standard library only: the vLLM
plugin raises these inside somebody else's server.
"""

# The exit code of a command that Ctrl-C ended, as shells have it: 128 and the signal's number.
INTERRUPTED = 130
# The exit code of a command in which sentei itself failed (EX_SOFTWARE of sysexits.h): what was asked is not answered.
ITSELF_FAILED = 70
# Signals that come within these seconds of each other are one wish to stop.
SAME_WISH_S = 2.0
_LONGEST_LINE = 1000


class SenteiError(Exception):
    """Bad input. The command ends with exit code 2.

    Args:
        message: What is wrong, where, and with which value.
        hint: What to do next; may be empty.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        message = "\n".join(map(_shortened, message.split("\n")))
        super().__init__(f"{message} {hint}".strip())
        self.message = message
        self.hint = hint


def _shortened(line: str) -> str:
    """A message quotes values of files, which can be as long as the files."""
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE // 2]} … {line[-_LONGEST_LINE // 2 :]}"


def reason_of(error: BaseException) -> str:
    """What a library says of what went wrong, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


class MissingDependencyError(SenteiError):
    """A library of an optional extra is not installed."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed.", f"Install it with: pip install 'sentei[{extra}]'")


class CheckFailedError(SenteiError):
    """The input was good, and a check on the result failed. The command ends with exit code 1."""

    exit_code = 1


# How libraries say that an allocation failed: torch on a CPU, safetensors' mmap, C++, threads without a stack, the
# loader of shared libraries, CUDA, cuBLAS and its like, and ONNX Runtime.
_ALLOCATION_FAILURES = (
    "can't allocate memory",
    "Cannot allocate memory",
    "bad_alloc",
    "can't start new thread",
    "failed to map segment",
    "CUDA error: out of memory",
    "STATUS_ALLOC_FAILED",
    "Failed to allocate memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on a GPU or on a CPU."""
    # By name, so that torch need not be there: torch.OutOfMemoryError is the GPU's.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(said in str(error) for said in _ALLOCATION_FAILURES)


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic of a library in Rust, which is no ``Exception``.

    Of those that sentei uses, tokenizers panics over what is in files: over patterns that it cannot follow in a text.
    """
    return type(error).__module__ == "pyo3_runtime"
