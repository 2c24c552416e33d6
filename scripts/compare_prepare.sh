#!/usr/bin/env bash
# The rate and the memory of `yuan prepare` beside Hugging Face's `tokenizers` called from Python, on
# the same text, with the same tokenizer and threads, one after the other.
#
#     scripts/compare_prepare.sh [GIGABYTES] [THREADS] [DIRECTORY]
#
# The text is made of the crates in Cargo's registry: paragraphs in another order and with other names
# in every document, so that no document is another one repeated. The directory keeps the text, for a
# second run.
set -euo pipefail
cd "$(dirname "$0")/.."
gigabytes=${1:-1}
threads=${2:-$(nproc)}
work=${3:-$(mktemp -d)}
python=${YUAN_PYTHON:-python3}
"$python" -c 'import tokenizers' || { echo "YUAN_PYTHON must name a Python with tokenizers"; exit 1; }
# A program that was built elsewhere, for machines without Rust.
yuan=${YUAN_PROGRAM:-target/release/yuan}
[ -n "${YUAN_PROGRAM:-}" ] || cargo build --release --quiet -p yuan-cli
mkdir -p "$work"
[ -d "$work/text-$gigabytes" ] || "$python" scripts/make_text.py "$work/text-$gigabytes" "$gigabytes"
du -sh "$work/text-$gigabytes"
rm -rf "$work/tokens" "$work/tokenizer"
# Both take a tokenizer that is there.
"$yuan" -q prepare "$work/text-$gigabytes" --sample 16 --vocab 32768 --threads "$threads" \
    --out "$work/tokenizer" &
pid=$!
until [ -f "$work/tokenizer/unfinished/tokenizer.json" ] || [ -f "$work/tokenizer/tokenizer.json" ]; do sleep 1; done
kill "$pid" 2>/dev/null || true
wait "$pid" 2>/dev/null || true
tokenizer=$work/tokenizer.json
cp "$work"/tokenizer/unfinished/tokenizer.json "$tokenizer" 2>/dev/null || cp "$work/tokenizer/tokenizer.json" "$tokenizer"
"$python" scripts/measure_prepare.py "$work/text-$gigabytes" "$tokenizer" "$threads" "$work/tokens" "$yuan"
