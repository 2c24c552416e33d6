//! How sequences are continued.

use super::sampling::Sampling;
use crate::vision::ImagePositions;

/// How sequences are continued.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationOptions {
    /// Tokens that a sequence may grow by.
    pub max_new_tokens: usize,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Tokens that end a sequence; they are part of it.
    pub stop_tokens: Vec<u32>,
    /// Decides the choices. Every sequence of a batch has a stream of its own
    /// ([`seed_of`](Self::seed_of)), which neither the others nor the batch's size influence.
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

impl GenerationOptions {
    /// The seed with which a sequence of a batch is drawn alike when it is the only one.
    pub fn seed_of(&self, sequence: usize) -> u64 {
        // Neighbouring seeds and neighbouring sequences must not share a stream.
        self.seed.wrapping_add((sequence as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }
}
