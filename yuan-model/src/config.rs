//! What a Yuan3.0 language model is: [`YuanConfig`], its presets and its validation.
//!
//! The names of Hugging Face's `config.json` live in [`hf`](crate::hf); this is the validated form.

use crate::{
    ConfigError,
    vision::{ImageConfig, ImagePositions},
};

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
    /// auxiliary loss moves (DeepSeek-V3); in `config.json` a key of this library,
    /// `router_selection_bias`. Off in the published models.
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
    /// The model's eyes: an image tower and what belongs to it; none in a model of text alone.
    pub images: Option<ImageConfig>,
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
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begin of sequence, `bos_token_id`.
    pub bos: Option<u32>,
    /// End of sequence, `eos_token_id`: a token or a list of them, each of which ends one.
    pub eos: Vec<u32>,
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

    /// The rule of positions of images that the model was trained with; none if it saw no image.
    pub fn image_positions(&self) -> Option<ImagePositions> {
        self.images.as_ref().and_then(|images| images.positions)
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
        for (key, size) in sizes {
            if size == 0 {
                return Err(ConfigError::Zero { key });
            }
        }
        for (key, size) in sizes {
            require(size <= u32::MAX as usize, key, size, "is beyond any model")?;
        }
        let (width, heads) = (self.attention_projection_size, self.num_attention_heads);
        if !width.is_multiple_of(heads) {
            return Err(ConfigError::HeadWidth { width, heads });
        }
        if self.localized_filter && !self.hidden_size.is_multiple_of(2) {
            return Err(ConfigError::OddWidth { hidden_size: self.hidden_size });
        }
        for (layer, &experts) in self.experts_per_layer.iter().enumerate() {
            if experts < self.top_k {
                return Err(ConfigError::TooFewExperts { layer, experts, top_k: self.top_k });
            }
        }
        let count = self.rough_parameter_count();
        if count > Self::MOST_PARAMETERS {
            return Err(ConfigError::TooManyParameters { count });
        }
        self.validate_rotary()?;
        self.validate_numbers()?;
        self.validate_tokens()?;
        self.images.as_ref().map_or(Ok(()), |images| images.validate(self.vocab_size))
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
        let positive = |value: f64| value > 0.0 && value.is_finite();
        let percent = self.rotary_percent;
        require(positive(percent), "rotary_percent", percent, "must be positive")?;
        let (width, head_dim) = (self.rotary_width(), self.head_dim());
        if !width.is_multiple_of(2) || width > head_dim || width == 0 {
            return Err(ConfigError::RotaryWidth { width, head_dim });
        }
        let base = self.rotary_base;
        require(base > 1.0 && base.is_finite(), "rotary_base", base, "must be above 1")?;
        let scale = self.yarn.map_or(1.0, |yarn| yarn.scale_factor);
        require(positive(scale), "yarn_scale_factor", scale, "must be positive")
    }

    fn validate_numbers(&self) -> Result<(), ConfigError> {
        let positive = [
            ("rms_norm_eps", self.norm_epsilon),
            ("initializer_range", self.init_std),
            ("embedding_initializer_range", self.embedding_init_std.unwrap_or(1.0)),
            ("seq_len_interpolation_factor", self.position_divisor.unwrap_or(1.0)),
        ];
        for (key, value) in positive {
            require(value > 0.0 && value.is_finite(), key, value, "must be positive")?;
        }
        for (key, value) in
            [("attn_dropout", self.attention_dropout), ("dropout", self.hidden_dropout)]
        {
            require((0.0..1.0).contains(&value), key, value, "must be in [0, 1)")?;
        }
        let scale = self.logit_scale;
        require(scale.is_finite(), "logit_scale", scale, "must be a number")
    }

    fn validate_tokens(&self) -> Result<(), ConfigError> {
        let (tokens, vocab_size) = (&self.tokens, self.vocab_size);
        let single = [
            ("bos", tokens.bos),
            ("pad", tokens.pad),
            ("eod", tokens.eod),
            ("sep", tokens.sep),
            ("mask", tokens.mask),
        ];
        let single = single.into_iter().filter_map(|(name, id)| Some((name, id?)));
        for (name, id) in single.chain(tokens.eos.iter().map(|&id| ("eos", id))) {
            if id as usize >= vocab_size {
                return Err(ConfigError::TokenOutside { name, id, vocab_size });
            }
        }
        Ok(())
    }
}

/// Refuses a value with a sentence.
pub(crate) fn require(
    holds: bool,
    key: &'static str,
    value: impl std::fmt::Display,
    expected: &'static str,
) -> Result<(), ConfigError> {
    if holds {
        return Ok(());
    }
    Err(ConfigError::OutOfRange { key, value: value.to_string(), expected })
}
