#!/usr/bin/env bash
# In some six minutes on one GPU of 80 GB, what takes gpu.sh hours: random weights of Llama-3-8B's shape against what
# pruning leaves of it, in vLLM, by output tokens a second alone (two_servers.py says what that leaves out). Needs
# sentei[vllm,demo], and 28 GB of disk or memory at MODELS for one sparsity.
#
#   benchmarks/gpu_quick.sh OUT [SPARSITY...]
#
# On a CPU, to see that it runs (two servers on a few cores hinder each other, so the rates mean nothing):
#   SHAPE=small VLLM_OPTIONS="--max-model-len 256 --enforce-eager" \
#   LOAD="--input-len 32 --output-len 8 --load 1:2 --load 2:4" VLLM_CPU_KVCACHE_SPACE=1 benchmarks/gpu_quick.sh OUT
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu_quick.sh OUT [SPARSITY...]}
shift
[[ $# -gt 0 ]] || set -- 0.25
shape=${SHAPE:-llama-3-8b} models=${MODELS:-$out/models}
read -ra load <<<"${LOAD-}"
# Each has as much KV cache as the widest load fills, and leaves the other its part of the GPU.
vllm_options=${VLLM_OPTIONS:---max-model-len 2048 --max-num-seqs 64 --gpu-memory-utilization 0.3 --kv-cache-memory-bytes 9000000000}
read -ra sentei <<<"${SENTEI:-sentei}"
read -ra python <<<"${PYTHON:-python}"

mkdir -p "$out"
"${sentei[@]}" doctor >"$out/doctor.txt" || true
if command -v nvidia-smi >/dev/null; then nvidia-smi -q >"$out/nvidia-smi.txt"; fi
# shellcheck disable=SC2046 # one option for each sparsity
"${python[@]}" benchmarks/random_checkpoint.py "$models" --shape "$shape" $(printf -- '--sparsity %s ' "$@")
for sparsity; do
  "${python[@]}" benchmarks/two_servers.py "$models/original" "$models/pruned-$sparsity" --options "$vllm_options" \
    "${load[@]}" -o "$out/$shape-$sparsity.json"
done
