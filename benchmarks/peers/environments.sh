#!/usr/bin/env bash
# Builds the environments of the quantizers that benchmarks/arena.py measures beside quantkit, where .ci/judges.sh puts
# the judges': ${QUANTKIT_JUDGES:-${XDG_CACHE_HOME:-$HOME/.cache}/quantkit/judges}/NAME-VERSION/{venv,stamp}
#   benchmarks/peers/environments.sh                                                  all
#   benchmarks/peers/environments.sh auto-round|llmcompressor|gptqmodel|llama.cpp     one
# GPTQModel and llama.cpp are judges too: .ci/judges.sh and .ci/llamacpp.sh make those. A finished one is left alone, a half
# made one, or one of other pins, is removed and made again. PYTHON picks the interpreter.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ci=$here/../../.ci
root=${QUANTKIT_JUDGES:-${XDG_CACHE_HOME:-$HOME/.cache}/quantkit/judges}
PYTHON=${PYTHON:-python3}
export PYTHON

die() {
    echo "environments: $*" >&2
    exit 1
}

# build NAME: of NAME.txt, whose first pins are torch and the quantizer. torch goes in first and alone: the index decides
# between the CPU and the CUDA build, and no later install replaces it.
build() (
    pins=$here/$1.txt
    release=$(grep "^$1==" "$pins") || die "$pins does not pin $1"
    home=$root/$1-${release#*==}
    if command -v flock >/dev/null; then # two runs at once: the second waits, then finds the work done
        exec 9>"$home.lock"
        flock 9
    fi
    want=$("$PYTHON" --version; grep -v '^#' "$pins"; echo "at $home")
    if [[ -f $home/stamp && $(<"$home/stamp") == "$want" ]] && "$home/venv/bin/python" -c '' 2>/dev/null; then
        echo "environments: ready in $home"
        return
    fi
    echo "environments: making $home (some minutes)"
    rm -rf "$home"
    mkdir -p "$home"
    "$PYTHON" -m venv "$home/venv"
    pip=("$home/venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps)
    "${pip[@]}" "$(grep '^torch==' "$pins")"
    "${pip[@]}" --requirement <(grep -v -e '^#' -e '^torch==' "$pins")
    "$home/venv/bin/python" -c "import ${1//-/_}" >"$home/import.log" 2>&1 ||
        { tail -n 20 "$home/import.log" >&2; die "$1 does not import; the whole of it: $home/import.log"; }
    printf '%s\n' "$want" >"$home/stamp"
    echo "environments: ready in $home"
)

command -v "$PYTHON" >/dev/null || die "no $PYTHON here; install Python 3.11, or name one: PYTHON=/path/to/python3.11"
mkdir -p "$root"
root=$(cd "$root" && pwd)
[[ $# -gt 0 ]] || set -- auto-round llmcompressor gptqmodel llama.cpp
for peer in "$@"; do
    case $peer in
    auto-round | llmcompressor) build "$peer" ;;
    gptqmodel) "$ci/judges.sh" gptqmodel ;;
    llama.cpp) "$ci/llamacpp.sh" ;;
    *) die "no peer $peer; there are auto-round, llmcompressor, gptqmodel and llama.cpp" ;;
    esac
done
