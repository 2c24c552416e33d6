#!/usr/bin/env bash
# Some 200 kills, 150 warnings of a scheduler and 60 starts together over all kinds of runs: minutes
# of what `cargo test` does in seconds. CI runs it once a week.
set -euo pipefail
cd "$(dirname "$0")/.."
YUAN_INTERRUPTIONS=${1:-25} cargo test --workspace --features wgpu,remote --test kill -- --nocapture
