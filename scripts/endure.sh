#!/usr/bin/env bash
# 250 kills, 150 warnings of a scheduler and 50 starts together over all kinds of runs: minutes of
# what `cargo test` does in seconds. Moments are drawn from YUAN_SEED.
#
#     scripts/endure.sh        25 interruptions for each kind of run and signal
#     scripts/endure.sh 100
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_PROFILE_DEV_DEBUG=false CARGO_INCREMENTAL=0
YUAN_INTERRUPTIONS=${1:-25} cargo test --workspace --features wgpu --test kill
