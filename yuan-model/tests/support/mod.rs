//! What the integration tests share: devices, fixtures and comparisons.
#![allow(dead_code, reason = "every test binary uses its own part")]

use std::{
    collections::HashMap,
    convert::Infallible,
    fs,
    path::{Path, PathBuf},
};

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{DType, Device, FloatDType, Gradients, Int, Tensor, TensorData},
};
use safetensors::{Dtype, SafeTensors};
use yuan_model::{
    YuanConfig, YuanModel, device,
    hf::{HfCheckpoint, LoadOptions, ParameterSource, Piece},
    named,
};

pub mod multimodal;

/// Devices that the tests run on: `YUAN_DEVICE` names them (`flex,wgpu`), otherwise both CPU
/// backends.
pub fn devices() -> Vec<(String, Device)> {
    let wanted = std::env::var("YUAN_DEVICE").unwrap_or_else(|_| "flex,ndarray".into());
    let device = |name: &str| {
        (name.to_owned(), device(name).unwrap_or_else(|error| panic!("YUAN_DEVICE: {error}")))
    };
    wanted.split(',').map(device).collect()
}

/// What is compared, which decides how close it must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Activations and logits, absolute.
    Activation,
    /// Losses, absolute.
    Loss,
    /// Gradients, relative to the largest of their tensor.
    Gradient,
    /// One operation on one device against another device, relative.
    Operation,
}

/// Numbers that look random but are the same on every device.
pub fn numbers<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    };
    let data: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::from_data(TensorData::new(data, shape), device)
}

pub fn ints(list: &[usize], device: &Device) -> Tensor<1, Int> {
    let list: Vec<i64> = list.iter().map(|&i| i as i64).collect();
    Tensor::from_data(TensorData::new(list.clone(), [list.len()]), device)
}

/// The one table of tolerances: by what is compared, where it was computed, and in which type.
pub fn tolerance(kind: Kind, device: &Device, dtype: DType) -> f32 {
    let on_tensor_cores = format!("{device:?}").contains("Cuda");
    match (dtype, on_tensor_cores) {
        (DType::BF16, _) => match kind {
            Kind::Activation | Kind::Gradient => 8e-2,
            Kind::Loss => 3e-2,
            Kind::Operation => 2e-2,
        },
        // Products of f32 on tensor cores are TF32: 11 bits of mantissa.
        (_, true) => match kind {
            Kind::Activation | Kind::Gradient => 2e-2,
            Kind::Loss => 5e-3,
            Kind::Operation => 2e-3,
        },
        // As the reference's README says; operations sum a few hundred products in another order.
        (_, false) => match kind {
            Kind::Activation | Kind::Operation => 2e-5,
            Kind::Loss => 1e-5,
            Kind::Gradient => 1e-4,
        },
    }
}

/// The reference numbers to compare with: `YUAN_REFERENCE`, or the project's copy. A test that
/// reads it has `reference` in its name, and works with other sizes and seeds in the same layout.
pub fn reference() -> PathBuf {
    std::env::var_os("YUAN_REFERENCE").map_or_else(fixtures, PathBuf::from)
}

/// The project's copy, for tests that need some model and know this one; `YUAN_FIXTURES` says where
/// it was carried to.
pub fn fixtures() -> PathBuf {
    let own = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    std::env::var_os("YUAN_FIXTURES").map_or_else(own, PathBuf::from)
}

/// A model of the reference with its weights.
pub fn reference_model(directory: &str, device: &Device) -> YuanModel {
    load_from(&reference().join(directory), device)
}

/// A model of the fixtures.
pub fn load_model(directory: &str, device: &Device) -> YuanModel {
    load_from(&fixtures().join(directory), device)
}

fn load_from(directory: &Path, device: &Device) -> YuanModel {
    HfCheckpoint::open(directory).unwrap().load(device, &LoadOptions::default()).unwrap()
}

/// A tensor in host memory, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// One file of reference tensors.
pub struct Fixture {
    file: String,
    floats: HashMap<String, HostTensor>,
    ints: HashMap<String, (Vec<usize>, Vec<i64>)>,
}

impl Fixture {
    pub fn load(file: &str) -> Self {
        let path = reference().join(file);
        let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let (mut floats, mut ints) = (HashMap::new(), HashMap::new());
        for (name, view) in tensors.tensors() {
            let (shape, data) = (view.shape().to_vec(), view.data());
            match view.dtype() {
                Dtype::F32 => {
                    let values =
                        data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
                    floats.insert(name, HostTensor { shape, values });
                }
                Dtype::I64 => {
                    let values =
                        data.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect();
                    ints.insert(name, (shape, values));
                }
                other => panic!("{file}: {name} is {other:?}"),
            }
        }
        Self { file: file.into(), floats, ints }
    }

    /// The numbers that stand between `prefix` and `suffix` in names of tensors, ascending.
    pub fn numbers(&self, prefix: &str, suffix: &str) -> Vec<usize> {
        let names = self.floats.keys().chain(self.ints.keys());
        let number = |name: &String| name.strip_prefix(prefix)?.strip_suffix(suffix)?.parse().ok();
        let mut numbers: Vec<usize> = names.filter_map(number).collect();
        numbers.sort_unstable();
        numbers
    }

    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.floats.keys().chain(self.ints.keys())
    }

    pub fn has(&self, name: &str) -> bool {
        self.floats.contains_key(name) || self.ints.contains_key(name)
    }

    pub fn host(&self, name: &str) -> &HostTensor {
        self.floats.get(name).unwrap_or_else(|| panic!("{} has no {name}", self.file))
    }

    pub fn tensor<const D: usize>(&self, name: &str, device: &Device) -> Tensor<D> {
        let HostTensor { shape, values } = self.host(name).clone();
        Tensor::from_data(TensorData::new(values, shape), device)
    }

    pub fn int<const D: usize>(&self, name: &str, device: &Device) -> Tensor<D, Int> {
        let (shape, values) = self.ints[name].clone();
        Tensor::from_data(TensorData::new(values, shape), device)
    }

    pub fn ints(&self, name: &str) -> Vec<i64> {
        self.ints[name].1.clone()
    }

    pub fn scalar(&self, name: &str) -> f32 {
        self.host(name).values[0]
    }
}

/// The sources below a path, with both prefixes stripped.
pub fn sources_under(config: &YuanConfig, path: &str, name: &str) -> Vec<ParameterSource> {
    let strip = |mut source: ParameterSource| {
        source.path = source.path.strip_prefix(path)?.into();
        source.names = source
            .names
            .iter()
            .map(|n| Some(n.strip_prefix(name)?.into()))
            .collect::<Option<_>>()?;
        Some(source)
    };
    config.parameter_sources().into_iter().filter_map(strip).collect()
}

/// Fills a module from the fixture's tensors under `prefix`.
pub fn fill<M: Module>(
    module: M,
    sources: &[ParameterSource],
    fixture: &Fixture,
    prefix: &str,
) -> M {
    let mut filled = 0;
    let module = named::write_parameters(module, |path, shape| {
        let source = sources.iter().find(|source| source.path == path)?;
        filled += 1;
        let data = assemble(source, fixture, prefix);
        assert_eq!(data.shape(), shape, "{path}");
        Some(data)
    });
    assert_eq!(filled, sources.len(), "every parameter is filled");
    module
}

pub fn assemble(source: &ParameterSource, fixture: &Fixture, prefix: &str) -> TensorData {
    let piece = |name: &str| {
        let HostTensor { shape, values } = fixture.host(&format!("{prefix}{name}"));
        assert_eq!(*shape, source.shape, "{name}");
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Ok::<_, Infallible>(Piece { dtype: Dtype::F32, bytes })
    };
    source.assemble(FloatDType::F32, piece).unwrap()
}

/// Gradients of a module by path.
pub fn gradients<M: Module>(module: &M, gradients: &Gradients) -> HashMap<String, TensorData> {
    struct Collect<'a> {
        gradients: &'a Gradients,
        path: Vec<String>,
        found: HashMap<String, TensorData>,
    }
    impl ModuleVisitor for Collect<'_> {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(grad) = param.val().grad(self.gradients) {
                self.found.insert(self.path.join("."), grad.into_data());
            }
        }
    }
    let mut visitor = Collect { gradients, path: Vec::new(), found: HashMap::new() };
    module.visit(&mut visitor);
    visitor.found
}

pub fn values(data: &TensorData) -> Vec<f32> {
    data.clone().convert::<f32>().iter::<f32>().collect()
}

/// Absolute difference within the tolerance of its kind everywhere, and the same shape.
pub fn assert_near<const D: usize>(
    what: &str,
    ours: &Tensor<D>,
    expected: &HostTensor,
    kind: Kind,
) {
    assert_near_scaled(what, ours, expected, kind, 1.0);
}

/// The same for values that are `scale` times larger than the table has in mind.
pub fn assert_near_scaled<const D: usize>(
    what: &str,
    ours: &Tensor<D>,
    expected: &HostTensor,
    kind: Kind,
    scale: f32,
) {
    assert_eq!(ours.dims().to_vec(), expected.shape, "{what}: shape");
    let worst = largest_difference(&values(&ours.to_data()), &expected.values);
    let tolerance = tolerance(kind, &ours.device(), ours.dtype()) * scale;
    assert!(worst <= tolerance, "{what}: differs by {worst:e}, more than {tolerance:e}");
}

/// `max |Δ| ≤ tolerance · max |g| + 1e-6`.
pub fn assert_gradient(what: &str, device: &Device, ours: &TensorData, expected: &TensorData) {
    assert_eq!(ours.shape(), expected.shape(), "{what}: shape");
    let tolerance = tolerance(Kind::Gradient, device, ours.dtype());
    let (ours, expected) = (values(ours), values(expected));
    let largest = expected.iter().fold(0.0_f32, |max, g| max.max(g.abs()));
    let worst = largest_difference(&ours, &expected);
    assert!(
        worst <= tolerance * largest + 1e-6,
        "{what}: gradient differs by {worst:e}, largest {largest:e}"
    );
}

/// A NaN on either side counts as infinitely far.
pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let distance =
        |(a, b): (&f32, &f32)| if (a - b).is_nan() { f32::INFINITY } else { (a - b).abs() };
    a.iter().zip(b).map(distance).fold(0.0, f32::max)
}
