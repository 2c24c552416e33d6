//! What can be wrong with loads, limits and plans.

/// Why loads could not be read, or a plan could not be made or accepted.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The load file is not `{"layers": [[tokens, …], …]}` with non-negative integers.
    #[error(
        "{0}; expected {{\"layers\": [[tokens of expert 0, …], …]}} with non-negative integers"
    )]
    Loads(String),
    /// A plan file could not be read as a plan.
    #[error("not a prune plan: {0}")]
    Format(String),
    /// There is no layer at all.
    #[error("there are no layers to plan for")]
    NoLayers,
    /// A layer has no experts.
    #[error("layer {layer} has no experts")]
    NoExperts {
        /// Index of the layer.
        layer: usize,
    },
    /// A layer whose experts received nothing cannot be judged.
    #[error("no load was recorded for layer {layer}")]
    NoLoad {
        /// Index of the layer.
        layer: usize,
    },
    /// A limit is outside its range.
    #[error("{name} = {value} is not allowed: expected {expected}")]
    Limit {
        /// Name of the limit.
        name: &'static str,
        /// Its value, as written.
        value: String,
        /// What would be allowed.
        expected: &'static str,
    },
    /// A limit is given per layer, for another number of layers.
    #[error("{name} has {found} values for {layers} layers")]
    LimitPerLayer {
        /// Name of the limit.
        name: &'static str,
        /// Values given.
        found: usize,
        /// Layers that there are.
        layers: usize,
    },
    /// The experts of a layer cannot be split into multiples.
    #[error(
        "layer {layer} has {num_experts} experts, which multiple_of = {multiple_of} does not divide"
    )]
    NotAMultiple {
        /// Index of the layer.
        layer: usize,
        /// Experts of the layer.
        num_experts: usize,
        /// The multiple that kept counts must have.
        multiple_of: usize,
    },
    /// The experts of a layer cannot be spread over the groups in equal parts.
    #[error("layer {layer} has {num_experts} experts, which {groups} groups cannot share equally")]
    Ungrouped {
        /// Index of the layer.
        layer: usize,
        /// Experts of the layer.
        num_experts: usize,
        /// Device groups.
        groups: usize,
    },
    /// Kept counts could not be split into equal groups.
    #[error("multiple_of = {multiple_of} is not divisible by groups = {groups}")]
    Groups {
        /// The multiple that kept counts must have.
        multiple_of: usize,
        /// Device groups.
        groups: usize,
    },
    /// A layer has fewer experts than a token visits.
    #[error("layer {layer} keeps {kept} experts, fewer than top_k = {top_k}")]
    BelowTopK {
        /// Index of the layer.
        layer: usize,
        /// Experts that would remain.
        kept: usize,
        /// Experts that each token visits.
        top_k: usize,
    },
    /// Two sets of loads, or a plan and a model, differ in their layers.
    #[error("expected {expected} layers, found {found}")]
    LayerCount {
        /// Layers expected.
        expected: usize,
        /// Layers found.
        found: usize,
    },
    /// Two loads, or a plan and a model, differ in the experts of a layer.
    #[error("layer {layer}: expected {expected} experts, found {found}")]
    ExpertCount {
        /// Index of the layer.
        layer: usize,
        /// Experts expected.
        expected: usize,
        /// Experts found.
        found: usize,
    },
    /// A plan names an expert that the layer does not have.
    #[error("layer {layer}: expert {expert} does not exist among {num_experts}")]
    NoSuchExpert {
        /// Index of the layer.
        layer: usize,
        /// The expert named.
        expert: usize,
        /// Experts of the layer.
        num_experts: usize,
    },
    /// A plan lists an expert more than once.
    #[error("layer {layer}: expert {expert} is listed twice")]
    Repeated {
        /// Index of the layer.
        layer: usize,
        /// The expert listed twice.
        expert: usize,
    },
    /// A plan neither keeps nor prunes an expert.
    #[error("layer {layer}: expert {expert} is neither kept nor pruned")]
    Missing {
        /// Index of the layer.
        layer: usize,
        /// The expert that is missing.
        expert: usize,
    },
    /// The groups of a plan are not its kept experts in order, in equal parts.
    #[error(
        "layer {layer}: the groups, one after the other, must be the kept experts in their order, in equal parts"
    )]
    GroupsDiffer {
        /// Index of the layer.
        layer: usize,
    },
}
