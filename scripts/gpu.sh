#!/usr/bin/env bash
# Tests and runs on a machine with a GPU that has no Rust and no network: build here, carry, run there.
#
#     scripts/gpu.sh pack            # builds with the feature `cuda` and packs programs and text into target/gpu
#     scripts/gpu.sh test            # there, in a copy of the repository with target/gpu: the suite on CUDA
#     scripts/gpu.sh EXAMPLE ARGS…   # there: an example, for instance `pretrain --device cuda --data target/gpu/text`
#
# Building needs LLVM, which Burn's build downloads by itself.
set -euo pipefail
cd "$(dirname "$0")/.."
pack=target/gpu
tests=(parity ops)
examples=(pretrain ablation)

pack() {
    rm -rf "$pack" && mkdir -p "$pack"
    cargo build --release --workspace --features yuan/cuda,yuan-model/cuda --examples
    cargo test --release --workspace --features yuan/cuda,yuan-model/cuda --no-run \
        --message-format=json $(printf -- '--test %s ' "${tests[@]}") |
        python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["kind"] == ["test"]:
        print(message["target"]["name"], message["executable"])' |
        while read -r name file; do cp "$file" "$pack/test-$name"; done
    for name in "${examples[@]}"; do cp "target/release/examples/$name" "$pack/"; done
    strip "$pack"/*
    # The programs share most of their code: in one archive it is there once.
    tar -C "$pack" -cf - . | xz --lzma2=preset=1,dict=256MiB >"$pack.txz"
    rm -rf "$pack" && mkdir "$pack" && mv "$pack.txz" "$pack/programs.txz"
    # Text to learn: a tenth of the sources that this was built from, some 30 MB.
    find "${CARGO_HOME:-$HOME/.cargo}/registry/src" \( -name '*.rs' -o -name '*.md' \) -size -200k |
        sort | awk 'NR % 10 == 0' | tar -cJf "$pack/text.txz" --transform 's|.*/registry/src/[^/]*/||' -T -
    du -sh "$pack"
}

prepare() {
    # The runtime compiler and libraries of CUDA, wherever this machine has them.
    for folder in /usr/local/cuda*/lib64 /usr/local/cuda*/targets/*/lib /usr/local/nvidia/lib64 \
        $(find / -type d -path '*nvidia/*/lib' -not -path '/proc/*' 2>/dev/null); do
        [ -d "$folder" ] && LD_LIBRARY_PATH="$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    done
    export LD_LIBRARY_PATH
    if [ ! -d "$pack/text" ]; then
        tar -xJf "$pack/programs.txz" -C "$pack"
        mkdir "$pack/text" && tar -xJf "$pack/text.txz" -C "$pack/text"
    fi
}

case "${1:-}" in
pack) pack ;;
test)
    prepare
    export YUAN_REFERENCE="$PWD/yuan-model/tests/fixtures"
    failed=0
    for name in "${tests[@]}"; do
        # Operations are compared with the CPU; everything else with upstream's numbers.
        [ "$name" = ops ] && devices=flex,cuda || devices=cuda
        echo "== $name on $devices"
        YUAN_DEVICE=$devices "$pack/test-$name" --test-threads 1 || failed=1
    done
    exit $failed
    ;;
"") sed -n '2,8p' "$0" >&2 && exit 2 ;;
*)
    prepare
    program=$1 && shift
    exec "$pack/$program" "$@"
    ;;
esac
