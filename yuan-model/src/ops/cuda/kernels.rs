//! Kernels in CUDA C++: which there are, and their compilation by NVRTC at their first use.

#![expect(unsafe_code, reason = "CUDA's libraries are C: pointers and handles have no safe form")]

use std::{collections::HashMap, ffi::CString};

use cudarc::{
    driver::{result as driver, sys},
    nvrtc::{CompileOptions, compile_ptx_with_opts},
};

use super::failure::text;

/// A file of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum KernelFile {
    Dispatch,
    Elementwise,
    Flash,
    Optimizer,
    Rows,
    Softmax,
    Tower,
}

impl KernelFile {
    fn text(self) -> &'static str {
        match self {
            Self::Dispatch => include_str!("kernels/dispatch.cu"),
            Self::Elementwise => include_str!("kernels/elementwise.cu"),
            Self::Flash => include_str!("kernels/flash.cu"),
            Self::Optimizer => include_str!("kernels/optimizer.cu"),
            Self::Rows => include_str!("kernels/rows.cu"),
            Self::Softmax => include_str!("kernels/softmax.cu"),
            Self::Tower => include_str!("kernels/tower.cu"),
        }
    }
}

/// A kernel, compiled for f32 or for bf16 activations, and for one head dimension and one kind of
/// attention where it depends on those.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Kernel {
    pub source: KernelFile,
    pub name: &'static str,
    pub bf16: bool,
    pub head_dim: usize,
    /// Whether positions see those before them only, or all.
    pub causal: bool,
}

impl Kernel {
    pub fn new(source: KernelFile, name: &'static str, bf16: bool) -> Self {
        Self { source, name, bf16, head_dim: 0, causal: true }
    }
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub(super) enum Arg {
    Pointer(u64),
    Int(usize),
    Long(usize),
    Float(f64),
}

/// The kernels that one device has compiled and loaded.
pub(super) struct Kernels {
    /// Compute capability, as in `compute_90`.
    capability: i32,
    functions: HashMap<Kernel, sys::CUfunction>,
    modules: HashMap<(KernelFile, bool, usize, bool), sys::CUmodule>,
}

impl Kernels {
    pub fn new(capability: i32) -> Self {
        Self { capability, functions: HashMap::new(), modules: HashMap::new() }
    }

    pub fn capability(&self) -> i32 {
        self.capability
    }

    /// The kernel, compiled if this is its first use.
    pub fn function(&mut self, kernel: Kernel) -> Result<sys::CUfunction, String> {
        if let Some(&function) = self.functions.get(&kernel) {
            return Ok(function);
        }
        let key = (kernel.source, kernel.bf16, kernel.head_dim, kernel.causal);
        let module = match self.modules.get(&key) {
            Some(&module) => module,
            None => {
                let module = self.compile(kernel)?;
                self.modules.insert(key, module);
                module
            }
        };
        let name = CString::new(kernel.name).map_err(text)?;
        // SAFETY: the module was loaded and is never unloaded.
        let function = unsafe { driver::module::get_function(module, name) }
            .map_err(|error| format!("kernel {}: {error:?}", kernel.name))?;
        self.functions.insert(kernel, function);
        Ok(function)
    }

    fn compile(
        &self,
        Kernel { source, bf16, head_dim, causal, .. }: Kernel,
    ) -> Result<sys::CUmodule, String> {
        let code = format!("{}\n{}", include_str!("kernels/common.cuh"), source.text());
        // Hopper's own instructions are in a variant of its architecture.
        let variant = if source == KernelFile::Flash { "a" } else { "" };
        let mut options = vec![format!("--gpu-architecture=compute_{}{variant}", self.capability)];
        options.extend(bf16.then(|| "-DBF16".into()));
        options.extend((head_dim > 0).then(|| format!("-DHEAD_DIM={head_dim}")));
        options.push(format!("-DCAUSAL={}", u8::from(causal)));
        let options = CompileOptions { options, ..CompileOptions::default() };
        let ptx = compile_ptx_with_opts(code, options)
            .map_err(|error| format!("{source:?}: {error:?}"))?;
        let image = CString::new(ptx.to_src()).map_err(text)?;
        // SAFETY: the image is PTX that ends with a zero.
        unsafe { driver::module::load_data(image.as_ptr().cast()) }.map_err(text)
    }
}
