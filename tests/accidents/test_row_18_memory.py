"""Where memory ends, the command says so, whichever thread it ended in."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from tests.command_line import refused, sentei
from toolchain import onnx_libraries
from toolchain.cli.app import _told
from toolchain.errors import MissingDependencyError

_LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1)) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from toolchain.cli.app import main
main()
"""

# The limit is lowered to what is in use, so that it does not matter how much that is.
_NO_ROOM_AFTER_LOADING = """
import numpy, resource
from toolchain.cli import entry
resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))
entry._load_blas_in_limited_memory()
from scipy.linalg import lapack
matrix = numpy.eye(600)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 16 * 2**20,) * 2)
lapack.dpotrf(matrix), matrix @ matrix
"""


@pytest.mark.timeout(120)
def test_openblas_does_not_ask_for_ever():
    # A prune under ``ulimit -v`` stood still in the first factor of its compensation.
    done = subprocess.run([sys.executable, "-c", _NO_ROOM_AFTER_LOADING], timeout=60, check=False)
    assert done.returncode == 0


@pytest.mark.timeout(60)
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_the_thread_that_generates_ends(pico_model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception):
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    # The main thread waited for its tokens for ever.
    monkeypatch.setattr(LlamaForCausalLM, "generate", fail)
    refused(sentei("generate", pico_model, "--prompt", "hi"), "Memory ran out")


@pytest.mark.acceptance
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mebibytes", [1000, 1500, 2000])
@pytest.mark.parametrize("command", ["evaluate", "generate", "prune"])
def test_real_limits(demo_model: Path, text: Path, tmp_path: Path, command: str, mebibytes: int):
    out = tmp_path / "out"
    more = {
        "evaluate": ["--text", text, "--seq-len", 64],
        "generate": ["--prompt", "hi"],
        "prune": ["-o", out, "--sparsity", 0.25, "--calibration", text, "--samples", 2, "--seq-len", 64],
    }[command]
    line = [sys.executable, "-c", _LIMITED, mebibytes, command, demo_model, *more]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=500, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == 2, done.stderr
    assert "Memory ran out" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_library_that_does_not_fit_is_not_called_missing(monkeypatch: pytest.MonkeyPatch):
    def no_room(name: str) -> None:
        raise ImportError(f"{name}.so: failed to map segment from shared object")

    monkeypatch.setattr(onnx_libraries.importlib, "import_module", no_room)
    with pytest.raises(MissingDependencyError) as missing:
        onnx_libraries.import_onnx_library("onnxruntime")
    sentence, exit_code = _told(missing.value)
    assert sentence.startswith("Memory ran out") and exit_code == 2


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : BFCArena::AllocateRawInternal Failed to allocate memory for "
        "requested buffer of size 4294967296",
    ],
)
def test_a_gpu_without_memory_is_no_fault_of_sentei(said: str):
    sentence, exit_code = _told(RuntimeError(said))
    assert sentence.startswith("Memory ran out") and exit_code == 2
