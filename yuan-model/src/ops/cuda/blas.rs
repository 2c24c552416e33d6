//! Products by cuBLASLt, each way of computing one chosen once.
//!
//! cuBLAS picks a kernel anew for every shape it has not seen, which takes a processor 60 to 100
//! µs: with experts' ragged row counts that is nearly every product, and a step was waiting for its
//! processor. Here shapes of about the same size share a choice.

#![expect(unsafe_code, reason = "cuBLASLt is C: pointers and handles have no safe form")]

use std::{collections::HashMap, ffi::c_void, ptr};

use cudarc::{
    cublaslt::{result as lt, sys},
    driver::{result as driver, sys::CUstream},
};

use super::failure::text;

/// A matrix in device memory, as a product sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Matrix {
    pub pointer: u64,
    pub rows: usize,
    pub columns: usize,
    /// Elements from one row to the next, or from one column to the next if it is `transposed`.
    pub pitch: usize,
    pub transposed: bool,
    pub bf16: bool,
}

impl Matrix {
    /// The same at an address.
    pub fn at(self, pointer: u64) -> Self {
        Self { pointer, ..self }
    }

    /// The same memory read as its transpose.
    pub fn t(self) -> Self {
        Self { rows: self.columns, columns: self.rows, transposed: !self.transposed, ..self }
    }

    /// Rows `start..end`.
    pub fn slice_rows(self, start: usize, end: usize) -> Self {
        let size = if self.bf16 { 2 } else { 4 };
        let step = if self.transposed { 1 } else { self.pitch };
        Self { pointer: self.pointer + (start * step * size) as u64, rows: end - start, ..self }
    }

    fn data_type(self) -> sys::cudaDataType_t {
        match self.bf16 {
            true => sys::cudaDataType_t::CUDA_R_16BF,
            false => sys::cudaDataType_t::CUDA_R_32F,
        }
    }

    /// Rows and columns as they are stored, row by row.
    fn stored(self) -> [usize; 2] {
        if self.transposed { [self.columns, self.rows] } else { [self.rows, self.columns] }
    }

    /// Bytes that start and rows are multiples of, up to 256.
    fn alignment(self) -> u32 {
        let size = if self.bf16 { 2 } else { 4 };
        1 << (self.pointer | (self.pitch * size) as u64 | 256).trailing_zeros()
    }
}

/// Many products of one shape at once: how many, and the elements from one to the next in the three
/// matrices.
#[derive(Debug, Clone, Copy)]
pub(super) struct ProductBatch {
    pub count: usize,
    pub strides: [usize; 3],
}

/// What a choice of kernel depends on.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Key {
    sizes: [usize; 4],
    transposed: [bool; 2],
    bf16: [bool; 3],
    alignments: [u32; 3],
}

/// Memory that a kernel may ask for.
const WORKSPACE: usize = 32 << 20;

/// cuBLASLt with what it has chosen so far; one context's.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    preference: sys::cublasLtMatmulPreference_t,
    descriptors: HashMap<[bool; 2], sys::cublasLtMatmulDesc_t>,
    choices: HashMap<Key, sys::cublasLtMatmulAlgo_t>,
    /// One for every lane.
    workspaces: Vec<u64>,
}

impl Blas {
    pub fn new(lanes: usize) -> Result<Self, String> {
        let preference = lt::create_matmul_pref().map_err(text)?;
        let most =
            sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: the attribute is a number of eight bytes.
        unsafe {
            lt::set_matmul_pref_attribute(preference, most, ptr::from_ref(&WORKSPACE).cast(), 8)
        }
        .map_err(text)?;
        // SAFETY: the memory is never freed: it lives as long as the context.
        let workspaces =
            (0..lanes).map(|_| unsafe { driver::malloc_sync(WORKSPACE) }).collect::<Result<_, _>>();
        Ok(Self {
            handle: lt::create_handle().map_err(text)?,
            preference,
            descriptors: HashMap::new(),
            choices: HashMap::new(),
            workspaces: workspaces.map_err(text)?,
        })
    }

    /// `c = alpha · a · b + beta · c`, in f32 arithmetic; `c` is not transposed.
    pub fn product(
        &mut self,
        (lane, stream): (usize, CUstream),
        [a, b, c]: [Matrix; 3],
        alpha: f32,
        beta: f32,
        batch: Option<ProductBatch>,
    ) -> Result<(), String> {
        debug_assert!(
            a.columns == b.rows && a.rows == c.rows && b.columns == c.columns && !c.transposed
        );
        let batch = batch.unwrap_or(ProductBatch { count: 1, strides: [0; 3] });
        // cuBLAS counts by columns: it sees all three matrices transposed, and forms cᵀ = bᵀ · aᵀ.
        let operands = [b, a, c];
        let strides = [batch.strides[1], batch.strides[0], batch.strides[2]];
        let descriptor = self.descriptor([b.transposed, a.transposed])?;
        let mut layouts = [ptr::null_mut(); 3];
        for (layout, (matrix, stride)) in layouts.iter_mut().zip(operands.into_iter().zip(strides))
        {
            *layout = matrix_layout(matrix, batch.count, stride)?;
        }
        let key = Key {
            sizes: [a.rows, b.columns, a.columns, batch.count].map(about),
            transposed: [b.transposed, a.transposed],
            bf16: [a.bf16, b.bf16, c.bf16],
            alignments: operands.map(Matrix::alignment),
        };
        let result = self.launch(key, descriptor, layouts, operands, [alpha, beta], lane, stream);
        for layout in layouts {
            // SAFETY: made above and used no more.
            unsafe { lt::destroy_matrix_layout(layout) }.map_err(text)?;
        }
        result.map_err(|error| {
            format!("cuBLASLt, [{}, {}] · [{}, {}]: {error}", a.rows, a.columns, b.rows, b.columns)
        })
    }

    #[expect(clippy::too_many_arguments, reason = "what a call of the library takes")]
    fn launch(
        &mut self,
        key: Key,
        descriptor: sys::cublasLtMatmulDesc_t,
        layouts: [sys::cublasLtMatrixLayout_t; 3],
        [b, a, c]: [Matrix; 3],
        [alpha, beta]: [f32; 2],
        lane: usize,
        stream: CUstream,
    ) -> Result<(), String> {
        let call = |algorithm: &sys::cublasLtMatmulAlgo_t| {
            // SAFETY: descriptors are alive, and the matrices lie within tensors that the lanes
            // holds.
            unsafe {
                lt::matmul(
                    self.handle,
                    descriptor,
                    ptr::from_ref(&alpha).cast(),
                    ptr::from_ref(&beta).cast(),
                    b.pointer as *const c_void,
                    layouts[0],
                    a.pointer as *const c_void,
                    layouts[1],
                    c.pointer as *const c_void,
                    layouts[2],
                    c.pointer as *mut c_void,
                    layouts[2],
                    algorithm,
                    self.workspaces[lane] as *mut c_void,
                    WORKSPACE,
                    stream.cast(),
                )
            }
        };
        // A choice for a slightly different size is refused now and then; then there is a new one.
        if let Some(algorithm) = self.choices.get(&key)
            && call(algorithm).is_ok()
        {
            return Ok(());
        }
        let algorithm = self.choose(descriptor, layouts, key.alignments)?;
        call(&algorithm).map_err(text)?;
        self.choices.insert(key, algorithm);
        Ok(())
    }

    fn choose(
        &self,
        descriptor: sys::cublasLtMatmulDesc_t,
        layouts: [sys::cublasLtMatrixLayout_t; 3],
        alignments: [u32; 3],
    ) -> Result<sys::cublasLtMatmulAlgo_t, String> {
        use sys::cublasLtMatmulPreferenceAttributes_t::{
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES as A,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES as B,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES as C,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES as D,
        };
        let [a, b, c] = alignments;
        for (attribute, alignment) in [(A, a), (B, b), (C, c), (D, c)] {
            let value = ptr::from_ref(&alignment).cast();
            // SAFETY: the attributes are numbers of four bytes.
            unsafe { lt::set_matmul_pref_attribute(self.preference, attribute, value, 4) }
                .map_err(text)?;
        }
        let [a, b, c] = layouts;
        // SAFETY: all descriptors are alive.
        let found = unsafe {
            lt::get_matmul_algo_heuristic(self.handle, descriptor, a, b, c, c, self.preference)
        };
        Ok(found.map_err(text)?.algo)
    }

    fn descriptor(&mut self, transposed: [bool; 2]) -> Result<sys::cublasLtMatmulDesc_t, String> {
        use sys::cublasLtMatmulDescAttributes_t::{
            CUBLASLT_MATMUL_DESC_TRANSA as A, CUBLASLT_MATMUL_DESC_TRANSB as B,
        };
        if let Some(&descriptor) = self.descriptors.get(&transposed) {
            return Ok(descriptor);
        }
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let descriptor =
            lt::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F).map_err(text)?;
        for (attribute, transposed) in [A, B].into_iter().zip(transposed) {
            // CUBLAS_OP_N and CUBLAS_OP_T.
            let operation = i32::from(transposed);
            let value = ptr::from_ref(&operation).cast();
            // SAFETY: the attributes are enumerations of four bytes.
            unsafe { lt::set_matmul_desc_attribute(descriptor, attribute, value, 4) }
                .map_err(text)?;
        }
        self.descriptors.insert(transposed, descriptor);
        Ok(descriptor)
    }
}

fn matrix_layout(
    matrix: Matrix,
    count: usize,
    stride: usize,
) -> Result<sys::cublasLtMatrixLayout_t, String> {
    use sys::cublasLtMatrixLayoutAttribute_t::{
        CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT as COUNT,
        CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET as STRIDE,
    };
    let [rows, columns] = matrix.stored();
    let layout = lt::create_matrix_layout(
        matrix.data_type(),
        columns as u64,
        rows as u64,
        matrix.pitch as i64,
    )
    .map_err(text)?;
    if count > 1 {
        let (count, stride) = (i32::try_from(count).map_err(text)?, stride as i64);
        // SAFETY: the attributes are numbers of four and of eight bytes.
        unsafe {
            lt::set_matrix_layout_attribute(layout, COUNT, ptr::from_ref(&count).cast(), 4)
                .map_err(text)?;
            lt::set_matrix_layout_attribute(layout, STRIDE, ptr::from_ref(&stride).cast(), 8)
                .map_err(text)?;
        }
    }
    Ok(layout)
}

/// The next larger of four sizes per power of two.
fn about(size: usize) -> usize {
    let step = (size.next_power_of_two() / 8).max(1);
    size.next_multiple_of(step)
}

#[cfg(test)]
mod tests {
    use super::about;

    #[test]
    fn sizes_share_a_choice_within_a_quarter() {
        assert_eq!(
            [1, 7, 8, 9, 1024, 1025, 1281, 2000].map(about),
            [1, 7, 8, 10, 1024, 1280, 1536, 2048]
        );
        for size in 1..5000 {
            assert!(about(size) >= size && about(size) as f64 <= 1.25 * size as f64 + 1.0);
        }
    }
}
