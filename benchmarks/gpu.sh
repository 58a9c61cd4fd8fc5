#!/usr/bin/env bash
# The whole measurement on a GPU: the demo model, and random weights of Llama-3-8B's shape at 0, 14, 25 and 50 %, in vLLM
# and in ONNX Runtime with CUDA. Needs sentei[vllm,onnx-gpu,demo,nvml] and no network. Interrupted, it goes on when it is
# called again. With the shape of 8B: 100 GB of disk, 64 GB of memory, and some four hours on an H100.
#
#   benchmarks/gpu.sh OUT
#
# On a CPU, to see that it runs (an hour or more on 2 cores, since each repeat starts its servers):
#   DEVICE=cpu SHAPE=small SPARSITIES="0 0.25" REPEATS=3 CHAT="--input-len 32 --output-len 8 --concurrency 1,2" \
#   BATCH="--input-len 32 --output-len 8 --concurrency 4" ONE="--input-len 32 --output-len 8" SLO= \
#   VLLM_OPTIONS="--engine-option=--enforce-eager --engine-option=--max-model-len=256" benchmarks/gpu.sh OUT
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh OUT}
shape=${SHAPE:-llama-3-8b} sparsities=${SPARSITIES:-0 0.14 0.25 0.5} repeats=${REPEATS:-5} device=${DEVICE:-cuda}
chat=${CHAT---workload chat --concurrency 1,16,64}
batch=${BATCH---workload batch}
one=${ONE---input-len 512 --output-len 128 --concurrency 1}
slo=${SLO---workload chat --slo ttft=500,tpot=50}
vllm_options=${VLLM_OPTIONS-}
read -ra sentei <<<"${SENTEI:-sentei}"
read -ra python <<<"${PYTHON:-python}"

measure() { # NAME ORIGINAL PRUNED OPTIONS...
  local to="$out/$1"
  shift
  [[ -f $to/results.json ]] || "${sentei[@]}" benchmark "$@" --repeats "$repeats" --resume -o "$to"
}

export_onnx() { # DIRECTORY TO
  local precision=()
  if [[ $device == cuda ]]; then precision=(--device cuda --precision fp16); fi
  [[ -d $2 ]] || "${sentei[@]}" export onnx "$1" "${precision[@]}" -o "$2"
}

compare() { # NAME ORIGINAL PRUNED DIRECTORIES_OF_THE_REPORT...
  # shellcheck disable=SC2086 # the loads are lists of options
  measure "vllm-$1" "$2" "$3" --engine vllm $chat $vllm_options
  # shellcheck disable=SC2086
  measure "offline-$1" "$2" "$3" --engine vllm-offline $batch $vllm_options
  export_onnx "$2" "$2-onnx"
  export_onnx "$3" "$3-onnx"
  # shellcheck disable=SC2086
  measure "onnx-$1" "$2-onnx" "$3-onnx" --engine onnx --device "$device" $one
  "${sentei[@]}" report "${@:4}" "$out/vllm-$1" "$out/offline-$1" "$out/onnx-$1" --force -o "$out/report-$1.html"
}

mkdir -p "$out"
"${sentei[@]}" doctor >"$out/doctor.txt" || true
if command -v nvidia-smi >/dev/null; then nvidia-smi -q >"$out/nvidia-smi.txt"; fi

[[ -d $out/demo ]] || "${sentei[@]}" demo -o "$out/demo"
compare demo "$out/demo/original" "$out/demo/pruned" "$out/demo/pruned" "$out/demo/evaluation"

read -ra levels <<<"$sparsities"
"${python[@]}" benchmarks/random_checkpoint.py "$out/models" --shape "$shape" \
  $(for each in "${levels[@]}"; do [[ $each == 0 ]] || echo "--sparsity $each"; done)
for each in "${levels[@]}"; do
  # Nothing pruned: the same model twice, which has to show no difference.
  pruned="$out/models/pruned-$each"
  if [[ $each == 0 ]]; then pruned="$out/models/original"; fi
  compare "$shape-$each" "$out/models/original" "$pruned"
done
# shellcheck disable=SC2086
if [[ -n $slo && -d $out/models/pruned-0.25 ]]; then
  measure "slo-$shape-0.25" "$out/models/original" "$out/models/pruned-0.25" --engine vllm $slo $vllm_options
fi
echo "Done. Copy the results.json of $out/vllm-*, offline-*, onnx-* and slo-* into benchmarks/results/gpu/."
