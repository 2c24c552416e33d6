//! Text out of the model: one pass over the prompts, then one token of every sequence at a time.
//!
//! [`YuanModel::generate`] continues every prompt once. [`YuanModel::rollout`] gives several answers to
//! each, which share the pass over the prompt, and tells which experts were used.

use std::ops::ControlFlow;

use burn::{
    module::Module,
    tensor::{Device, Int, Tensor, TensorData, Transaction},
};

use crate::{
    Cache, ModelError, YuanModel,
    vision::{ImagePositions, placeholders, put_in_place},
};

mod error;
mod generation;
mod options;
mod prompt;
mod sampling;
mod sequences;

pub use error::GenerateError;
use generation::After;
pub use generation::{FinishReason, Generation, NewToken, Rollout};
pub use options::GenerationOptions;
pub use prompt::{ImageRows, Prompt};
pub use sampling::Sampling;
use sequences::Sequences;

impl YuanModel {
    /// Continues prompts of any lengths together, with or without [images](Prompt::with_images);
    /// `on_token` hears of every token as it comes and may end it all.
    ///
    /// # Errors
    ///
    /// An empty prompt, a token outside the vocabulary, images that do not fit the places of a prompt,
    /// or settings out of range, before anything is computed; scores that are not finite, or a device
    /// that fails.
    pub fn generate<P>(
        &self,
        prompts: &[P],
        options: &GenerationOptions,
        mut on_token: impl FnMut(NewToken) -> ControlFlow<()>,
    ) -> Result<Vec<Generation>, GenerateError>
    where
        P: Clone + Into<Prompt>,
    {
        let prompts: Vec<Prompt> = prompts.iter().cloned().map(Into::into).collect();
        let on_token = |new, _: &[u32]| match on_token(new) {
            ControlFlow::Continue(()) => After::GoOn,
            ControlFlow::Break(()) => After::EndAll,
        };
        Ok(self.grow(&prompts, 1, options, on_token)?.answers)
    }

    /// Several answers to each prompt: the prompt is read once, whatever their number. `on_token` hears
    /// of every token as it comes, with all tokens of its answer, and may end that answer.
    ///
    /// Answer `a` to prompt `p` is sequence `p · answers + a`, and
    /// [`seed_of`](GenerationOptions::seed_of) gives the seed with which it alone is drawn alike.
    /// Over ranks that share experts, all call this together, each with prompts of its own.
    ///
    /// # Errors
    ///
    /// As [`generate`](Self::generate), and if a rank is gone.
    ///
    /// ```
    /// use std::ops::ControlFlow;
    /// use burn::tensor::Device;
    /// use yuan_model::{GenerationOptions, YuanConfig, YuanModel, generate::Sampling};
    ///
    /// let model = YuanModel::new(&YuanConfig::tiny(96), &Device::flex())?;
    /// let options = GenerationOptions {
    ///     max_new_tokens: 4,
    ///     sampling: Sampling::unchanged(),
    ///     ..GenerationOptions::default()
    /// };
    /// let prompts = [vec![5, 17], vec![42]];
    /// let rollout = model.rollout(&prompts, 8, &options, |_, _| ControlFlow::Continue(()))?;
    /// assert_eq!(rollout.answers.len(), 16);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn rollout<P>(
        &self,
        prompts: &[P],
        answers: usize,
        options: &GenerationOptions,
        mut on_token: impl FnMut(NewToken, &[u32]) -> ControlFlow<()>,
    ) -> Result<Rollout, GenerateError>
    where
        P: Clone + Into<Prompt>,
    {
        let prompts: Vec<Prompt> = prompts.iter().cloned().map(Into::into).collect();
        let on_token = |new, tokens: &[u32]| match on_token(new, tokens) {
            ControlFlow::Continue(()) => After::GoOn,
            ControlFlow::Break(()) => After::EndSequence,
        };
        self.grow(&prompts, answers, options, on_token)
    }

    fn grow(
        &self,
        prompts: &[Prompt],
        answers: usize,
        options: &GenerationOptions,
        mut on_token: impl FnMut(NewToken, &[u32]) -> After,
    ) -> Result<Rollout, GenerateError> {
        options.sampling.validate()?;
        let places = self.check_prompts(prompts)?;
        let longest = prompts.iter().map(|prompt| prompt.tokens.len()).max().unwrap_or(0);
        let mut sequences = Sequences::new(prompts, answers, options);
        if sequences.is_empty() || options.max_new_tokens == 0 {
            let tokens_per_expert = Vec::new();
            return Ok(Rollout { answers: sequences.finish(), tokens_per_expert });
        }
        // Without a graph, which would otherwise grow with every token.
        let model = self.valid();
        let device = model.embedding.weight.val().device();
        let padding: Vec<usize> =
            prompts.iter().map(|prompt| longest - prompt.tokens.len()).collect();
        let capacity = longest.saturating_add(options.max_new_tokens - 1);
        if i32::try_from(capacity).is_err() {
            return Err(GenerateError::TooLong { tokens: capacity });
        }
        let mut cache = Cache::new(model.blocks.len(), padding, capacity);
        if options.image_positions == ImagePositions::Together {
            // The token after the last row is the first one that another position follows.
            let standing = places.iter().map(|places| places.last().map_or(0, |last| last + 1));
            cache = cache.with_standing(standing.collect());
        }
        let embedded = model.embed_prompts(prompts, &places, longest, &device);
        let mut loads = Loads::default();
        let mut logits = model.next_logits(embedded, &mut cache, &mut loads)?;
        let vocab = logits.len() / prompts.len();
        if answers > 1 {
            let shared: Vec<usize> = (0..sequences.len()).map(|row| row / answers).collect();
            cache = cache.select(&shared);
            logits = shared
                .iter()
                .flat_map(|&row| logits[row * vocab..(row + 1) * vocab].iter().copied())
                .collect();
        }
        loop {
            sequences.extend(&logits, options, &mut cache, &mut on_token)?;
            if !self.any_rank(sequences.any_open())? {
                let tokens_per_expert = loads.read()?;
                return Ok(Rollout { answers: sequences.finish(), tokens_per_expert });
            }
            if let Some(open) = sequences.keep_open() {
                cache = cache.select(&open);
            }
            let embedded = model.embed_tokens(sequences.last_tokens(), 1, &device);
            logits = model.next_logits(embedded, &mut cache, &mut loads)?;
        }
    }

    /// Whether something holds on any of the ranks that share experts: they go on together.
    fn any_rank(&self, holds: bool) -> Result<bool, GenerateError> {
        let Some(ranks) = self.ranks() else { return Ok(holds) };
        let counts = ranks.world().sum_counts(&[u64::from(holds)]);
        Ok(counts.map_err(|error| GenerateError::Device(error.to_string()))?[0] > 0)
    }

    /// Scores of the token after the last one of every row, `[batch · vocab]`.
    fn next_logits(
        &self,
        embedded: Tensor<3>,
        cache: &mut Cache,
        loads: &mut Loads,
    ) -> Result<Vec<f32>, GenerateError> {
        let tokens = embedded.dims()[1];
        let output = self.forward_cached_rows(embedded, cache);
        loads.add(output.tokens_per_expert);
        let logits = self.logits(output.hidden.slice_dim(1, tokens - 1..tokens));
        logits.try_into_vec_as::<f32>().map_err(|error| GenerateError::Device(error.to_string()))
    }

    /// The embedding of sequences of `seq` tokens each, `[batch, seq, hidden]`.
    fn embed_tokens(
        &self,
        tokens: impl Iterator<Item = u32>,
        seq: usize,
        device: &Device,
    ) -> Tensor<3> {
        let ids: Vec<i64> = tokens.map(i64::from).collect();
        let shape = [ids.len() / seq, seq];
        self.embed(Tensor::<2, Int>::from_data(TensorData::new(ids, shape), device), None)
    }

    /// Prompts that end together, `[batch, longest, hidden]`; what stands before the shorter ones has
    /// no influence.
    fn embed_prompts(
        &self,
        prompts: &[Prompt],
        places: &[Vec<usize>],
        longest: usize,
        device: &Device,
    ) -> Tensor<3> {
        let padding = |prompt: &Prompt| longest - prompt.tokens.len();
        let padded = prompts.iter().flat_map(|prompt| {
            std::iter::repeat_n(0, padding(prompt)).chain(prompt.tokens.iter().copied())
        });
        let text = self.embed_tokens(padded, longest, device);
        let rows: Vec<Tensor<2>> =
            prompts.iter().filter_map(|prompt| Some(prompt.images.clone()?.0)).collect();
        if rows.is_empty() {
            return text;
        }
        let in_batch =
            prompts.iter().zip(places).enumerate().flat_map(|(row, (prompt, places))| {
                let start = row * longest + padding(prompt);
                places.iter().map(move |place| start + place)
            });
        put_in_place(text, &in_batch.collect::<Vec<_>>(), Tensor::cat(rows, 0))
            .unwrap_or_else(|error| panic!("{error}: checked before"))
    }

    /// Where the rows of the images of every prompt go; prompts that cannot be continued are refused.
    fn check_prompts(&self, prompts: &[Prompt]) -> Result<Vec<Vec<usize>>, GenerateError> {
        let vocab_size = self.config().vocab_size;
        let check = |(sequence, prompt): (usize, &Prompt)| {
            if prompt.tokens.is_empty() {
                return Err(GenerateError::EmptyPrompt { sequence });
            }
            if let Some(&token) = prompt.tokens.iter().find(|&&id| id as usize >= vocab_size) {
                return Err(GenerateError::UnknownToken { sequence, token, vocab_size });
            }
            let Some(images) = &prompt.images else { return Ok(Vec::new()) };
            let refused = |error| GenerateError::Images { sequence, error };
            let config = self.config().images.as_ref();
            let config = config.ok_or_else(|| refused(ModelError::SeesNoImages))?;
            let places = placeholders(&prompt.tokens, config.placeholder);
            let ([rows, found], expected) = (images.rows().dims(), self.config().hidden_size);
            if found != expected {
                return Err(refused(ModelError::ImageWidth { found, expected }));
            }
            match places.len() == rows {
                true => Ok(places),
                false => Err(refused(ModelError::ImageRows { placeholders: places.len(), rows })),
            }
        };
        prompts.iter().enumerate().map(check).collect()
    }
}

/// Per layer: tokens that each expert received so far, on the device.
#[derive(Default)]
struct Loads(Vec<Tensor<1, Int>>);

impl Loads {
    fn add(&mut self, counts: Vec<Tensor<1, Int>>) {
        if self.0.is_empty() {
            self.0 = counts;
            return;
        }
        let sums = std::mem::take(&mut self.0).into_iter();
        self.0 = sums.zip(counts).map(|(sum, more)| sum + more).collect();
    }

    fn read(self) -> Result<Vec<Vec<u64>>, GenerateError> {
        let mut transaction = Transaction::default();
        for counts in self.0 {
            transaction = transaction.register(counts);
        }
        let read = transaction.try_execute();
        let read = read.map_err(|error| GenerateError::Device(error.to_string()))?.into_iter();
        let counts = |data: TensorData| {
            data.convert::<i64>().iter::<i64>().map(|count| count as u64).collect()
        };
        Ok(read.map(counts).collect())
    }
}
