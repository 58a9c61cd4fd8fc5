#!/usr/bin/env bash
# Prunes a model by 25 %, serves it in vLLM, and asks it to go on with a sentence.
#
#   examples/prune_and_serve.sh MODEL TEXT OUT [options of sentei prune]
#
# MODEL is a directory or a hub id; TEXT is like your users' requests (.txt or .jsonl). Needs sentei[vllm] and curl.
# PORT and SERVE_OPTIONS are for vLLM; SERVE_OPTIONS=--enforce-eager starts it faster, and then it answers more slowly.
set -euo pipefail
model=$1 text=$2 out=$3
port=${PORT:-8000}

mkdir -p "$out"
sentei prune "$model" -o "$out/pruned" --sparsity 0.25 --calibration "$text" "${@:4}"
sentei plan show "$out/pruned"
sentei export vllm "$out/pruned" -o "$out/deploy"

sentei serve "$out/deploy" -- --port "$port" --max-model-len 2048 --served-model-name pruned ${SERVE_OPTIONS:-} &
server=$!
trap 'kill $server 2> /dev/null || true; wait $server || true' EXIT
until curl --silent --fail "http://127.0.0.1:$port/health"; do
    kill -0 $server # ends this script if the server has ended
    sleep 2
done
curl --silent --fail "http://127.0.0.1:$port/v1/completions" --header 'Content-Type: application/json' \
    --data '{"model": "pruned", "prompt": "Once upon a time", "max_tokens": 16}'
