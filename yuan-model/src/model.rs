//! The whole language model: embedding → blocks → norm → head.

use burn::{
    module::{Initializer, Module},
    nn::{Embedding, EmbeddingConfig, Linear, LinearConfig},
    tensor::{Bool, Device, FloatDType, Int, Tensor, TensorData},
};

use crate::{
    Batch, BatchImages, Block, Cache, ConfigError, LossOutput, ModelError, ObjectiveLoss,
    ScoredLabels, YuanConfig,
    attention::{DocumentMask, project},
    layers::{LayerOutput, LayerSums, through_layers},
    loss::{ROWS_AT_ONCE, masked_mean, token_losses},
    moe::{BalanceLosses, MoeOptions},
    norm::RmsNorm,
    ops,
    rope::Rotary,
    vision::ImagePositions,
    vision::{ImageEncoder, put_in_place},
};

/// A Yuan3.0 language model.
///
/// ```
/// use burn::tensor::{Device, Int, Tensor};
/// use yuan_model::{ForwardOptions, YuanConfig, YuanModel};
///
/// let device = Device::flex();
/// let model = YuanModel::new(&YuanConfig::tiny(96), &device)?;
/// let input_ids = Tensor::<2, Int>::from_data([[5, 17, 42, 8]], &device);
/// let output = model.forward(input_ids, ForwardOptions::default());
/// assert_eq!(output.logits.dims(), [1, 4, 96]);
/// # Ok::<(), yuan_model::ConfigError>(())
/// ```
#[derive(Module, Debug)]
pub struct YuanModel {
    /// `[vocab, hidden]`
    pub embedding: Embedding,
    /// The layers, first one first.
    pub blocks: Vec<Block>,
    /// Norm before the head.
    pub final_norm: RmsNorm,
    /// `[hidden, vocab]`, not tied to the embedding.
    pub head: Linear,
    /// What sees images, if anything does.
    pub images: Option<ImageEncoder>,
    #[module(skip)]
    config: YuanConfig,
}

/// What a forward pass may be given beside the tokens.
#[derive(Debug, Clone, Default)]
pub struct ForwardOptions {
    /// Position of every token in its document, `[batch, seq]`; absent: `0..seq`.
    pub position_ids: Option<Tensor<2, Int>>,
    /// True where a token is padding, `[batch, seq]`; padding is not counted in
    /// `tokens_per_expert`.
    pub padding: Option<Tensor<2, Bool>>,
    /// One bias per layer, `[num_experts]`, added to the router's logits when experts are chosen.
    pub selection_bias: Option<Vec<Tensor<1>>>,
    /// Losses that pull the experts of every layer towards equal load.
    pub balance: BalanceLosses,
    /// Type of activations and products; absent: that of the embedding. Parameters stay what they
    /// are, and router, norms, softmax and loss are computed in f32 whatever it is.
    pub compute_dtype: Option<FloatDType>,
}

/// Hidden states and expert loads of a forward pass.
#[derive(Debug, Clone)]
pub struct HiddenOutput {
    /// Normed output of the last layer, `[batch, seq, hidden]`.
    pub hidden: Tensor<3>,
    /// Per layer: tokens that each expert received, padding excluded, `[num_experts]`.
    pub tokens_per_expert: Vec<Tensor<1, Int>>,
    /// Weighted sum of the balancing losses of all layers, `[1]`, if any is on.
    pub balance_loss: Option<Tensor<1>>,
}

/// Logits and expert loads of a forward pass.
#[derive(Debug, Clone)]
pub struct ModelOutput {
    /// `[batch, seq, vocab]`
    pub logits: Tensor<3>,
    /// Per layer: tokens that each expert received, padding excluded, `[num_experts]`.
    pub tokens_per_expert: Vec<Tensor<1, Int>>,
    /// Weighted sum of the balancing losses of all layers, `[1]`, if any is on.
    pub balance_loss: Option<Tensor<1>>,
}

impl YuanModel {
    /// A freshly initialised model; its weights are drawn from the device's random state.
    ///
    /// # Errors
    ///
    /// If the configuration contradicts itself.
    pub fn new(config: &YuanConfig, device: &Device) -> Result<Self, ConfigError> {
        config.validate()?;
        let normal = |std| Initializer::Normal { mean: 0.0, std };
        let embedding_std = config.embedding_init_std.unwrap_or(config.init_std);
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let images = config.images.as_ref();
        Ok(Self {
            embedding: EmbeddingConfig::new(vocab, hidden)
                .with_initializer(normal(embedding_std))
                .init(device),
            blocks: (0..config.num_layers())
                .map(|layer| Block::new(config, layer, device))
                .collect(),
            final_norm: RmsNorm::new(hidden, config.norm_epsilon, device),
            head: LinearConfig::new(hidden, vocab)
                .with_bias(false)
                .with_initializer(normal(config.init_std))
                .init(device),
            images: images.map(|images| ImageEncoder::new(images, config, device)).transpose()?,
            config: config.clone(),
        })
    }

    /// What the model is; after [`keep_experts`](crate::PrunableExperts::keep_experts), what it has
    /// become.
    pub fn config(&self) -> &YuanConfig {
        &self.config
    }

    pub(crate) fn config_mut(&mut self) -> &mut YuanConfig {
        &mut self.config
    }

    /// Logits for every position of `input_ids`, `[batch, seq]`.
    ///
    /// # Panics
    ///
    /// If a token lies outside the vocabulary or the options have other shapes than the input.
    pub fn forward(&self, input_ids: Tensor<2, Int>, options: ForwardOptions) -> ModelOutput {
        let HiddenOutput { hidden, tokens_per_expert, balance_loss } =
            self.forward_hidden(input_ids, options);
        ModelOutput { logits: self.logits(hidden), tokens_per_expert, balance_loss }
    }

    /// Normed hidden states for every position: the forward pass less the head.
    pub fn forward_hidden(
        &self,
        input_ids: Tensor<2, Int>,
        options: ForwardOptions,
    ) -> HiddenOutput {
        let [_, seq] = input_ids.dims();
        let documents = match (&options.position_ids, self.config.isolate_documents) {
            (Some(position_ids), true) => Some(DocumentMask::new(position_ids.clone())),
            _ => None,
        };
        let rotary = Rotary::new(&self.config, options.position_ids, seq, &input_ids.device());
        let x = self.embed(input_ids, options.compute_dtype);
        let (x, sums) = through_layers(self.blocks.len(), x, |layer, x| {
            let moe = MoeOptions {
                selection_bias: options.selection_bias.as_ref().map(|bias| bias[layer].clone()),
                padding: options.padding.clone(),
                balance: options.balance,
                of_images: None,
            };
            self.blocks[layer].forward(x, &rotary, documents.as_ref(), moe)
        });
        self.hidden_output(x, sums)
    }

    fn hidden_output(&self, x: Tensor<3>, sums: LayerSums) -> HiddenOutput {
        HiddenOutput {
            hidden: self.final_norm.forward(x),
            tokens_per_expert: sums.tokens_per_expert,
            balance_loss: sums.balance_loss,
        }
    }

    /// Normed hidden states of new tokens, `[batch, tokens]`, after those in the cache, which they
    /// join.
    ///
    /// Equal to the last positions of [`forward_hidden`](Self::forward_hidden) over all tokens; a
    /// whole prompt is one call. No gradient flows through the cache.
    ///
    /// # Panics
    ///
    /// If the cache is of another number of layers or sequences, or has no room for the tokens.
    pub fn forward_cached(&self, input_ids: Tensor<2, Int>, cache: &mut Cache) -> HiddenOutput {
        self.forward_cached_rows(self.embed(input_ids, None), cache)
    }

    /// The same for rows of the embedding, `[batch, tokens, hidden]`, among which those of images
    /// may be.
    ///
    /// # Panics
    ///
    /// As [`forward_cached`](Self::forward_cached).
    pub fn forward_cached_rows(&self, x: Tensor<3>, cache: &mut Cache) -> HiddenOutput {
        let ([batch, tokens, _], device) = (x.dims(), x.device());
        assert_eq!(batch, cache.batch(), "sequences of the cache");
        let (layers, span) = cache.split(tokens);
        assert_eq!(layers.len(), self.blocks.len(), "layers of the cache");
        let rotary = Rotary::new(&self.config, Some(span.position_ids(&device)), tokens, &device);
        let padding = span.padding_mask(&device);
        let real = padding.clone().map(|padding| padding.bool_not().float().unsqueeze_dim::<3>(2));
        let (x, sums) = through_layers(self.blocks.len(), x, |layer, x| {
            let options = MoeOptions { padding: padding.clone(), ..MoeOptions::default() };
            let (block, cached) = (&self.blocks[layer], &mut layers[layer]);
            let real = real.as_ref();
            block.forward_cached(x, &rotary, cached, &span, real, options)
        });
        cache.advance(tokens);
        self.hidden_output(x, sums)
    }

    /// The table's rows of `[batch, seq]` tokens, in the given type or the table's: `[batch, seq,
    /// hidden]`.
    pub fn embed(&self, input_ids: Tensor<2, Int>, dtype: Option<FloatDType>) -> Tensor<3> {
        let ([batch, seq], weight) = (input_ids.dims(), self.embedding.weight.val());
        let dtype = dtype.unwrap_or_else(|| weight.dtype().into());
        ops::embed(weight, input_ids.reshape([batch * seq]), dtype).reshape([
            batch,
            seq,
            self.config.hidden_size,
        ])
    }

    /// The head alone: `[batch, seq, hidden]` → `[batch, seq, vocab]`.
    pub fn logits(&self, hidden: Tensor<3>) -> Tensor<3> {
        let logits = project(&self.head, hidden);
        if self.config.logit_scale == 1.0 {
            logits
        } else {
            logits.mul_scalar(self.config.logit_scale)
        }
    }

    /// Cross-entropy of every position of `hidden`, `[batch, seq, hidden]`, for labels `[batch,
    /// seq]`, in f32.
    ///
    /// The same as [`loss::token_losses`](token_losses) of [`logits`](Self::logits), but of more
    /// than [`ROWS_AT_ONCE`] rows the logits never exist at once: the head's product and its
    /// gradient go over so many rows at a time, and the gradient forms the logits again.
    pub fn token_losses(&self, hidden: Tensor<3>, labels: Tensor<2, Int>) -> Tensor<2> {
        let [batch, seq, width] = hidden.dims();
        if batch * seq <= ROWS_AT_ONCE {
            return token_losses(self.logits(hidden), labels);
        }
        let weight = self.head.weight.val().cast(hidden.dtype());
        let (rows, labels) = (hidden.reshape([batch * seq, width]), labels.reshape([batch * seq]));
        let scale = self.config().logit_scale;
        ops::linear_cross_entropy(rows, weight, labels, scale, ROWS_AT_ONCE).reshape([batch, seq])
    }

    /// The same model with attention kept inside the documents of a row
    /// ([`YuanConfig::isolate_documents`]).
    #[must_use]
    pub fn with_isolated_documents(mut self) -> Self {
        self.config.isolate_documents = true;
        self
    }

    /// The same model with a rule of positions that its training has images by
    /// ([`ImageConfig::positions`](crate::vision::ImageConfig::positions)).
    #[must_use]
    pub fn with_image_positions(mut self, positions: ImagePositions) -> Self {
        if let Some(images) = &mut self.config.images {
            images.positions = Some(positions);
        }
        self
    }

    /// Adds a number to the selection bias of every expert of every layer; without biases, nothing
    /// happens.
    ///
    /// Balancing without an auxiliary loss (DeepSeek-V3, §2.1.2) lowers those of busy experts after
    /// each step and raises the others'.
    ///
    /// # Panics
    ///
    /// If there are not as many numbers as experts.
    pub fn shift_selection_bias(mut self, shifts: &[Vec<f32>]) -> Self {
        for (block, shift) in self.blocks.iter_mut().zip(shifts) {
            let router = &mut block.moe.router;
            router.selection_bias = router.selection_bias.take().map(|bias| {
                bias.map(|bias| {
                    let shift = Tensor::<1>::from_data(shift.as_slice(), &bias.device());
                    let shift = shift.cast(bias.dtype());
                    (bias + shift).detach()
                })
            });
        }
        self
    }
}

/// A batch, and what follows from the positions of its tokens.
#[derive(Debug)]
pub struct Inputs {
    batch: Batch,
    rotary: Rotary,
    documents: Option<DocumentMask>,
    /// True where a token is a row of an image, `[batch, seq]`.
    of_images: Option<Tensor<2, Bool>>,
}

impl Inputs {
    /// The images of the batch, if it has any.
    pub fn images(&self) -> Option<&BatchImages> {
        self.batch.images.as_ref()
    }
}

/// The model as its layers, for what runs them one by one: embedding → layers → loss.
impl YuanModel {
    /// Prepares a batch: positions and documents.
    pub fn inputs(&self, batch: Batch) -> Inputs {
        let ([rows, seq], device) = (batch.input_ids.dims(), batch.input_ids.device());
        let positions = batch.position_ids.clone();
        let of_images = batch.images.as_ref().map(|images| {
            let mut mask = vec![false; rows * seq];
            images.places.iter().for_each(|&place| mask[place] = true);
            Tensor::from_data(TensorData::new(mask, [rows, seq]), &device)
        });
        let documents = self.config.isolate_documents.then(|| DocumentMask::new(positions.clone()));
        let rotary = Rotary::new(&self.config, Some(positions), seq, &device);
        Inputs { batch, rotary, documents, of_images }
    }

    /// The rows of a batch's images, `[rows, hidden]`; none of a batch of text.
    ///
    /// # Panics
    ///
    /// If the model sees no images.
    pub fn image_rows(&self, inputs: &Inputs, dtype: FloatDType) -> Option<Tensor<2>> {
        let images = inputs.batch.images.as_ref()?;
        let encoder = self.images.as_ref().expect("images are given to a model that sees them");
        let part = |part| encoder.forward(images.tiles.clone().slice_dim(0, part).cast(dtype));
        Some(Tensor::cat(ImageEncoder::parts(images.tiles.dims()[0]).map(part).collect(), 0))
    }

    /// The embedding of a batch's tokens in the type to compute in, `[batch, seq, hidden]`, with
    /// the rows of its images in their places.
    ///
    /// # Panics
    ///
    /// If there are not as many places as rows.
    pub fn embed_inputs(
        &self,
        inputs: &Inputs,
        rows: Option<Tensor<2>>,
        dtype: FloatDType,
    ) -> Tensor<3> {
        let text = self.embed(inputs.batch.input_ids.clone(), Some(dtype));
        match (rows, &inputs.batch.images) {
            (Some(rows), Some(images)) => {
                put_in_place(text, &images.places, rows).unwrap_or_else(|error| panic!("{error}"))
            }
            _ => text,
        }
    }

    /// Checks that the images of a batch fit the model and the places that its rows keep for them.
    ///
    /// # Errors
    ///
    /// If the model sees none, or there are more or fewer places than rows.
    pub fn check_images(&self, batch: &Batch) -> Result<(), ModelError> {
        let Some(images) = &batch.images else { return Ok(()) };
        let config = self.config.images.as_ref().ok_or(ModelError::SeesNoImages)?;
        let [tiles, _, height, width] = images.tiles.dims();
        let (side, [batch, seq]) = (config.tower.image_size, batch.input_ids.dims());
        if [height, width] != [side; 2] {
            return Err(ModelError::TileSize { found: [width, height], expected: side });
        }
        if images.places.iter().any(|&place| place >= batch * seq) {
            return Err(ModelError::ImagePlace { tokens: batch * seq });
        }
        let rows = tiles * config.tower.tokens_per_tile();
        match images.places.len() == rows {
            true => Ok(()),
            false => Err(ModelError::ImageRows { placeholders: images.places.len(), rows }),
        }
    }

    /// One layer; `x` is the residual stream, `[batch, seq, hidden]`.
    ///
    /// # Panics
    ///
    /// If the device fails, or a rank is gone.
    pub fn layer(
        &self,
        layer: usize,
        x: Tensor<3>,
        inputs: &Inputs,
        balance: BalanceLosses,
    ) -> LayerOutput {
        let padding = inputs.batch.mask.as_ref().and_then(|mask| mask.padding.clone());
        let of_images = inputs.of_images.clone();
        let options = MoeOptions { balance, padding, of_images, ..MoeOptions::default() };
        self.blocks[layer].forward(x, &inputs.rotary, inputs.documents.as_ref(), options)
    }

    /// What is minimised of what the last layer left, `[batch, seq, hidden]`: the mean
    /// cross-entropy over the learnt labels, or what the batch's objective makes of them; over
    /// ranks, the share of this one.
    pub fn loss_of_hidden(&self, x: Tensor<3>, inputs: &Inputs) -> ObjectiveLoss {
        let batch = &inputs.batch;
        let hidden = self.final_norm.forward(x);
        let mask = batch.mask.as_ref().map(|mask| mask.learnt.clone());
        let loss = match &batch.objective {
            None => {
                let losses = self.token_losses(hidden, batch.labels.clone());
                ObjectiveLoss::new(masked_mean(losses, mask))
            }
            Some(objective) => {
                let entropies = objective
                    .wants_entropies()
                    .then(|| self.token_entropies(hidden.clone().detach()));
                let log_probs = self.token_losses(hidden, batch.labels.clone()).neg();
                let mask = mask.unwrap_or_else(|| log_probs.ones_like().detach());
                let signals = batch.signals.clone();
                objective.loss(ScoredLabels { log_probs, entropies, mask, signals })
            }
        };
        match batch.share {
            Some(share) => loss.times(share),
            None => loss,
        }
    }

    /// Entropies of what every position of `hidden`, `[batch, seq, hidden]`, says of the next
    /// token, in nats and f32, `[batch, seq]`; some rows at a time, without a gradient.
    pub fn token_entropies(&self, hidden: Tensor<3>) -> Tensor<2> {
        let [batch, seq, width] = hidden.dims();
        let rows = hidden.detach().reshape([1, batch * seq, width]);
        let model = self.clone().no_grad();
        let entropies = |rows: Tensor<3>| {
            let logits = model.logits(rows).cast(FloatDType::F32);
            let shifted = logits.clone() - logits.max_dim(2);
            let exponentials = shifted.clone().exp();
            let sum = exponentials.clone().sum_dim(2);
            sum.clone().log() - (exponentials * shifted).sum_dim(2) / sum
        };
        let pieces = (0..batch * seq).step_by(ROWS_AT_ONCE).map(|start| {
            let end = (start + ROWS_AT_ONCE).min(batch * seq);
            entropies(rows.clone().slice_dim(1, start..end))
        });
        Tensor::cat(pieces.collect(), 1).reshape([batch, seq])
    }

    /// Logarithms of the probabilities of a batch's labels, `[batch, seq]`, in f32 and without a
    /// graph; activations and products are in `dtype`.
    ///
    /// # Panics
    ///
    /// If the device fails, or a rank is gone.
    pub fn label_log_probs(&self, batch: Batch, dtype: FloatDType) -> Tensor<2> {
        let labels = batch.labels.clone();
        let inputs = self.inputs(batch);
        let rows = self.image_rows(&inputs, dtype);
        let embedded = self.embed_inputs(&inputs, rows, dtype);
        let layer = |layer, x| self.layer(layer, x, &inputs, BalanceLosses::default());
        let (x, _) = through_layers(self.blocks.len(), embedded, layer);
        self.token_losses(self.final_norm.forward(x), labels).neg()
    }

    /// Loss of a batch, with a graph of all layers where the device records one; activations and
    /// products are in `dtype`.
    ///
    /// # Panics
    ///
    /// If the device fails, or a rank is gone.
    pub fn loss(&self, batch: Batch, balance: BalanceLosses, dtype: FloatDType) -> LossOutput {
        let inputs = self.inputs(batch);
        let rows = self.image_rows(&inputs, dtype);
        let embedded = self.embed_inputs(&inputs, rows, dtype);
        let layer = |layer, x| self.layer(layer, x, &inputs, balance);
        let (x, sums) = through_layers(self.blocks.len(), embedded, layer);
        sums.with_loss(self.loss_of_hidden(x, &inputs))
    }
}
