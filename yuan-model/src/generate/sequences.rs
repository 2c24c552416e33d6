//! The sequences of a batch while they grow.

use rand::{SeedableRng, rngs::StdRng};

use super::{
    error::GenerateError,
    generation::{After, FinishReason, Generation, NewToken},
    options::GenerationOptions,
    prompt::Prompt,
};
use crate::Cache;

/// All sequences, and which of them are still computed.
pub(super) struct Sequences {
    all: Vec<Sequence>,
    /// Of every row of the batch, its sequence.
    rows: Vec<usize>,
}

impl Sequences {
    /// So many answers to each prompt.
    pub fn new(prompts: &[Prompt], answers: usize, options: &GenerationOptions) -> Self {
        let prompts = prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, answers));
        let all: Vec<Sequence> = prompts
            .enumerate()
            .map(|(index, prompt)| Sequence::new(index, prompt.tokens(), options))
            .collect();
        Self { rows: (0..all.len()).collect(), all }
    }

    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub fn len(&self) -> usize {
        self.all.len()
    }

    pub fn any_open(&self) -> bool {
        self.rows.iter().any(|&row| self.all[row].is_open())
    }

    /// One token more for every open sequence, of the scores of all rows.
    pub fn extend(
        &mut self,
        logits: &[f32],
        options: &GenerationOptions,
        cache: &mut Cache,
        mut on_token: impl FnMut(NewToken, &[u32]) -> After,
    ) -> Result<(), GenerateError> {
        let mut ends = false;
        let rows = logits.chunks(logits.len() / self.rows.len()).zip(&self.rows).enumerate();
        for (row, (logits, &sequence)) in rows {
            let sequence = &mut self.all[sequence];
            if !sequence.is_open() {
                continue;
            }
            let token = sequence.extend(logits, options)?;
            match on_token(NewToken { sequence: sequence.index, token }, &sequence.tokens) {
                After::GoOn => {}
                After::EndSequence => {
                    sequence.finish.get_or_insert(FinishReason::Cancelled);
                }
                After::EndAll => {
                    ends = true;
                    break;
                }
            }
            if !sequence.is_open() {
                cache.end(row);
            }
        }
        if ends {
            // Other ranks may go on, and this one with them, but nobody hears of more tokens.
            self.all.iter_mut().for_each(|sequence| {
                sequence.finish.get_or_insert(FinishReason::Cancelled);
            });
        }
        Ok(())
    }

    /// Leaves ended sequences out of the batch once at least half of its rows have ended, and returns the
    /// rows that stay. Where all have ended one row stays: over ranks the others wait for its tokens.
    pub fn keep_open(&mut self) -> Option<Vec<usize>> {
        let is_open = |row: &usize| self.all[self.rows[*row]].is_open();
        let mut open: Vec<usize> = (0..self.rows.len()).filter(is_open).collect();
        if open.is_empty() {
            open.push(0);
        }
        if open.len() * 2 > self.rows.len() {
            return None;
        }
        self.rows = open.iter().map(|&row| self.rows[row]).collect();
        Some(open)
    }

    /// What every row goes on with: its last token, also where nobody looks at what follows it.
    pub fn last_tokens(&self) -> impl Iterator<Item = u32> {
        self.rows.iter().map(|&row| self.all[row].tokens.last().copied().unwrap_or(0))
    }

    pub fn finish(self) -> Vec<Generation> {
        self.all.into_iter().map(Sequence::finish).collect()
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
        let mut sequence = Self {
            index,
            tokens: Vec::new(),
            seen: Vec::new(),
            rng: StdRng::seed_from_u64(options.seed_of(index)),
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
