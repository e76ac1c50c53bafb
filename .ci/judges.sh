#!/usr/bin/env bash
# Builds the environment of GPTQModel, the reader and quantizer that quantkit's files are judged by, outside the checkout:
#   ${QUANTKIT_JUDGES:-${XDG_CACHE_HOME:-$HOME/.cache}/quantkit/judges}/gptqmodel-7.7.0/{venv,kernels,stamp}
# A finished one is left alone. One that is half made, or made from other pins, is removed and made again: the stamp is
# written last and holds what decided the build. PYTHON picks the interpreter.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
pins=$here/judges-gptqmodel.txt
python=${PYTHON:-python3}
root=${QUANTKIT_JUDGES:-${XDG_CACHE_HOME:-$HOME/.cache}/quantkit/judges}

die() {
    echo "judges: $*" >&2
    exit 1
}

pin() {
    grep "^$1==" "$pins" || die "$pins does not pin $1"
}

command -v "$python" >/dev/null || die "no $python here; install Python 3.11, or name one: PYTHON=/path/to/python3.11"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[[ $version == 3.1[1-4] ]] || die "$python is Python $version; the pins are for 3.11 to 3.14: PYTHON=python3.11"

mkdir -p "$root"
root=$(cd "$root" && pwd) # a virtual environment holds its own path, so the path belongs to the stamp
release=$(pin gptqmodel)
home=$root/gptqmodel-${release#*==}

if command -v flock >/dev/null; then # two runs at once: the second waits, then finds the work done
    exec 9>"$home.lock"
    flock 9
fi

want=$(
    "$python" -c 'import hashlib, sys
for name in sys.argv[1:]: print(hashlib.sha256(open(name, "rb").read()).hexdigest())' "$pins" "$here/judges.sh"
    echo "python $version"
    echo "at $home"
)
if [[ -f $home/stamp && $(<"$home/stamp") == "$want" ]] && "$home/venv/bin/python" -c '' 2>/dev/null; then
    echo "judges: ready in $home"
    exit 0
fi

# PyPcre has no wheels and GPTQModel compiles its CPU kernels when they are first used.
missing=
command -v gcc >/dev/null || missing+=" gcc"
command -v g++ >/dev/null || missing+=" g++"
"$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")))' || missing+=" Python.h"
[[ -z $missing ]] || die "missing:$missing. Needed to compile GPTQModel's kernels (Debian: apt install build-essential python$version-dev)"

echo "judges: making $home (some minutes)"
rm -rf "$home"
mkdir -p "$home/kernels"
"$python" -m venv "$home/venv"

pip=("$home/venv/bin/python" -m pip --disable-pip-version-check install --quiet)
rest=$home/pins-without-torch-and-gptqmodel.txt
grep -v -e '^torch==' -e '^gptqmodel==' "$pins" >"$rest"

# torch with what it needs, so that a CUDA build gets its libraries; then every other pin as it stands; GPTQModel last,
# built with the setuptools and the torch of this environment.
"${pip[@]}" --constraint "$pins" "$(pin torch)" "$(pin setuptools)" "$(pin wheel)" "$(pin ninja)" "$(pin packaging)"
"${pip[@]}" --no-deps --requirement "$rest"
"${pip[@]}" --no-deps --no-build-isolation "$release"

echo "judges: trying it"
env GPTQMODEL_TORCH_EXTENSIONS_DIR="$home/kernels" GPTQMODEL_CPU_WORKERS=2 CUDA_VISIBLE_DEVICES= \
    "$home/venv/bin/python" -c 'import gptqmodel, optimum.gptq, transformers' >"$home/import.log" 2>&1 ||
    { tail -n 20 "$home/import.log" >&2; die "GPTQModel does not import; the whole of it: $home/import.log"; }
printf '%s\n' "$want" >"$home/stamp"
echo "judges: ready in $home"
