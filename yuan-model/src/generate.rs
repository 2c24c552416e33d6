//! Text out of the model: one pass over the prompts, then one token of every sequence at a time.

use std::ops::ControlFlow;

use burn::{
    module::Module,
    tensor::{Device, Int, Tensor, TensorData},
};
use rand::{SeedableRng, rngs::StdRng};

use crate::{Cache, YuanModel};

mod error;
mod sampling;

pub use error::GenerateError;
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
}

impl Default for GenerationOptions {
    /// 128 tokens, always the likeliest one, no stop tokens.
    fn default() -> Self {
        Self { max_new_tokens: 128, sampling: Sampling::greedy(), stop_tokens: Vec::new(), seed: 0 }
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
    /// Continues prompts of any lengths together; `on_token` hears of every token as it comes and
    /// may end it all.
    ///
    /// # Errors
    ///
    /// An empty prompt, a token outside the vocabulary, or settings out of range, before anything
    /// is computed; scores that are not finite, or a device that fails.
    pub fn generate(
        &self,
        prompts: &[Vec<u32>],
        options: &GenerationOptions,
        mut on_token: impl FnMut(NewToken) -> ControlFlow<()>,
    ) -> Result<Vec<Generation>, GenerateError> {
        options.sampling.validate()?;
        check_prompts(prompts, self.config().vocab_size)?;
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let mut sequences: Vec<Sequence> = prompts
            .iter()
            .enumerate()
            .map(|(index, prompt)| Sequence::new(index, prompt, options))
            .collect();
        if prompts.is_empty() || options.max_new_tokens == 0 {
            return Ok(sequences.into_iter().map(Sequence::finish).collect());
        }
        // Without a graph, which would otherwise grow with every token.
        let model = self.valid();
        let device = model.embedding.weight.val().device();
        let padding = prompts.iter().map(|prompt| longest - prompt.len()).collect();
        let capacity = longest.saturating_add(options.max_new_tokens - 1);
        if i32::try_from(capacity).is_err() {
            return Err(GenerateError::TooLong { tokens: capacity });
        }
        let mut cache = Cache::new(model.blocks.len(), padding, capacity);
        let mut input = padded(prompts, longest);
        loop {
            let logits = model.next_logits(&input, &mut cache, &device)?;
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
            input = sequences.iter().map(|sequence| vec![last(sequence)]).collect();
        }
    }

    /// Scores of the token after the last one of every row, `[batch · vocab]`.
    fn next_logits(
        &self,
        rows: &[Vec<u32>],
        cache: &mut Cache,
        device: &Device,
    ) -> Result<Vec<f32>, GenerateError> {
        let [batch, tokens] = [rows.len(), rows[0].len()];
        let ids: Vec<i64> = rows.iter().flatten().map(|&token| i64::from(token)).collect();
        let input_ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [batch, tokens]), device);
        let hidden = self.forward_cached(input_ids, cache).hidden;
        let logits = self.logits(hidden.slice_dim(1, tokens - 1..tokens));
        logits.try_into_vec_as::<f32>().map_err(|error| GenerateError::Device(error.to_string()))
    }
}

fn check_prompts(prompts: &[Vec<u32>], vocab_size: usize) -> Result<(), GenerateError> {
    for (sequence, prompt) in prompts.iter().enumerate() {
        if prompt.is_empty() {
            return Err(GenerateError::EmptyPrompt { sequence });
        }
        if let Some(&token) = prompt.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(GenerateError::UnknownToken { sequence, token, vocab_size });
        }
    }
    Ok(())
}

/// Prompts that end together; what stands before the shorter ones has no influence.
fn padded(prompts: &[Vec<u32>], longest: usize) -> Vec<Vec<u32>> {
    let pad = |prompt: &Vec<u32>| [vec![0; longest - prompt.len()], prompt.clone()].concat();
    prompts.iter().map(pad).collect()
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
