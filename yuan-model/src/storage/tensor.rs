//! A tensor as the header of its file describes it.

use safetensors::Dtype;

/// What a file says about one of its tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Where its bytes start in the file.
    pub offset: u64,
    /// How many they are.
    pub bytes: usize,
}
