#!/usr/bin/env bash
# Prunes a model by 25 % for a machine without a GPU, and measures it in ONNX Runtime against the original, both in int8.
#
#   examples/onnx_on_a_cpu.sh MODEL TEXT OUT [options of sentei prune]
#
# MODEL is a directory or a hub id; TEXT is like your users' requests (.txt or .jsonl). Needs sentei[onnx,demo].
# PRECISION=int4 or fp32 takes another than int8.
set -euo pipefail
model=$1 text=$2 out=$3
precision=${PRECISION:-int8}

mkdir -p "$out"
sentei prune "$model" -o "$out/pruned" --sparsity 0.25 --calibration "$text" "${@:4}"
sentei export onnx "$model" -o "$out/original-onnx" --precision "$precision"
sentei export onnx "$out/pruned" -o "$out/pruned-onnx" --precision "$precision"

sentei benchmark "$out/original-onnx" "$out/pruned-onnx" --engine onnx -o "$out/benchmark" \
    --input-len 64 --output-len 32 --repeats 4
sentei report "$out/pruned" "$out/pruned-onnx" "$out/benchmark" -o "$out/report.html"

sentei generate "$out/pruned-onnx" --prompt 'Once upon a time' --max-new-tokens 16
