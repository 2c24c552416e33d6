//! Text out of the model: one pass over the prompts, then one token of every sequence at a time.

use std::ops::ControlFlow;

use burn::{
    module::Module,
    tensor::{Device, Int, Tensor, TensorData},
};
use rand::{SeedableRng, rngs::StdRng};

use crate::{
    Cache, ModelError, YuanModel,
    vision::{ImagePositions, placeholders, put_in_place},
};

mod error;
mod prompt;
mod sampling;

pub use error::GenerateError;
pub use prompt::{ImageRows, Prompt};
pub use sampling::Sampling;

/// How sequences are continued.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationOptions {
    /// Tokens that a sequence may grow by.
    pub max_new_tokens: usize,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Tokens that end a sequence; they are part of it.
    pub stop_tokens: Vec<u32>,
    /// Decides the choices. Every sequence of a batch has a stream of its own, which neither the
    /// others nor the batch's size influence.
    pub seed: u64,
    /// Where the images of a prompt stand.
    pub image_positions: ImagePositions,
}

impl Default for GenerationOptions {
    /// 128 tokens, always the likeliest one, no stop tokens.
    fn default() -> Self {
        Self {
            max_new_tokens: 128,
            sampling: Sampling::greedy(),
            stop_tokens: Vec::new(),
            seed: 0,
            image_positions: ImagePositions::default(),
        }
    }
}

/// A token as it is generated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewToken {
    /// Its sequence.
    pub sequence: usize,
    /// Its id.
    pub token: u32,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// It reached a stop token.
    Stop,
    /// It grew by as many tokens as allowed.
    Length,
    /// The callback ended the generation.
    Cancelled,
}

/// The continuation of one prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    /// Its tokens, without the prompt.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: FinishReason,
}

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
        options.sampling.validate()?;
        let places = self.check_prompts(&prompts)?;
        let longest = prompts.iter().map(|prompt| prompt.tokens.len()).max().unwrap_or(0);
        let mut sequences: Vec<Sequence> = prompts
            .iter()
            .enumerate()
            .map(|(index, prompt)| Sequence::new(index, &prompt.tokens, options))
            .collect();
        if prompts.is_empty() || options.max_new_tokens == 0 {
            return Ok(sequences.into_iter().map(Sequence::finish).collect());
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
        let mut embedded = model.embed_prompts(&prompts, &places, longest, &device);
        loop {
            let logits = model.next_logits(embedded, &mut cache)?;
            let mut cancelled = false;
            let rows = logits.chunks(logits.len() / sequences.len()).zip(&mut sequences);
            for (logits, sequence) in rows.filter(|(_, sequence)| sequence.is_open()) {
                let token = sequence.extend(logits, options)?;
                cancelled = on_token(NewToken { sequence: sequence.index, token }).is_break();
                if cancelled {
                    break;
                }
            }
            if cancelled || !sequences.iter().any(Sequence::is_open) {
                return Ok(sequences.into_iter().map(Sequence::finish).collect());
            }
            // What follows an ended sequence is never looked at; it goes on with its last token.
            let last = |sequence: &Sequence| sequence.tokens.last().copied().unwrap_or(0);
            embedded = model.embed_tokens(sequences.iter().map(last), 1, &device);
        }
    }

    /// Scores of the token after the last one of every row, `[batch · vocab]`.
    fn next_logits(
        &self,
        embedded: Tensor<3>,
        cache: &mut Cache,
    ) -> Result<Vec<f32>, GenerateError> {
        let tokens = embedded.dims()[1];
        let hidden = self.forward_cached_rows(embedded, cache).hidden;
        let logits = self.logits(hidden.slice_dim(1, tokens - 1..tokens));
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

/// A sequence while it grows.
struct Sequence {
    index: usize,
    tokens: Vec<u32>,
    /// Tokens of prompt and continuation, which the repetition penalty makes less likely.
    seen: Vec<bool>,
    rng: StdRng,
    finish: Option<FinishReason>,
}

impl Sequence {
    fn new(index: usize, prompt: &[u32], options: &GenerationOptions) -> Self {
        // Neighbouring seeds and neighbouring sequences must not share a stream.
        let seed = options.seed.wrapping_add((index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut sequence = Self {
            index,
            tokens: Vec::new(),
            seen: Vec::new(),
            rng: StdRng::seed_from_u64(seed),
            finish: (options.max_new_tokens == 0).then_some(FinishReason::Length),
        };
        prompt.iter().for_each(|&token| sequence.see(token));
        sequence
    }

    fn see(&mut self, token: u32) {
        let token = token as usize;
        if self.seen.len() <= token {
            self.seen.resize(token + 1, false);
        }
        self.seen[token] = true;
    }

    fn is_open(&self) -> bool {
        self.finish.is_none()
    }

    fn extend(
        &mut self,
        logits: &[f32],
        options: &GenerationOptions,
    ) -> Result<u32, GenerateError> {
        let not_finite =
            GenerateError::NotFinite { sequence: self.index, position: self.tokens.len() };
        let token = options.sampling.choose(logits, &self.seen, &mut self.rng).ok_or(not_finite)?;
        self.tokens.push(token);
        self.see(token);
        if options.stop_tokens.contains(&token) {
            self.finish = Some(FinishReason::Stop);
        } else if self.tokens.len() == options.max_new_tokens {
            self.finish = Some(FinishReason::Length);
        }
        Ok(token)
    }

    fn finish(self) -> Generation {
        Generation { tokens: self.tokens, finish: self.finish.unwrap_or(FinishReason::Cancelled) }
    }
}
