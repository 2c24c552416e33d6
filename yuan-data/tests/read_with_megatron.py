"""Prints the documents of a token file as megatron-core's own reader finds them, as JSON.

Reading takes neither PyTorch nor the rest of megatron-core, which only NumPy is installed beside:
what is imported and not needed is replaced by empty names.
"""

import importlib.util
import json
import pathlib
import sys
import types


class Anything(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


for name in [
    "torch",
    "torch.utils",
    "torch.utils.data",
    "torch.distributed",
    "megatron.core.utils",
    "megatron.core.msc_utils",
    "megatron.core.datasets.object_storage_utils",
]:
    sys.modules[name] = Anything(name)
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, sys.modules[name])
root = pathlib.Path(importlib.util.find_spec("megatron").submodule_search_locations[0]) / "core"
for name, path in [("megatron.core", root), ("megatron.core.datasets", root / "datasets")]:
    package = types.ModuleType(name)
    package.__path__ = [str(path)]
    sys.modules[name] = package

from megatron.core.datasets import indexed_dataset as megatron  # noqa: E402

megatron.log_single_rank = lambda *_: None
megatron.is_object_storage_path = lambda _: False
megatron.MultiStorageClientFeature = types.SimpleNamespace(is_enabled=lambda: False)

data = megatron.IndexedDataset(sys.argv[1])
bounds = [int(bound) for bound in data.document_indices]
documents = [[data[i].tolist() for i in range(*pair)] for pair in zip(bounds, bounds[1:])]
print(json.dumps(documents))
