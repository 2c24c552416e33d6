#!/usr/bin/env bash
# Searches every reader of untrusted files by coverage, for some seconds each, with an address
# sanitizer and a limit on memory.
#
#     scripts/fuzz.sh            ten minutes for each
#     scripts/fuzz.sh 60 plan    one minute for one
#
# What it finds lies in fuzz/artifacts; a file that fails belongs into tests/corpus, which
# `cargo test` tries every time, and so do the inputs by which the search went furthest
# (tests/corpus/KIND/found.gz). `cargo fuzz` asks for an unstable compiler; the stable one takes its
# flags, too, when it is told to.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-600}
targets=("${@:2}")
[ ${#targets[@]} -gt 0 ] || targets=($(ls fuzz/fuzz_targets | sed 's/\.rs$//'))
command -v cargo-fuzz >/dev/null || cargo install cargo-fuzz --locked
export RUSTC_BOOTSTRAP=1
for target in "${targets[@]}"; do
    kind=${target//_/-}
    mkdir -p "tests/corpus/$kind"
    python3 scripts/corpus.py unpack "fuzz/corpus/$target" "$kind"
    echo "== $target"
    cargo fuzz run --dev "$target" "fuzz/corpus/$target" "tests/corpus/$kind" -- \
        -max_total_time="$seconds" -rss_limit_mb=4096 -malloc_limit_mb=1024 -timeout=20 -max_len=65536 \
        -print_final_stats=1 2>&1 | grep -E '^(==|stat::|SUMMARY|#|artifact|.*panicked)' | tail -12
    python3 scripts/corpus.py pack "fuzz/corpus/$target" "$kind"
done
