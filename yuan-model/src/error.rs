//! What can be wrong with a configuration or with tensors that are to become a model.

use std::path::PathBuf;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file could not be read or written.
    #[error("cannot access {path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// The text is not JSON, or a key has a value of the wrong kind.
    #[error("not a model configuration: {0}")]
    Format(String),
    /// A key that the model cannot be built without is absent.
    #[error("the configuration has no `{0}`")]
    Missing(&'static str),
    /// A count that must be at least one is zero.
    #[error("{key} must be at least 1")]
    Zero {
        /// The key of `config.json`.
        key: &'static str,
    },
    /// A number is outside what makes a model.
    #[error("{key} = {value} {expected}")]
    OutOfRange {
        /// The key of `config.json`.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it must be, as the end of a sentence.
        expected: &'static str,
    },
    /// Two keys for one thing have different values.
    #[error("{key} = {value} contradicts {other_key} = {other_value}")]
    Disagreement {
        /// The key of `config.json`.
        key: String,
        /// Its value.
        value: String,
        /// The other key.
        other_key: String,
        /// The other value.
        other_value: String,
    },
    /// The heads cannot share the width of the attention.
    #[error(
        "attention_projection_size = {width} is not a multiple of num_attention_heads = {heads}"
    )]
    HeadWidth {
        /// Width of queries over all heads.
        width: usize,
        /// Heads.
        heads: usize,
    },
    /// The localized filter halves the width.
    #[error("use_lf_gate needs an even hidden_size, not {hidden_size}")]
    OddWidth {
        /// Width of the residual stream.
        hidden_size: usize,
    },
    /// A layer has fewer experts than a token visits.
    #[error("layer {layer} has {experts} experts, fewer than moe_config.moe_top_k = {top_k}")]
    TooFewExperts {
        /// Index of the layer.
        layer: usize,
        /// Its experts.
        experts: usize,
        /// Experts that each token visits.
        top_k: usize,
    },
    /// A layer has fewer experts than ranks that are to share them.
    #[error("layer {layer} has {experts} experts, too few for the {ranks} ranks that share them")]
    TooFewForRanks {
        /// Index of the layer.
        layer: usize,
        /// Its experts.
        experts: usize,
        /// Ranks of a row.
        ranks: usize,
    },
    /// The list of experts is not as long as the model has layers.
    #[error("{key} lists {listed} layers, but num_hidden_layers = {layers}")]
    LayersListed {
        /// The key of `config.json`.
        key: &'static str,
        /// Layers that it lists.
        listed: usize,
        /// Layers that the model has.
        layers: usize,
    },
    /// More parameters than any model has, which counts could not hold.
    #[error("{count:.1e} parameters are beyond any model")]
    TooManyParameters {
        /// How many they would be.
        count: f64,
    },
    /// The rotary keys rotate what a head does not have.
    #[error(
        "rotary_percent and rotary_dim rotate {width} of {head_dim} dimensions of a head; \
         expected an even number within it"
    )]
    RotaryWidth {
        /// Dimensions that would be rotated.
        width: usize,
        /// Dimensions of a head.
        head_dim: usize,
    },
    /// A special token lies outside the vocabulary.
    #[error("{name}_token_id = {id} is outside vocab_size = {vocab_size}")]
    TokenOutside {
        /// Name of the token.
        name: &'static str,
        /// Its id.
        id: u32,
        /// Entries of the vocabulary.
        vocab_size: usize,
    },
    /// A key asks for something that this library does not compute.
    #[error("{key} = {value} is not supported: {reason}")]
    Unsupported {
        /// The key of `config.json`.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is supported instead.
        reason: &'static str,
    },
}

/// Why a model could not be cut or filled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The list of layers does not fit the model.
    #[error("the model has {expected} layers, but {found} were given")]
    LayerCount {
        /// Layers of the model.
        expected: usize,
        /// Layers given.
        found: usize,
    },
    /// Images were given to a model of text alone.
    #[error("the model sees no images: it has no image tower")]
    SeesNoImages,
    /// A tokenizer lacks a token that texts with images need.
    #[error("the tokenizer has no {0} token, which texts with images need")]
    NoToken(&'static str),
    /// A token marks two different things in a text with images.
    #[error(
        "token {0} has two meanings in texts with images: placeholder (`img_context_token_id`), \
         `eod_token`, `sep_token` and the markers of images must be different tokens"
    )]
    MarkersAlike(u32),
    /// A text marks more or fewer images than there are.
    #[error("the text marks {marks} images, but {images} are given")]
    ImageMarks {
        /// Marks in the text.
        marks: usize,
        /// Images.
        images: usize,
    },
    /// A tile is not of the size that the image tower takes.
    #[error(
        "a tile has {} x {} pixels, but the image tower takes {expected} x {expected}",
        found[0],
        found[1]
    )]
    TileSize {
        /// Its width and height.
        found: [usize; 2],
        /// The side that a tile has.
        expected: usize,
    },
    /// A row of an image stands outside the text.
    #[error("a row of an image has a place outside the {tokens} tokens of the batch")]
    ImagePlace {
        /// Tokens of the batch.
        tokens: usize,
    },
    /// Rows of an image come from a model of another width.
    #[error("the rows of an image have {found} numbers each, but the model has {expected}")]
    ImageWidth {
        /// Numbers of a row.
        found: usize,
        /// Width of the model.
        expected: usize,
    },
    /// The image tower was given nothing.
    #[error("there is no tile of an image to look at")]
    NoTile,
    /// A text has not as many places for image rows as there are rows.
    #[error("the text has {placeholders} places for image rows, but there are {rows}")]
    ImageRows {
        /// Tokens that stand for a row.
        placeholders: usize,
        /// Rows of the images.
        rows: usize,
    },
    /// A layer was told to keep fewer experts than a token visits.
    #[error("layer {layer}: {kept} experts are fewer than top_k = {top_k}")]
    TooFewKept {
        /// Index of the layer.
        layer: usize,
        /// Experts that it would keep.
        kept: usize,
        /// Experts that each token visits.
        top_k: usize,
    },
    /// A layer was told to keep an expert that it does not have.
    #[error("layer {layer}: expert {expert} does not exist among {num_experts}")]
    NoSuchExpert {
        /// Index of the layer.
        layer: usize,
        /// The expert.
        expert: usize,
        /// Experts of the layer.
        num_experts: usize,
    },
    /// A layer was told to keep an expert twice.
    #[error("layer {layer}: expert {expert} is kept twice")]
    KeptTwice {
        /// Index of the layer.
        layer: usize,
        /// The expert.
        expert: usize,
    },
    /// A rank would get no expert of a layer.
    #[error("layer {layer}: its experts must be spread over all {ranks} ranks of a row")]
    NotSpread {
        /// Index of the layer.
        layer: usize,
        /// Devices of a row.
        ranks: usize,
    },
    /// A model says that its experts lie where no parameter has room for them.
    #[error(
        "layer {layer}: no parameter has {blocks} x {experts} slices along axis {axis}: {shape:?}"
    )]
    ExpertAxis {
        /// Index of the layer.
        layer: usize,
        /// Blocks along the axis.
        blocks: usize,
        /// Experts of the layer.
        experts: usize,
        /// The axis.
        axis: usize,
        /// Shape of the parameter, if there is one of this id.
        shape: Option<Vec<usize>>,
    },
    /// Tensors are missing, superfluous or of the wrong shape; all of them are listed.
    #[error("the tensors do not fit the model: {}", .0.join("; "))]
    Tensors(Vec<String>),
    /// A device failed to compute or to hand over its results.
    #[error("the device failed: {0}")]
    Device(String),
}

impl ModelError {
    /// For `map_err` on what is read from a device.
    pub fn device(error: impl std::fmt::Display) -> Self {
        Self::Device(error.to_string())
    }
}
