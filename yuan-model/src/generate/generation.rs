//! What becomes of prompts: tokens as they come, and whole continuations.

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
    /// The callback ended the generation, or this sequence of it.
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

/// Answers to some prompts, and what they cost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rollout {
    /// The answers to the first prompt, then those to the second one, and so on.
    pub answers: Vec<Generation>,
    /// Per layer: tokens that each expert received. A prompt counts once, and what is computed after the
    /// end of an answer does not. Over ranks, those of this one; empty where nothing was computed.
    pub tokens_per_expert: Vec<Vec<u64>>,
}

/// How it goes on after a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    GoOn,
    EndSequence,
    EndAll,
}
