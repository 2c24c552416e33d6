#!/usr/bin/env bash
# One training step of the toy in PyTorch and in ours, with the same threads, one after the other.
#
#     scripts/compare_with_torch.sh PATH/TO/torch_yuan.py PATH/TO/toy.json [THREADS]
#
# Needs a python3 with torch (PYTHON names another one).
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 TORCH_PROGRAM CONFIG.json [THREADS]" >&2
    exit 2
fi
program=$1 config=$(realpath "$2") threads=${3:-$(nproc)}
cd "$(dirname "$0")/.."
cargo bench --bench train_step --no-run
theirs() {
    "${PYTHON:-python3}" "$program" "$config" --batch 8 --seq 256 --steps 10 --threads "$threads" |
        python3 -c 'import json, sys; print(json.loads(sys.stdin.read().splitlines()[-1])["tokens_per_s"])'
}
ours() {
    YUAN_BENCH_CONFIG=$config RAYON_NUM_THREADS=$threads cargo bench --bench train_step 2>/dev/null |
        python3 -c '
import re, sys
middle = re.search(r"thrpt:\s+\[\S+ \S+ (\S+) (K?)elem/s", sys.stdin.read())
print(float(middle[1]) * (1000 if middle[2] else 1))'
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
