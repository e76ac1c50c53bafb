#!/usr/bin/env bash
# .ci/wheel.sh with the newest Python that the pins allow. Where none is installed, Debian's testing has it, in a small
# system of its own, made by debootstrap under the root of .ci/judges.sh and entered by chroot (as root):
# ${QUANTKIT_JUDGES:-${XDG_CACHE_HOME:-$HOME/.cache}/quantkit/judges}/debian-SUITE. What pip installs there is kept until
# the pins change; quantkit itself is built and installed anew. Where that cannot be done it is left out, with a word.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

newest=3.14
root=${QUANTKIT_JUDGES:-${XDG_CACHE_HOME:-$HOME/.cache}/quantkit/judges}
given=$("${PYTHON:-python3}" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

leave_out() {
    echo "newest: a wheel on Python $newest left out: $*" >&2
    exit 0
}

[[ $given != "$newest" ]] || leave_out "${PYTHON:-python3} is that"
if command -v "python$newest" >/dev/null && "python$newest" -c 'import ensurepip, venv' 2>/dev/null; then
    PYTHON=python$newest .ci/wheel.sh
    exit
fi
[[ $(id -u) == 0 ]] || leave_out "no python$newest here, and only root can make a system that has one"
command -v apt-get >/dev/null || leave_out "no python$newest here, and no apt-get that would bring one"
mkdir -p "$root"
if command -v flock >/dev/null; then # two runs at once: the second waits
    exec 9>"$root/newest.lock"
    flock 9
fi

# make SUITE PYTHON: a system of Debian's with that Python, unless it is there already.
make_system() {
    local home=$root/debian-$1
    [[ ! -f $home/made ]] || return 0
    if ! command -v debootstrap >/dev/null; then
        apt-get update -qq >/dev/null || true # an old list may do
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends debootstrap >/dev/null || return 1
    fi
    echo "newest: making $home (a minute or two)"
    rm -rf "$home"
    debootstrap --variant=minbase --include="python$2,python$2-venv,ca-certificates" "$1" "$home" >"$home.log" 2>&1 ||
        return 1
    touch "$home/made"
}

# wheel SUITE PYTHON: .ci/wheel.sh in that system, with this machine's names, certificates and settings of pip.
wheel() {
    local home=$root/debian-$1 file want
    for file in /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/xdg/pip /etc/ssl/certs/ca-certificates.crt; do
        [[ ! -e $file ]] || { mkdir -p "$home${file%/*}" && rm -rf "$home$file" && cp -rL "$file" "$home$file"; }
    done
    want=$(cat constraints.txt pyproject.toml .ci/newest.sh)
    if [[ ! -f $home/pins || $(<"$home/pins") != "$want" ]]; then
        rm -rf "$home/venv" "$home/pins"
    fi
    mkdir -p "$home/source"
    # Mounts of this process alone: they go when it ends.
    unshare --mount bash -euc 'mount -t proc proc "$1/proc"; mount --bind . "$1/source"
        exec chroot "$1" env -u PIP_FIND_LINKS HOME=/root PYTHON="$2" VENV=/venv /source/.ci/wheel.sh' enter "$home" "python$2"
    printf '%s\n' "$want" >"$home/pins"
}

if make_system testing "$newest"; then
    wheel testing "$newest"
elif make_system trixie 3.13; then
    echo "newest: Debian's testing has no Python $newest to be had, its release of 2025 has 3.13" >&2
    wheel trixie 3.13
else
    leave_out "debootstrap failed; what it said: $root/debian-testing.log"
fi
