#!/usr/bin/env bash
# What only a GPU can tell, in steps of at most LIMIT_S seconds (8 minutes) each, for a machine that is lent by the minute.
# Random weights of Llama-3-8B's shape; no network. Each step writes OUT/STEP.json; what is there is not done again, so the
# same command goes on after whatever ended it. A step of `prune` or `export` that did not finish leaves
# OUT/STEP.json.unfinished, which holds the stages that it did finish; `benchmark` goes on where it was.
#
#   benchmarks/gpu.sh OUT [STEP...]     without a STEP: all that are missing
#
#   prune-0.25       the default `sentei prune`: its stages' times and peak memory (OUT/prune-0.25.json)
#   shape-0.14 -0.25 the default's ranked plan without its compensation, which changes no shape: what is served below
#   rates-0.14 -0.25 output tokens per second against the original in vLLM at 1, 16 and 64 requests, both servers up
#   fp8-0.25         likewise, both rounded to fp8 by vLLM as it loads them
#   benchmark-0.25   `sentei benchmark`, which starts and stops each server itself
#   onnx-PRECISION-original, -pruned, -rates   ONNX with CUDA in bf16 and int4: both exports, verified; then their speed
#
# Needs sentei[vllm,onnx-gpu,demo] and nvidia-ml-py for the GPU's memory. The checkpoints take 43 GB at MODELS (by default
# OUT/models), the ONNX exports of one precision 29 GB more, which go when their rates are there.
#
# On a CPU, to see that it runs (two servers on a few cores hinder each other, so the rates mean nothing):
#   DEVICE=cpu VLLM_CPU_KVCACHE_SPACE=1 benchmarks/gpu.sh OUT
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh OUT [STEP...]}
shift
wanted=("$@")
limit=${LIMIT_S:-480} device=${DEVICE:-cuda} models=${MODELS:-$out/models}
read -ra python <<<"${PYTHON:-python}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [[ $device == cuda ]]; then
  shape=${SHAPE:-llama-3-8b} precisions=(bf16 int4)
  prune=(--samples 32 --seq-len 2048)
  load=(--input-len 512 --output-len 128 --load 1:4 --load 16:32 --load 64:128)
  # Each has as much KV cache as the widest load fills, and leaves the other its part of the GPU.
  vllm="--max-model-len 2048 --max-num-seqs 64 --gpu-memory-utilization 0.3 --kv-cache-memory-bytes 9000000000"
  fp8="--quantization fp8"
  chat=(--input-len 512 --output-len 128 --concurrency "1,16,64" --engine-option=--max-model-len=2048)
  one=(--input-len 512 --output-len 128)
else
  shape=${SHAPE:-small} precisions=(fp32 int4)
  prune=(--samples 4 --seq-len 128)
  load=(--input-len 32 --output-len 8 --repeats 3 --load 1:2 --load 2:4)
  vllm="--max-model-len 256 --enforce-eager"
  fp8="${FP8_OPTIONS-}" # vLLM's CPU build rounds nothing to fp8 as it loads
  chat=(--input-len 32 --output-len 8 --concurrency "1,2" --engine-option=--enforce-eager --engine-option=--max-model-len=256)
  one=(--input-len 32 --output-len 8)
fi
original=$models/original

step() { # NAME: runs it unless its JSON is there, or others were asked for
  [[ ! -f $out/$1.json ]] || return 0
  [[ ${#wanted[@]} -eq 0 || " ${wanted[*]} " == *" $1 "* ]] || return 0
  make_step "$1" || failed+=("$1")
}

need() { # DIRECTORY STEP: what a step reads, made again where a machine was lent anew
  [[ -d $models/$1 ]] || make_step "$2"
}

make_step() { # NAME
  local name=$1 sparsity precision side
  sparsity=${name##*-}
  case $name in
    model) "${python[@]}" benchmarks/random_checkpoint.py "$models" --shape "$shape" ;;
    shape-*)
      measured "$name" "$original" prune "$original" -o "$models/ranked-$sparsity" --sparsity "$sparsity" --no-compensate \
        "${prune[@]}" --device "$device" --force
      ;;
    rates-*) rates "$name" "$vllm" ;;
    fp8-*) rates "$name" "$vllm $fp8" ;;
    prune-*)
      measured "$name" "$original" prune "$original" -o "$models/compensated" --sparsity "$sparsity" "${prune[@]}" \
        --device "$device" --force && rm -rf "$models/compensated"
      ;;
    onnx-*-rates)
      precision=${name#onnx-} precision=${precision%-rates}
      for side in original pruned; do need "onnx-$precision-$side" "onnx-$precision-$side" || return 1; done
      compared "$name" "$models/onnx-$precision-original" "$models/onnx-$precision-pruned" --engine onnx \
        --device "$device" "${one[@]}" && rm -rf "$models/onnx-$precision-"*
      ;;
    onnx-*)
      precision=${name#onnx-} precision=${precision%-*}
      local source=$original
      [[ $name != *-pruned ]] || source=$models/ranked-0.25
      need ranked-0.25 shape-0.25 &&
        measured "$name" "$source" export onnx "$source" -o "$models/$name" --device "$device" \
          --precision "$precision" --force
      ;;
    benchmark-*)
      need "ranked-$sparsity" "shape-$sparsity" &&
        compared "$name" "$original" "$models/ranked-$sparsity" --engine vllm "${chat[@]}"
      ;;
    *) echo "There is no step $name." >&2 && return 2 ;;
  esac
}

limited() { # NAME COMMAND...
  echo "== $1"
  timeout --kill-after=40 "$limit" "${@:2}" || { echo "$1: not finished (exit code $?)" && return 1; }
}

measured() { # NAME MODEL_THAT_IS_READ ARGUMENTS_OF_SENTEI...
  need original model &&
    limited "$1" "${python[@]}" benchmarks/measured_command.py -o "$out/$1.json" --reads "$2" --limit-s "$((limit - 20))" -- \
      "${@:3}"
}

rates() { # NAME OPTIONS_OF_VLLM
  local pruned=ranked-${1##*-}
  need "$pruned" "shape-${1##*-}" &&
    limited "$1" "${python[@]}" benchmarks/two_servers.py "$original" "$models/$pruned" --options "$2" "${load[@]}" \
      -o "$out/$1.json"
}

compared() { # NAME ORIGINAL PRUNED OPTIONS_OF_BENCHMARK...; not watched from outside, which would take processor time
  limited "$1" "${python[@]}" -c 'from toolchain.cli.entry import main; main()' benchmark "${@:2}" --repeats 3 --resume \
    -o "$out/$1" && cp "$out/$1/results.json" "$out/$1.json"
}

mkdir -p "$out"
failed=()
for sparsity in 0.14 0.25; do
  step "shape-$sparsity"
  step "rates-$sparsity"
done
step fp8-0.25
step prune-0.25
for precision in "${precisions[@]}"; do
  if [[ ! -f $out/onnx-$precision-rates.json ]]; then
    step "onnx-$precision-original"
    step "onnx-$precision-pruned"
  fi
  step "onnx-$precision-rates"
done
step benchmark-0.25
echo "There are now: $(cd "$out" && echo *.json)"
[[ ${#failed[@]} -eq 0 ]] || { echo "Not finished: ${failed[*]}" && exit 1; }
