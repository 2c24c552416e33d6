"""Keeps what fuzzing found in one file for each kind of input, `tests/corpus/KIND/found.gz`, which
`tests/fuzz` tries every time; a directory of thousands of tiny files would serve nobody.

    python3 scripts/corpus.py pack DIRECTORY KIND      the files of DIRECTORY, into found.gz
    python3 scripts/corpus.py unpack DIRECTORY KIND    and back

The file is, gzipped, for every input its length (32 bits, little-endian) and its bytes.
"""

import gzip
import hashlib
import pathlib
import struct
import sys

# Of larger ones the smaller tell as much, in less time.
LONGEST, MOST = 16 << 10, 400

action, directory, kind = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
path = pathlib.Path(__file__).parent.parent / "tests/corpus" / kind / "found.gz"
if action == "unpack":
    directory.mkdir(parents=True, exist_ok=True)
    data = gzip.decompress(path.read_bytes()) if path.exists() else b""
    while data:
        (length,) = struct.unpack_from("<I", data)
        found, data = data[4 : 4 + length], data[4 + length :]
        (directory / hashlib.sha1(found).hexdigest()).write_bytes(found)
else:
    inputs = {file.read_bytes() for file in directory.iterdir()}
    inputs = sorted((found for found in inputs if len(found) <= LONGEST), key=lambda x: (len(x), x))
    # Of all lengths.
    step = max(1, -(-len(inputs) // MOST))
    inputs = inputs[::step]
    data = b"".join(struct.pack("<I", len(found)) + found for found in inputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0))
    print(f"{kind}: {len(inputs)} inputs, {path.stat().st_size} bytes")
