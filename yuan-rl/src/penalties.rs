//! What a response loses by its length and by repeating itself.

use serde::{Deserialize, Serialize};

/// How long responses may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlong {
    /// Tokens of a response at most: L.
    pub max: usize,
    /// Tokens before that in which the penalty grows: b.
    pub buffer: usize,
}

/// −1 beyond `max` tokens; before, `min(−(length − (max − buffer)) / buffer, 0)` (DAPO's soft penalty).
///
/// ```
/// use yuan_rl::{Overlong, overlong_penalty};
///
/// let general = Overlong { max: 4096, buffer: 3072 };
/// assert_eq!(overlong_penalty(1024, general), 0.0);
/// assert_eq!(overlong_penalty(2560, general), -0.5);
/// assert_eq!(overlong_penalty(4097, general), -1.0);
/// ```
pub fn overlong_penalty(length: usize, limits: Overlong) -> f64 {
    let Overlong { max, buffer } = limits;
    if length > max {
        return -1.0;
    }
    let free = max.saturating_sub(buffer);
    let beyond = length.saturating_sub(free);
    // Without a buffer nothing is lost up to the end.
    if buffer == 0 { 0.0 } else { 0.0 - beyond as f64 / buffer as f64 }
}

/// When a response that is being generated is ended because it repeats itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepetitionLimits {
    /// Tokens of a part: N.
    pub part: usize,
    /// Times that the part must occur.
    pub times: usize,
    /// Tokens between looks.
    pub every: usize,
}

impl Default for RepetitionLimits {
    /// The paper's: 200 tokens, ten times, looked at every 1,024 tokens.
    fn default() -> Self {
        Self { part: 200, times: 10, every: 1024 }
    }
}

/// Whether a response's last tokens have occurred so often in it, without overlapping, that it is to be
/// ended. The paper says neither which parts are compared nor how; the last one is.
///
/// Linear in the tokens.
pub fn repeats(tokens: &[u32], limits: RepetitionLimits) -> bool {
    let RepetitionLimits { part, times, .. } = limits;
    if part == 0 || tokens.len() < part.saturating_mul(times) {
        return false;
    }
    // Backwards, so that the last occurrence is one of those that do not overlap.
    let wanted: Vec<u32> = tokens.iter().rev().take(part).copied().collect();
    let borders = borders(&wanted);
    let (mut matched, mut found) = (0, 0);
    for &token in tokens.iter().rev() {
        while matched > 0 && token != wanted[matched] {
            matched = borders[matched - 1];
        }
        matched += usize::from(token == wanted[matched]);
        if matched == part {
            found += 1;
            matched = 0;
        }
    }
    found >= times
}

/// For each token of a part, how much of the part's beginning ends there (Knuth, Morris and Pratt).
fn borders(part: &[u32]) -> Vec<usize> {
    let mut borders = vec![0; part.len()];
    for at in 1..part.len() {
        let mut length: usize = borders[at - 1];
        while length > 0 && part[at] != part[length] {
            length = borders[length - 1];
        }
        borders[at] = length + usize::from(part[at] == part[length]);
    }
    borders
}

/// −1 if a fifth or more of a response's groups of 20 tokens have occurred in it before, else 0.
pub fn repetition_penalty(tokens: &[u32]) -> f64 {
    const GROUP: usize = 20;
    const SHARE: f64 = 0.2;
    let total = (tokens.len() + 1).saturating_sub(GROUP);
    let unique: std::collections::HashSet<&[u32]> = tokens.windows(GROUP).collect();
    let repeated = total > 0 && 1.0 - unique.len() as f64 / total as f64 >= SHARE;
    if repeated { -1.0 } else { 0.0 }
}
