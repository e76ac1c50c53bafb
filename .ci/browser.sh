#!/usr/bin/env bash
# Chromium and its driver, in which the tests open our pages; installed where they are missing and apt can.
set -euo pipefail

command -v chromium >/dev/null && command -v chromedriver >/dev/null && exit 0
as_root=
if [[ $(id -u) != 0 ]]; then
    as_root=sudo
fi
if ! command -v apt-get >/dev/null || { [[ -n $as_root ]] && ! command -v sudo >/dev/null; }; then
    echo ".ci/browser.sh: install Chromium and chromedriver (Debian: apt install chromium chromium-driver)" >&2
    exit 1
fi
echo "Installing Chromium"
$as_root apt-get update -qq >/dev/null || true # an old list may do
DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null
