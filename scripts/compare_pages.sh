#!/usr/bin/env bash
# Pages a second and a multimodal training step, in Pillow and PyTorch and in this library, with the same threads, two
# runs of each in turn.
#
#     scripts/compare_pages.sh [THREADS]      # default: all cores
#
# Needs a python3 with torch, pillow and numpy (PYTHON names another one).
set -euo pipefail
cd "$(dirname "$0")/.."
threads=${1:-$(nproc)} pages=${TMPDIR:-/tmp}/yuan-pages
cargo bench --bench pages --no-run
export RAYON_NUM_THREADS=$threads
ours() { cargo bench --quiet --bench pages -- "$pages"; }
theirs() {
    "${PYTHON:-python3}" benches/peers/torch_pages.py benches/configs/toy.json "$pages" --threads "$threads"
}
a=$(ours) b=$(theirs) c=$(ours) d=$(theirs)
python3 - "$threads" "$a" "$b" "$c" "$d" <<'PY'
import json, sys
threads, *runs = sys.argv[1:]
runs = [json.loads(run.splitlines()[-1]) for run in runs]
assert len({run["tiles"] for run in runs}) == 1, "the same tiles"
print(f"{threads} threads, two runs each in turn:")
for key, unit in (("pages_per_s", "pages/s"), ("tokens_per_s", "tokens/s")):
    ours, theirs = ([run[key] for run in runs[first::2]] for first in (0, 1))
    mean = lambda values: sum(values) / len(values)
    print(f"{unit:9} this library {mean(ours):8.1f} ({ours[0]:.1f}, {ours[1]:.1f})  Pillow and PyTorch {mean(theirs):8.1f} "
          f"({theirs[0]:.1f}, {theirs[1]:.1f})  ratio {mean(ours) / mean(theirs):.2f}")
PY
