#!/usr/bin/env bash
# Quantize a model and compare it with its source, through the command line.
#   examples/quantize_and_evaluate.sh MODEL OUT
# A few short calibration windows keep the example quick; leave --samples and --seq-len away for a checkpoint to publish.
set -euo pipefail

model=${1:?usage: $0 MODEL OUT}
out=${2:?usage: $0 MODEL OUT}

quantkit samples "$model" --samples 8 --seq-len 128 --show 1
quantkit gptq "$model" --out "$out" --bits 4 --group-size 32 --samples 8 --seq-len 128 --no-eval
quantkit inspect "$out"
quantkit perplexity "$out" --against "$model" --seq-len 128 --json
