//! What a Yuan3.0 language model is: [`YuanConfig`], its presets and its validation.
//!
//! The names of Hugging Face's `config.json` live in [`hf`](crate::hf); this is the validated form.

use crate::ConfigError;

mod presets;

/// How a layer scores its experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouterType {
    /// Attention over the experts, `attn_router` (Yuan3.0 Flash).
    Attention,
    /// One linear map, `linear` (Yuan3.0 Ultra).
    Linear,
}

/// Shape and constants of a Yuan3.0 language model.
///
/// The fields are public; [`validate`](Self::validate) is what the model's constructor asks.
///
/// ```
/// use yuan_model::YuanConfig;
///
/// // A preset, with another shape: layers may differ in their experts.
/// let config = YuanConfig { experts_per_layer: vec![8, 6, 8], ..YuanConfig::tiny(96) };
/// config.validate()?;
/// assert_eq!((config.num_layers(), config.head_dim()), (3, 32));
/// // The released model, whose layers have 8 to 48 experts.
/// assert_eq!(YuanConfig::ultra().parameter_count().total(), 1_010_653_092_864);
/// # Ok::<(), yuan_model::ConfigError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct YuanConfig {
    /// Rows of the embedding and of the head, V.
    pub vocab_size: usize,
    /// Width of the residual stream, H.
    pub hidden_size: usize,
    /// Attention heads, n; keys and values have as many.
    pub num_attention_heads: usize,
    /// Width of queries, keys and values over all heads, P = n · head width.
    pub attention_projection_size: usize,
    /// Inner width of one expert, F.
    pub expert_hidden_size: usize,
    /// Experts of every layer; its length is the number of layers. Layers differ after pruning.
    pub experts_per_layer: Vec<usize>,
    /// Experts that each token visits, k.
    pub top_k: usize,
    /// Kind of router.
    pub router_type: RouterType,
    /// Localized filtering of the attention's input; on in every published model.
    pub localized_filter: bool,
    /// Biases in the two filter convolutions (Flash yes, Ultra no).
    pub filter_bias: bool,
    /// ε of every RMSNorm.
    pub norm_epsilon: f64,
    /// Base of the rotary frequencies.
    pub rotary_base: f64,
    /// Share of each head that is rotated.
    pub rotary_percent: f64,
    /// Replaces the head width before `rotary_percent` is applied (`rotary_dim`).
    pub rotary_dim: Option<usize>,
    /// Divides positions (`seq_len_interpolation_factor`).
    pub position_divisor: Option<f64>,
    /// The YaRN variant of the rotary frequencies (`use_yarn`).
    pub yarn: Option<YarnConfig>,
    /// Longest sequence that the model was made for.
    pub max_seq_len: usize,
    /// Standard deviation of the initial linear weights.
    pub init_std: f64,
    /// Standard deviation of the initial embedding, where it differs from
    /// [`init_std`](Self::init_std); in `config.json` a key of this library,
    /// `embedding_initializer_range`.
    ///
    /// A wide embedding keeps tokens apart in the residual stream while a small model warms up,
    /// without which its routers send nearly everything to the same few experts.
    pub embedding_init_std: Option<f64>,
    /// Whether every router carries a bias for choosing experts, which balancing without an
    /// auxiliary loss moves (DeepSeek-V3); in `config.json` a key of this library, `router_selection_bias`. Off in the
    /// published models.
    pub router_selection_bias: bool,
    /// Dropout on the attention probabilities, in training only.
    pub attention_dropout: f64,
    /// Dropout on the outputs of attention and experts, in training only.
    pub hidden_dropout: f64,
    /// Multiplies the logits.
    pub logit_scale: f64,
    /// Document-blocked attention in packed rows (`reset_attention_mask`); off in the published
    /// models.
    pub isolate_documents: bool,
    /// Special tokens.
    pub tokens: SpecialTokens,
}

/// The YaRN variant (`use_yarn`): slow frequencies are divided by the scale, fast ones kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct YarnConfig {
    /// s, how much longer than trained the sequences may be (`yarn_scale_factor`).
    pub scale_factor: f64,
    /// Rows of the table, `scaled_max_position_embeddings`; positions beyond it were not meant.
    pub scaled_max_position_embeddings: usize,
}

/// Ids of the special tokens that have one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begin of sequence, `bos_token_id`.
    pub bos: Option<u32>,
    /// End of sequence, `eos_token_id`.
    pub eos: Option<u32>,
    /// Padding, `pad_token_id`.
    pub pad: Option<u32>,
    /// End of document, `eod_token` or `eod_token_id`.
    pub eod: Option<u32>,
    /// Separator between prompt and answer, `sep_token` or `sep_token_id`.
    pub sep: Option<u32>,
    /// Mask token, `mask_token_id`.
    pub mask: Option<u32>,
}

impl YuanConfig {
    /// Layers, L.
    pub fn num_layers(&self) -> usize {
        self.experts_per_layer.len()
    }

    /// Width of one attention head, d = P / n.
    pub fn head_dim(&self) -> usize {
        self.attention_projection_size / self.num_attention_heads
    }

    /// Dimensions of each head that are rotated, r.
    pub fn rotary_width(&self) -> usize {
        let base = self.rotary_dim.unwrap_or_else(|| self.head_dim());
        if self.rotary_percent >= 1.0 { base } else { (base as f64 * self.rotary_percent) as usize }
    }

    /// Checks that the numbers make a model.
    ///
    /// # Errors
    ///
    /// Names the keys (as in `config.json`) that are wrong or contradict each other.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let refuse = |message: String| Err(ConfigError::Contradiction(message));
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_layers()),
            ("num_attention_heads", self.num_attention_heads),
            ("attention_projection_size", self.attention_projection_size),
            ("ffn_hidden_size", self.expert_hidden_size),
            ("moe_config.moe_top_k", self.top_k),
            ("max_position_embeddings", self.max_seq_len),
        ];
        if let Some((key, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return refuse(format!("{key} must be at least 1"));
        }
        if let Some((key, size)) = sizes.iter().find(|(_, size)| *size > u32::MAX as usize) {
            return refuse(format!("{key} = {size} is beyond any model"));
        }
        if !self.attention_projection_size.is_multiple_of(self.num_attention_heads) {
            return refuse(format!(
                "attention_projection_size = {} is not a multiple of num_attention_heads = {}",
                self.attention_projection_size, self.num_attention_heads
            ));
        }
        if self.localized_filter && !self.hidden_size.is_multiple_of(2) {
            return refuse(format!(
                "use_lf_gate needs an even hidden_size, not {}",
                self.hidden_size
            ));
        }
        let too_few = |&(_, &experts): &(usize, &usize)| experts < self.top_k;
        if let Some((layer, experts)) = self.experts_per_layer.iter().enumerate().find(too_few) {
            return refuse(format!(
                "layer {layer} has {experts} experts, fewer than moe_config.moe_top_k = {}",
                self.top_k
            ));
        }
        if self.rough_parameter_count() > Self::MOST_PARAMETERS {
            return refuse(format!(
                "{:.1e} parameters are beyond any model",
                self.rough_parameter_count()
            ));
        }
        self.validate_rotary()?;
        self.validate_numbers()?;
        let tokens = &self.tokens;
        let ids = [
            ("bos", tokens.bos),
            ("eos", tokens.eos),
            ("pad", tokens.pad),
            ("eod", tokens.eod),
            ("sep", tokens.sep),
            ("mask", tokens.mask),
        ];
        for (name, id) in ids {
            if let Some(id) = id.filter(|&id| id as usize >= self.vocab_size) {
                return refuse(format!(
                    "{name}_token_id = {id} is outside vocab_size = {}",
                    self.vocab_size
                ));
            }
        }
        Ok(())
    }

    /// Counts up to here fit 64 bits with room for sums; a trillion is 1e12.
    const MOST_PARAMETERS: f64 = 1e17;

    /// The count in a number that cannot overflow.
    fn rough_parameter_count(&self) -> f64 {
        let [v, h, p, f] = [
            self.vocab_size,
            self.hidden_size,
            self.attention_projection_size,
            self.expert_hidden_size,
        ]
        .map(|size| size as f64);
        let experts: f64 =
            self.experts_per_layer.iter().map(|&experts| experts.max(self.top_k) as f64).sum();
        let layers = self.num_layers() as f64;
        2.0 * v * h
            + layers * (4.0 * p * h + 2.0 * h * h + 8.0 * h)
            + experts * (3.0 * h * f + 3.0 * h + 1.0)
    }

    fn validate_rotary(&self) -> Result<(), ConfigError> {
        let refuse = |message: String| Err(ConfigError::Contradiction(message));
        if !(self.rotary_percent > 0.0 && self.rotary_percent.is_finite()) {
            return refuse(format!("rotary_percent = {} must be positive", self.rotary_percent));
        }
        let (width, head) = (self.rotary_width(), self.head_dim());
        if !width.is_multiple_of(2) || width > head || width == 0 {
            return refuse(format!(
                "rotary_percent and rotary_dim rotate {width} of {head} dimensions of a head; expected an even number within it"
            ));
        }
        if !(self.rotary_base > 1.0 && self.rotary_base.is_finite()) {
            return refuse(format!("rotary_base = {} must be above 1", self.rotary_base));
        }
        match &self.yarn {
            Some(yarn) if !(yarn.scale_factor > 0.0 && yarn.scale_factor.is_finite()) => {
                refuse(format!("yarn_scale_factor = {} must be positive", yarn.scale_factor))
            }
            _ => Ok(()),
        }
    }

    fn validate_numbers(&self) -> Result<(), ConfigError> {
        let refuse = |message: String| Err(ConfigError::Contradiction(message));
        let positive = [
            ("rms_norm_eps", self.norm_epsilon),
            ("initializer_range", self.init_std),
            ("embedding_initializer_range", self.embedding_init_std.unwrap_or(1.0)),
            ("seq_len_interpolation_factor", self.position_divisor.unwrap_or(1.0)),
        ];
        if let Some((key, value)) =
            positive.iter().find(|(_, value)| !(*value > 0.0 && value.is_finite()))
        {
            return refuse(format!("{key} = {value} must be positive"));
        }
        let shares = [("attn_dropout", self.attention_dropout), ("dropout", self.hidden_dropout)];
        if let Some((key, value)) = shares.iter().find(|(_, value)| !(0.0..1.0).contains(value)) {
            return refuse(format!("{key} = {value} must be in [0, 1)"));
        }
        if !self.logit_scale.is_finite() {
            return refuse(format!("logit_scale = {} must be a number", self.logit_scale));
        }
        Ok(())
    }
}
