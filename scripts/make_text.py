"""Writes gigabytes of text, a document a line of JSON, made of the crates in Cargo's registry.

    python3 scripts/make_text.py DIRECTORY GIGABYTES

Every document has paragraphs of one crate in an order of its own, and some of its names changed.
"""

import json
import pathlib
import random
import re
import sys

directory, gigabytes = pathlib.Path(sys.argv[1]), float(sys.argv[2])
home = pathlib.Path.home() / ".cargo/registry/src"
files = sorted(path for path in home.glob("*/*/**/*") if path.suffix in {".rs", ".md"})
random.seed(0)
random.shuffle(files)
paragraphs, total = [], 0
for path in files:
    try:
        text = path.read_text()
    except (UnicodeDecodeError, OSError):
        continue
    paragraphs.append(text.split("\n\n"))
    total += len(text)
    if total > 400_000_000:
        break
directory.mkdir(parents=True)
word = re.compile(r"\b[a-z_]{5,}\b")
part, written, number = 0, 0, 0
out = None
while written < gigabytes * 1e9:
    if out is None or out.tell() > 250_000_000:
        out = open(directory / f"part-{part:03}.jsonl", "w")
        part += 1
    chosen = paragraphs[number % len(paragraphs)]
    chosen = random.sample(chosen, len(chosen))[:200]
    text = "\n\n".join(chosen)
    if number >= len(paragraphs):
        names = set(random.sample(sorted(set(word.findall(text))) or [""], k=1)) | set()
        salt = "_" + random.choice(["new", "old", "raw", "inner", "node", "item", "left"])
        text = word.sub(lambda m: m[0] + salt if hash((m[0], number)) % 5 == 0 or m[0] in names else m[0], text)
    number += 1
    line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
    out.write(line)
    written += len(line)
