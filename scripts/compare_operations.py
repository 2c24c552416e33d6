"""Puts the operations of PyTorch and ours side by side: compare_operations.py THEIRS OURS."""
import json
import sys

theirs, ours = ([json.loads(line) for line in open(path) if line.startswith("{")] for path in sys.argv[1:3])
for line in theirs:
    if "ceiling" in line:
        print(f"ceiling of {line['ceiling']}: {line['value']:.0f}")
peer = {line["operation"]: line["ms"] for line in theirs if "operation" in line}
print("\n| operation | PyTorch, ms | ours, ms | ratio |\n|---|---|---|---|")
for line in ours:
    name, ms = line["operation"], line["ms"]
    if name in peer:
        print(f"| {name} | {peer[name]:.3f} | {ms:.3f} | {peer[name] / ms:.2f} |")
