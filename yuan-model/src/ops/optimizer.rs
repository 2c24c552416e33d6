//! The update of AdamW, and the sum of squares that clipping needs.

use burn::backend::Dispatch;
use burn::tensor::Tensor;

use super::YuanOps;

/// Scalars of one AdamW update of one tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub learning_rate: f64,
    /// Decay of the first moment, β₁.
    pub beta_1: f64,
    /// Decay of the second moment, β₂.
    pub beta_2: f64,
    /// ε, added to the root of the corrected second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Updates of this tensor, this one included.
    pub step: u64,
    /// Multiplies the gradient first: the factor of global-norm clipping.
    pub gradient_scale: f64,
}

impl AdamWStep {
    /// `1 − β₁ᵗ` and `1 − β₂ᵗ`.
    pub(crate) fn bias_corrections(&self) -> [f64; 2] {
        [self.beta_1, self.beta_2].map(|beta| 1.0 - beta.powf(self.step as f64))
    }
}

/// Sum of the squares of all elements, `[1]`; no gradient.
pub fn sum_of_squares<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    Tensor::from_dispatch(Dispatch::sum_of_squares(x.into_dispatch()))
}

/// One AdamW update in place of the ten passes of its formula; bias-corrected, decay decoupled.
///
/// The tensors carry no autodiff graph and have one shape. Returns the new parameter and moments.
pub fn adamw_update<const D: usize>(
    param: Tensor<D>,
    grad: Tensor<D>,
    [moment_1, moment_2]: [Tensor<D>; 2],
    step: AdamWStep,
) -> (Tensor<D>, [Tensor<D>; 2]) {
    let (param, moment_1, moment_2) = Dispatch::adamw_update(
        param.into_dispatch(),
        grad.into_dispatch(),
        moment_1.into_dispatch(),
        moment_2.into_dispatch(),
        step,
    );
    let [moment_1, moment_2] = [moment_1, moment_2].map(Tensor::from_dispatch);
    (Tensor::from_dispatch(param), [moment_1, moment_2])
}

/// The same in terms of Burn's own operations: what the fast versions are tested against.
pub mod portable {
    use burn::backend::{Backend, tensor::FloatTensor};

    use super::AdamWStep;

    /// See [`sum_of_squares`](super::sum_of_squares).
    pub fn sum_of_squares<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
        B::float_sum(B::float_mul(x.clone(), x))
    }

    /// AdamW as in Loshchilov and Hutter, "Decoupled Weight Decay Regularization", Algorithm 2.
    pub fn adamw_update<B: Backend>(
        param: FloatTensor<B>,
        grad: FloatTensor<B>,
        moment_1: FloatTensor<B>,
        moment_2: FloatTensor<B>,
        step: &AdamWStep,
    ) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
        let scale = |tensor, by: f64| B::float_mul_scalar(tensor, by.into());
        let grad = scale(grad, step.gradient_scale);
        let squared = B::float_mul(grad.clone(), grad.clone());
        let moment_1 = B::float_add(scale(moment_1, step.beta_1), scale(grad, 1.0 - step.beta_1));
        let moment_2 =
            B::float_add(scale(moment_2, step.beta_2), scale(squared, 1.0 - step.beta_2));
        let [correction_1, correction_2] = step.bias_corrections();
        let root = B::float_sqrt(scale(moment_2.clone(), 1.0 / correction_2));
        let denominator = B::float_add_scalar(root, step.epsilon.into());
        let update =
            B::float_div(scale(moment_1.clone(), step.learning_rate / correction_1), denominator);
        let param = scale(param, 1.0 - step.learning_rate * step.weight_decay);
        (B::float_sub(param, update), moment_1, moment_2)
    }
}
