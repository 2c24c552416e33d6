#!/usr/bin/env bash
# Lets Burn's `cuda` feature build on a machine that cannot download the LLVM
# bundle which `tracel-llvm-bundler` normally fetches: it puts Debian's LLVM 22
# where the bundler looks. Everybody else needs nothing: the bundle downloads
# itself. Seen working with Burn 0.22.1 / CubeCL 0.11.3 on Debian 12.
set -euo pipefail

version=23.1.0-4 # must equal the tracel-llvm-bundler version in Cargo.lock
prefix="${XDG_DATA_HOME:-$HOME/.local/share}/tracel/tracel-llvm-$version"

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq llvm-22-dev libz3-dev libxml2-dev libzstd-dev zlib1g-dev libpolly-22-dev >/dev/null

mkdir -p "$prefix/bin"
cat >"$prefix/bin/llvm-config" <<'SH'
#!/bin/sh
case "$*" in
  *--system-libs*) echo "-lrt -ldl -lm -lz -lzstd -lxml2 -lz3" ;;
  *) exec /usr/lib/llvm-22/bin/llvm-config "$@" ;;
esac
SH
chmod +x "$prefix/bin/llvm-config"
touch "$prefix/.tracel-llvm-installed"
echo "LLVM 22 stands in at $prefix"
