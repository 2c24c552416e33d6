//! What training minimises in place of the mean cross-entropy.

use std::fmt::Debug;

use burn::tensor::Tensor;

/// The learnt labels of a batch as a model scores them, `[batch, seq]` each.
#[derive(Debug, Clone)]
pub struct ScoredLabels {
    /// Logarithms of the labels' probabilities, in f32; they carry the gradient.
    pub log_probs: Tensor<2>,
    /// Entropies of what the labels are drawn from, in nats and without a gradient, if the objective
    /// [wants](Objective::wants_entropies) them.
    pub entropies: Option<Tensor<2>>,
    /// 1 where a label is learnt, else 0.
    pub mask: Tensor<2>,
    /// Numbers that come with each label, such as advantages ([`Batch::signals`](crate::Batch::signals)).
    pub signals: Vec<Tensor<2>>,
}

/// What is minimised, and what else there is to tell of it.
#[derive(Debug, Clone)]
pub struct ObjectiveLoss {
    /// A mean over the learnt labels, `[1]`, with the gradient.
    pub loss: Tensor<1>,
    /// Means over the learnt labels by name, `[1]` each; a step's metrics hold them.
    pub measures: Vec<(&'static str, Tensor<1>)>,
}

impl ObjectiveLoss {
    /// A loss and nothing else.
    pub fn new(loss: Tensor<1>) -> Self {
        Self { loss, measures: Vec::new() }
    }

    /// Loss and measures times a number.
    #[must_use]
    pub fn times(self, factor: f64) -> Self {
        let times = |tensor: Tensor<1>| tensor.mul_scalar(factor);
        Self {
            loss: times(self.loss),
            measures: self.measures.into_iter().map(|(name, value)| (name, times(value))).collect(),
        }
    }
}

/// Makes a number to minimise of the labels of a batch, where that is not the mean cross-entropy:
/// policy gradients, preferences, distillation.
///
/// ```
/// use yuan_model::{Objective, ObjectiveLoss, ScoredLabels};
///
/// /// Likelier labels where the first signal is positive, less likely ones where it is negative.
/// #[derive(Debug)]
/// struct Reinforce;
///
/// impl Objective for Reinforce {
///     fn loss(&self, labels: ScoredLabels) -> ObjectiveLoss {
///         let ScoredLabels { log_probs, mask, signals, .. } = labels;
///         let weighted = log_probs * signals[0].clone() * mask.clone();
///         ObjectiveLoss::new((weighted.sum() / mask.sum().clamp_min(1.0)).neg())
///     }
/// }
/// ```
pub trait Objective: Debug + Send + Sync {
    /// Whether [`loss`](Self::loss) reads entropies, which cost a product of the head.
    fn wants_entropies(&self) -> bool {
        false
    }

    /// What is minimised: a mean over the learnt labels, so that micro-batches weigh by as many as they
    /// have.
    fn loss(&self, labels: ScoredLabels) -> ObjectiveLoss;
}
