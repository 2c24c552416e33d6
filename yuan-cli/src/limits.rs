//! The options that say how much LAEP may prune; those that are not given leave what was there.

use clap::Args;
use yuan::laep::{PerLayer, PruneLimits};

/// How much may go.
#[derive(Args)]
#[command(next_help_heading = "LAEP")]
pub struct LimitOptions {
    /// Individual load constraint: an expert may go if its load is at most alpha times the mean; a
    /// number or "inf", or one for each layer (0.2,0.4,inf,inf)
    #[arg(long, value_name = "TIMES_THE_MEAN")]
    pub alpha: Option<PerLayer>,
    /// Cumulative load constraint: the pruned experts of a layer carry at most this share of its
    /// load; a number, or one for each layer
    #[arg(long, value_name = "SHARE")]
    pub beta: Option<PerLayer>,
    /// Round the kept experts of each layer up to a multiple of this
    #[arg(long, value_name = "EXPERTS")]
    pub multiple_of: Option<usize>,
    /// Keep at least this many experts in each layer
    #[arg(long, value_name = "EXPERTS")]
    pub min_experts: Option<usize>,
    /// Device groups that the kept experts are spread over
    #[arg(long, value_name = "GROUPS")]
    pub groups: Option<usize>,
}

impl LimitOptions {
    /// The given limits over others. Groups that do not divide the other's multiple, and come
    /// without one of their own, are the multiple.
    pub fn over(&self, limits: PruneLimits) -> PruneLimits {
        let groups =
            self.groups.filter(|&groups| groups > 0 && !limits.multiple_of.is_multiple_of(groups));
        PruneLimits {
            alpha: self.alpha.clone().unwrap_or(limits.alpha),
            beta: self.beta.clone().unwrap_or(limits.beta),
            multiple_of: self.multiple_of.or(groups).unwrap_or(limits.multiple_of),
            min_experts: self.min_experts.unwrap_or(limits.min_experts),
            max_pruned_fraction: limits.max_pruned_fraction,
        }
    }
}
