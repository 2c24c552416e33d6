//! What is asked.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::Gold;

/// One question of a benchmark.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Tells it from all others of the benchmark: `doc2dial:17`.
    pub id: String,
    /// The set that it belongs to.
    pub set: String,
    /// What a model is asked, as one message of a user.
    pub prompt: String,
    /// Images that the question is about, in order.
    pub images: Vec<PathBuf>,
    /// What is right.
    pub gold: Gold,
}

/// A turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}
