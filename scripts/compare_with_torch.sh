#!/usr/bin/env bash
# One training step in PyTorch and in this library on a CPU, with the same threads, two runs of each in turn.
#
#     scripts/compare_with_torch.sh [CONFIG.json] [THREADS]      # default: benches/configs/toy.json, all cores
#
# Needs a python3 with torch (PYTHON names another one). OURS names a program of `benches/train_step.rs` that is built already.
set -euo pipefail
cd "$(dirname "$0")/.."
program=benches/peers/torch_yuan.py
config=$(realpath "${1:-benches/configs/toy.json}") threads=${2:-$(nproc)}
if [ -z "${OURS:-}" ]; then cargo bench --bench train_step --no-run; fi
shape=(--batch 8 --seq 256 --steps 10)
speed() { python3 -c 'import json, sys; print(json.loads(sys.stdin.read().splitlines()[-1])["tokens_per_s"])'; }
theirs() { "${PYTHON:-python3}" "$program" "$config" "${shape[@]}" --threads "$threads" | speed; }
ours() {
    # A program outside Cargo does not know what `.cargo/config.toml` sets.
    export RAYON_NUM_THREADS=$threads MIMALLOC_PURGE_DELAY=-1
    ${OURS:-cargo bench --quiet --bench train_step --} "$config" "${shape[@]}" | speed
}
a=$(theirs) b=$(ours) c=$(theirs) d=$(ours)
python3 - "$threads" "$a" "$b" "$c" "$d" <<'PY'
import sys
threads, *runs = sys.argv[1:]
torch, ours = (float(runs[0]) + float(runs[2])) / 2, (float(runs[1]) + float(runs[3])) / 2
print(f"{threads} threads, two runs each in turn:")
print(f"PyTorch  {torch:8.0f} tokens/s   ({float(runs[0]):.0f}, {float(runs[2]):.0f})")
print(f"ours     {ours:8.0f} tokens/s   ({float(runs[1]):.0f}, {float(runs[3]):.0f})")
print(f"ratio    {ours / torch:8.2f}")
PY
