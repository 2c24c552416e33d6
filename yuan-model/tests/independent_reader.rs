//! What we save, read by Python's `safetensors`. `YUAN_PYTHON` names the interpreter, which must
//! then have it, as in CI; without the variable the test runs where `python3` happens to have it.

mod support;

use std::{fs, path::Path, process::Command};

use burn::tensor::{Device, FloatDType};
use tempfile::TempDir;
use yuan_model::hf::{HfCheckpoint, LoadOptions, SaveOptions};

/// Reads both directories with the library of the format's authors and compares every tensor.
const COMPARE: &str = r#"
import glob, json, os, sys
import numpy
from safetensors import safe_open

def tensors(directory):
    index = os.path.join(directory, "model.safetensors.index.json")
    if os.path.exists(index):
        names = json.load(open(index))["weight_map"]
    else:
        names = None
    found = {}
    for path in sorted(glob.glob(os.path.join(directory, "model*.safetensors"))):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():
                assert names is None or names[name] == os.path.basename(path), name
                assert name not in found, name
                found[name] = file.get_tensor(name)
    assert names is None or set(names) == set(found)
    return found

expected, ours = tensors(sys.argv[1]), tensors(sys.argv[2])
half = sys.argv[3] == "f16"
assert set(expected) == set(ours), set(expected) ^ set(ours)
for name, tensor in expected.items():
    tensor = tensor.astype(numpy.float16) if half else tensor
    assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
    assert numpy.array_equal(ours[name], tensor), name
print(len(ours), "tensors agree")
"#;

#[test]
fn python_reads_what_we_write() {
    let Some(python) = python() else {
        eprintln!("not run: YUAN_PYTHON names no interpreter with numpy and safetensors");
        return;
    };
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let temp = TempDir::new().unwrap();
    let script = temp.path().join("compare.py");
    fs::write(&script, COMPARE).unwrap();
    let seeing = support::multimodal::multimodal(&temp);
    let text = ["flash_tiny", "ultra_tiny", "ultra_tiny/sharded"].map(|name| fixtures.join(name));
    for (number, from) in text.into_iter().chain([seeing]).enumerate() {
        for (dtype, type_name) in [(None, "f32"), (Some(FloatDType::F16), "f16")] {
            for shard_size in [u64::MAX, 100_000] {
                let to = temp.path().join(format!("{number}-{type_name}-{shard_size}"));
                let checkpoint = HfCheckpoint::open(&from).unwrap();
                let model = checkpoint.load(&Device::flex(), &LoadOptions::default()).unwrap();
                let options = SaveOptions { dtype, shard_size, ..SaveOptions::default() };
                model.save_hf(&to, &options).unwrap();
                let mut command = Command::new(&python);
                let output =
                    command.arg(&script).args([&from, &to]).arg(type_name).output().unwrap();
                let error = String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "{} as {type_name}: {error}", from.display());
                assert!(String::from_utf8_lossy(&output.stdout).contains("tensors agree"));
            }
        }
    }
}

/// The interpreter, if it has what the comparison needs; where it is required, its absence is a
/// failure.
fn python() -> Option<String> {
    let named = std::env::var("YUAN_PYTHON").ok();
    let python = named.clone().unwrap_or_else(|| "python3".into());
    let output = Command::new(&python).args(["-c", "import numpy, safetensors"]).output();
    let found = output.is_ok_and(|output| output.status.success());
    assert!(found || named.is_none(), "{python} has no numpy and safetensors");
    found.then_some(python)
}
