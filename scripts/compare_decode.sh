#!/usr/bin/env bash
# Greedy decoding of the toy with a cache, ours and Hugging Face's Mixtral of the same shape, in turn.
#
#     scripts/compare_decode.sh [THREADS]
#
# Needs a python3 with torch and transformers (PYTHON names another one).
set -euo pipefail
threads=${1:-$(nproc)}
cd "$(dirname "$0")/.."
cargo bench --bench decode --no-run
ours() { RAYON_NUM_THREADS=$threads cargo bench --bench decode 2>/dev/null | tail -1; }
theirs() { "${PYTHON:-python3}" scripts/mixtral_decode.py --threads "$threads" "$@" | tail -1; }
a=$(theirs) b=$(ours) c=$(theirs --compile) d=$(theirs) e=$(ours) f=$(theirs --compile)
python3 - "$threads" "$a" "$d" "$c" "$f" "$b" "$e" <<'PY'
import json, sys
threads, *runs = sys.argv[1], *map(json.loads, sys.argv[2:])
print(f"batch 1, 128 tokens read, 128 generated, {threads} threads, two runs each in turn, tokens/s:")
print(f"{'':40}   reading            decoding")
pairs = [(runs[0]["peer"], runs[0:2]), (runs[2]["peer"] + ", compiled", runs[2:4]), ("ours", runs[4:6])]
means = []
for name, pair in pairs:
    read, decode = ([run[key] for run in pair] for key in ("prompt_tokens_per_s", "decode_tokens_per_s"))
    means.append(sum(decode) / 2)
    print(f"{name:40} {read[0]:6.0f} {read[1]:6.0f}  {decode[0]:8.0f} {decode[1]:6.0f}")
print(f"decoding, ours over theirs: {means[2] / means[0]:.2f}, over compiled: {means[2] / means[1]:.2f}")
PY
