"""Writes gigabytes of text, a document a line of JSON, made of the crates in Cargo's registry.

    python3 scripts/make_text.py DIRECTORY GIGABYTES [PROCESSES]

Every document has paragraphs of one crate in an order of its own, and some of its names changed.
YUAN_SOURCES names another directory of sources than the registry.
"""

import json
import multiprocessing
import os
import pathlib
import random
import re
import sys

# Size of a file.
PART = 250_000_000
WORD = re.compile(r"\b[a-z_]{5,}\b")


def read_paragraphs():
    """Paragraphs of some 400 MB of sources, a list for each file."""
    home = pathlib.Path(os.environ.get("YUAN_SOURCES", pathlib.Path.home() / ".cargo/registry/src"))
    files = sorted(path for path in home.glob("**/*") if path.suffix in {".rs", ".md"})
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
    return paragraphs


def changed(text, draw):
    """The text with about a fifth of its names changed."""
    salt = "_" + draw.choice(["new", "old", "raw", "inner", "node", "item", "left"])
    known = {}

    def rename(match):
        word = match[0]
        if word not in known:
            known[word] = word + salt if draw.random() < 0.2 else word
        return known[word]

    return WORD.sub(rename, text)


def write_part(job):
    """One file, whose number decides every byte of it."""
    directory, part, size = job
    draw = random.Random(part)
    with open(directory / f"part-{part:03}.jsonl", "w") as out:
        written = 0
        while written < size:
            chosen = draw.choice(PARAGRAPHS)
            text = changed("\n\n".join(draw.sample(chosen, len(chosen))[:200]), draw)
            written += out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    directory, gigabytes = pathlib.Path(sys.argv[1]), float(sys.argv[2])
    processes = int(sys.argv[3]) if len(sys.argv) > 3 else os.cpu_count()
    directory.mkdir(parents=True)
    PARAGRAPHS = read_paragraphs()
    left = int(gigabytes * 1e9)
    sizes = [PART] * (left // PART) + ([left % PART] if left % PART else [])
    jobs = [(directory, part, size) for part, size in enumerate(sizes)]
    # Forked processes share what was read.
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        pool.map(write_part, jobs, chunksize=1)
