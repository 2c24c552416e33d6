#!/usr/bin/env bash
# Tests and runs on a machine with a GPU that has no Rust and no network: build here, carry the
# programs, run them there.
#
#     scripts/gpu.sh pack [ranks]
#         builds with the feature `cuda` and packs programs and text into target/gpu: those for one
#         GPU, or with `ranks` those for several, since all together may be too much to carry
#     scripts/gpu.sh test
#         there, in a copy of the repository with target/gpu: the suite on CUDA
#     scripts/gpu.sh bench CONFIG ARGS…
#         there: training steps of a configuration, PyTorch's and this library's in turn
#     scripts/gpu.sh ranks CONFIG
#         on a machine with several GPUs: the tests of ranks, then steps on one GPU and on all of them
#     scripts/gpu.sh scale CONFIG
#         there: steps with other numbers of tokens, experts and layers
#     scripts/gpu.sh yuan ARGS…
#         there: the program, for instance `yuan pretrain --device cuda --data target/gpu/text`
#
# Building needs LLVM 22: scripts/llvm-for-cuda.sh installs it where the build cannot download its own.
set -euo pipefail
cd "$(dirname "$0")/.."
pack=target/gpu
tests=(on_gpu train_on_gpu)
benches=(train_step operations tower)
if [ "${1:-}" = pack ] && [ "${2:-}" = ranks ]; then
    tests=(ranks)
    benches=(train_step)
fi
programs=(yuan)
features=(--workspace --features cuda)

# `name executable` of what cargo built.
executables() {
    python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable"):
        print(message["target"]["name"], message["executable"])'
}

pack() {
    rm -rf "$pack" && mkdir -p "$pack"
    cargo build --release "${features[@]}" --bin yuan
    cargo test --release "${features[@]}" --no-run --message-format=json $(printf -- '--test %s ' "${tests[@]}") |
        executables | while read -r name file; do cp "$file" "$pack/test-$name"; done
    cargo bench "${features[@]}" --no-run --message-format=json \
        $(printf -- '--bench %s ' "${benches[@]}") |
        executables | while read -r name file; do cp "$file" "$pack/bench-$name"; done
    for name in "${programs[@]}"; do cp "target/release/$name" "$pack/"; done
    strip "$pack"/*
    # The programs share most of their code: in one archive it is there once.
    tar -C "$pack" -cf - . | xz -T1 --lzma2=preset=5,dict=512MiB >"$pack.txz"
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

# Every test in a process of its own, many side by side: most of their time goes to compiling kernels.
suite() {
    prepare
    export pack YUAN_FIXTURES="$PWD/yuan-model/tests/fixtures"
    one() {
        local log start=$SECONDS rc=0
        log=$(mktemp)
        YUAN_DEVICE=$2 timeout 300 "$pack/test-$1" --exact "$3" >"$log" 2>&1 || rc=$?
        echo "$([ $rc = 0 ] && echo ok || echo "FAILED ($rc)") $((SECONDS - start))s $1 $3"
        [ $rc = 0 ] || tail -20 "$log" | cut -c1-400
    }
    export -f one
    list() { "$pack/test-$1" --list 2>/dev/null | sed -n 's/: test$//p'; }
    {
        # Operations are compared with those of the CPU.
        list on_gpu | sed 's/^ops::/flex,cuda &/; t; s/^/cuda /' | sed 's/^/on_gpu /'
        list train_on_gpu | sed 's/^/train_on_gpu cuda /'
    } | xargs -P 12 -L 1 bash -c 'one "$@"' one | tee "$pack/suite.log"
    echo "$(grep -c '^ok ' "$pack/suite.log") ok, $(grep -c '^FAILED' "$pack/suite.log") failed"
    ! grep -q '^FAILED' "$pack/suite.log"
}

bench() {
    prepare
    local config=$1 compile
    shift
    python3 scripts/torch_operations.py >"$pack/theirs"
    "$pack/bench-operations" --device cuda --precision bf16 --large >"$pack/ours"
    python3 scripts/compare_operations.py "$pack/theirs" "$pack/ours"
    "$pack/bench-tower" --device cuda --precision bf16 --tiles 32
    for compile in "" --compile; do
        python3 benches/peers/torch_tower.py --device cuda --precision bf16 --tiles 32 $compile
        python3 benches/peers/torch_yuan.py "$config" --device cuda --batch 8 --seq 2048 --steps 10 $compile
        "$pack/bench-train_step" "$config" --device cuda --batch 8 --seq 2048 --precision bf16 "$@"
    done
}

# The names of the first so many.
gpus() { seq -s, -f 'cuda:%g' 0 $(($1 - 1)); }

# Weak scaling, 16 rows a GPU, beside PyTorch's; unequal loads as they are, pruned, and rearranged.
ranks() {
    prepare
    local config=$1 count data devices library row
    local options=(--seq 2048 --precision bf16 --warmup 5)
    count=$(nvidia-smi -L | wc -l) devices=$(gpus "$(nvidia-smi -L | wc -l)")
    export NCCL_NVLS_ENABLE=0
    # NCCL is looked for under its name without a version.
    mkdir -p "$pack/nccl"
    library=$(find / -name 'libnccl.so.2*' -not -path '/proc/*' 2>/dev/null | head -1)
    ln -sf "$library" "$pack/nccl/libnccl.so"
    export LD_LIBRARY_PATH="$PWD/$pack/nccl:$LD_LIBRARY_PATH"
    YUAN_DEVICE=$devices timeout 200 "$pack/test-ranks" --test-threads 1 2>&1 | tail -15 || true
    launch() { timeout 150 python3 -m torch.distributed.run --nproc_per_node "$count" "$@" || true; }
    "$pack/bench-train_step" "$config" --device cuda:0 --batch 16 "${options[@]}" --skew 2 --prune 0.19
    "$pack/bench-train_step" "$config" --device cuda:0 --batch 16 "${options[@]}"
    for ((data = 1; data <= count; data *= 2)); do
        launch --no-python "$pack/bench-train_step" "$config" --device "$devices" \
            --data-parallel "$data" --batch $((16 * count)) "${options[@]}"
    done
    launch --no-python "$pack/bench-train_step" "$config" --device "$devices" \
        --batch $((16 * count)) "${options[@]}" --skew 2 --prune 0.19
    for row in "$count" 1; do
        launch benches/peers/torch_yuan_ep.py "$config" --ep "$row" --batch 16 --seq 2048 --steps 8 \
            --compile
    done
}

# The configuration with one number changed at a time.
scale() {
    prepare
    local config=$1 change rows
    step() {
        timeout 60 "$pack/bench-train_step" "$@" --device cuda --seq 2048 --precision bf16 --steps 5 |
            python3 -c 'import json, sys; line = json.loads(sys.stdin.readline()); print({key: line[key] for key in ("total_params", "tokens_per_step", "median_step_s", "tokens_per_s", "device_gib")})'
    }
    for rows in 2 4 8 16; do echo "== rows $rows" && step "$config" --batch $rows || true; done
    for change in moe_num_experts=8 moe_num_experts=16 moe_num_experts=48 num_hidden_layers=3 num_hidden_layers=6; do
        echo "== $change"
        python3 -c '
import json, sys
config, (key, value) = json.load(open(sys.argv[1])), sys.argv[2].split("=")
(config["moe_config"] if key in config["moe_config"] else config)[key] = int(value)
json.dump(config, open(sys.argv[3], "w"))' "$config" "$change" "$pack/changed.json"
        step "$pack/changed.json" --batch 8 || true
    done
}

case "${1:-}" in
ranks) ranks "$2" ;;
scale) scale "$2" ;;
pack) pack ;;
test) suite ;;
bench) bench "${@:2}" ;;
"") sed -n '2,13p' "$0" >&2 && exit 2 ;;
*)
    prepare
    program=$1 && shift
    exec "$pack/$program" "$@"
    ;;
esac
