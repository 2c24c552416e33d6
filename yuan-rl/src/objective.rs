//! RAPO's loss as what a step minimises.

use yuan_model::{Objective, ObjectiveLoss, ScoredLabels};

use crate::{PolicyLoss, RapoLoss, Tokens};

/// Places of what RAPO reads among the signals of a batch.
pub(crate) const OLD_LOG_PROBS: usize = 0;
pub(crate) const ADVANTAGES: usize = 1;

impl Objective for RapoLoss {
    fn wants_entropies(&self) -> bool {
        self.share < 1.0
    }

    /// # Panics
    ///
    /// If the batch does not say with which log-probabilities its labels were drawn, and with which
    /// advantages.
    fn loss(&self, labels: ScoredLabels) -> ObjectiveLoss {
        let ScoredLabels { log_probs, entropies, mask, signals } = labels;
        assert_eq!(signals.len(), 2, "log-probabilities and advantages");
        let count = mask.clone().sum().clamp_min(1.0);
        let entropy = entropies.clone().map(|entropies| (entropies * mask.clone()).sum() / count);
        // Where all tokens count, their entropies do not matter.
        let entropies = entropies.unwrap_or_else(|| mask.zeros_like());
        let PolicyLoss { loss, clip_fraction, approx_kl } = self.of(Tokens {
            old_log_probs: signals[OLD_LOG_PROBS].clone(),
            advantages: signals[ADVANTAGES].clone(),
            log_probs,
            entropies,
            mask,
        });
        let mut measures = vec![("clip_fraction", clip_fraction), ("approx_kl", approx_kl)];
        measures.extend(entropy.map(|entropy| ("entropy", entropy)));
        ObjectiveLoss { loss, measures }
    }
}
