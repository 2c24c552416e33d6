"""The rate of `yuan prepare` and of `tokenizers` from Python, in text per second.

    python3 scripts/measure_prepare.py TEXT TOKENIZER THREADS OUT YUAN

Python reads the same lines, in batches as large as make it fastest, until it has run as long as a
tenth of the text takes, at least 200 MB; nothing is written by it.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import time

text, tokenizer, threads, out, yuan = sys.argv[1:]
os.environ["RAYON_NUM_THREADS"] = threads
os.environ["TOKENIZERS_PARALLELISM"] = "true"
size = sum(path.stat().st_size for path in pathlib.Path(text).iterdir())

begin = time.time()
subprocess.run(
    [yuan, "-q", "prepare", text, "--tokenizer", tokenizer, "--threads", threads, "--out", out],
    check=True,
)
seconds = time.time() - begin
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
info = json.loads((pathlib.Path(out) / "dataset.json").read_text())
tokens = info["train"]["tokens"] + info["validation"]["tokens"]
print(f"yuan prepare       {size / 1e6 / seconds:6.2f} MB/s  {tokens / seconds / 1e6:5.2f} M tokens/s  "
      f"peak {peak:.0f} MB  ({size / 1e9:.2f} GB in {seconds:.0f} s)", flush=True)

from tokenizers import Tokenizer  # noqa: E402

model = Tokenizer.from_file(tokenizer)
limit = max(size / 10, 200e6)
read, tokens, begin = 0, 0, time.time()
batch, held = [], 0
for path in sorted(pathlib.Path(text).iterdir()):
    for line in open(path):
        batch.append(json.loads(line)["text"])
        held += len(line)
        if held > 8_000_000:
            tokens += sum(len(encoding.ids) for encoding in model.encode_batch_fast(batch, add_special_tokens=False))
            read, batch, held = read + held, [], 0
            if read > limit:
                break
    if read > limit:
        break
seconds_python = time.time() - begin
rate = read / 1e6 / seconds_python
print(f"tokenizers, Python {rate:6.2f} MB/s  {tokens / seconds_python / 1e6:5.2f} M tokens/s  "
      f"({read / 1e9:.2f} GB in {seconds_python:.0f} s, {threads} threads)")
print(f"ratio {size / 1e6 / seconds / rate:.2f}")
