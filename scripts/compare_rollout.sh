#!/usr/bin/env bash
# Answers drawn with the toy: eight to each of eight prompts, in this library and in `transformers` (generate, Mixtral of
# the same shape, two forms of its experts), two runs of each in turn.
#
#     scripts/compare_rollout.sh [THREADS]
#
# Needs a python3 with torch and transformers (PYTHON names another one).
set -euo pipefail
threads=${1:-$(nproc)}
cd "$(dirname "$0")/.."
export YUAN_BENCH_BATCH=8 YUAN_BENCH_ANSWERS=8 YUAN_BENCH_PROMPT=128 YUAN_BENCH_NEW=128
cargo bench --bench decode --no-run
ours() { RAYON_NUM_THREADS=$threads cargo bench --bench decode 2>/dev/null | tail -1; }
theirs() {
    "${PYTHON:-python3}" scripts/mixtral_decode.py --threads "$threads" --batch 8 --answers 8 --moe "$1" | tail -1
}
a=$(theirs grouped_mm) b=$(ours) c=$(theirs eager) d=$(theirs grouped_mm) e=$(ours) f=$(theirs eager)
python3 - "$threads" "$a" "$d" "$c" "$f" "$b" "$e" <<'PY'
import json, sys
threads, *runs = sys.argv[1], *map(json.loads, sys.argv[2:])
print(f"8 prompts of 128 tokens, 8 answers of 128 tokens each, {threads} threads, two runs each in turn, tokens/s:")
pairs = [(f"{runs[0]['peer']}, {runs[0]['experts']}", runs[0:2]), (f"{runs[2]['peer']}, {runs[2]['experts']}", runs[2:4]),
         ("this library", runs[4:6])]
means = []
for name, pair in pairs:
    speeds = [run["rollout_tokens_per_s"] for run in pair]
    means.append(sum(speeds) / 2)
    print(f"{name:52} {speeds[0]:7.0f} {speeds[1]:7.0f}")
print(f"this library over the faster peer: {means[2] / max(means[:2]):.2f}")
PY
