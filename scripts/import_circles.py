#!/usr/bin/env python3
"""Finds files of one crate that import each other, directly or around a circle.

    python3 scripts/import_circles.py        # status 1 and the circles, if there are any

An import is what a `use` names, followed through what `lib.rs` exports to the file that defines it.
Tests within a file do not count, nor do declarations of modules and names that are only handed on. The operations of
`yuan-model/src/ops` are one unit: a trait whose default bodies stand beside the functions that call it.
"""

import pathlib
import re
import sys

CRATES = ["src", "yuan-laep/src", "yuan-model/src", "yuan-train/src", "yuan-report/src", "yuan-cli/src"]
ONE_UNIT = "yuan-model/src/ops"


def expand(tree):
    """`a::{b, c::{d, e}}` as `a::b`, `a::c::d`, `a::c::e`."""
    tree = tree.strip()
    brace = tree.find("{")
    if brace < 0:
        return [tree.split(" as ")[0].strip()] if tree else []
    prefix, inner, depth, part, parts = tree[:brace], tree[brace + 1 : tree.rfind("}")], 0, "", []
    for char in inner:
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += char
    return [prefix + path for part in parts + [part] for path in expand(part)]


def uses(text):
    text = re.sub(r"//[^\n]*", "", text.split("#[cfg(test)]\nmod ")[0])
    statement = r"^[ \t]*(pub(?:\([a-z]+\))? )?use ([^;]+);"
    body = re.sub(r"^(pub(\([a-z]+\))? )?mod \w+;", "", re.sub(statement, "", text, flags=re.M), flags=re.M)
    for public, tree in re.findall(statement, text, re.M):
        for path in expand(re.sub(r"\s+", " ", tree)):
            # What is only handed on is no import.
            if not public or re.search(rf"\b{re.escape(path.split('::')[-1])}\b", body):
                yield path


def exports(text):
    for tree in re.findall(r"^[ \t]*pub use ([^;]+);", text, re.M):
        yield from expand(re.sub(r"\s+", " ", tree))


def module_of(root, path):
    parts = list(path.relative_to(root).with_suffix("").parts)
    return tuple(parts if parts not in (["lib"], ["main"]) else [])


def circles(root):
    files = {module_of(root, path): path for path in root.rglob("*.rs")}
    texts = {module: path.read_text() for module, path in files.items()}
    # What the root exports, by name.
    exported = {}
    for path in exports(texts[()]):
        parts = tuple(path.removeprefix("crate::").removeprefix("self::").split("::"))
        for length in range(len(parts), 0, -1):
            if parts[:length] in files:
                exported[parts[-1]] = parts[:length]
                break

    def target(module, path):
        parts = path.split("::")
        if parts[0] == "crate":
            parts = parts[1:]
        elif parts[0] in ("super", "self"):
            base = list(module)
            while parts and parts[0] == "super":
                base, parts = base[:-1], parts[1:]
            parts = base + [part for part in parts if part != "self"]
        elif module + (parts[0],) in files:
            parts = list(module) + parts
        else:
            return None
        for length in range(len(parts), 0, -1):
            if tuple(parts[:length]) in files:
                return tuple(parts[:length])
        return exported.get(parts[0]) if parts else None

    imports = {module: set() for module in files}
    for module, text in texts.items():
        if module == ():
            continue
        for path in uses(text):
            found = target(module, path)
            inside = [str(files[m].with_suffix("")).startswith(ONE_UNIT) for m in (module, found) if m]
            if found not in (None, module) and not all(inside):
                imports[module].add(found)

    # Tarjan's strongly connected components.
    index, low, stack, found = {}, {}, [], []

    def visit(module):
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(imports[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            component = []
            while not component or component[-1] != module:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(str(files[m]) for m in component))

    for module in sorted(files):
        if module not in index:
            visit(module)
    return found


def main():
    found = [circle for crate in CRATES for circle in circles(pathlib.Path(crate))]
    for circle in found:
        print("import each other:", ", ".join(circle))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
