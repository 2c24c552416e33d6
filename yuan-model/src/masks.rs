//! Loss masks and position ids of packed rows, by the rules of upstream's data code.
//!
//! A row holds several documents, each ended by `eod`; inside a document a separator `sep` may
//! stand between prompt and answer. Pre-training ([`document_position_ids`]) learns every token;
//! instruction tuning ([`answer_mask`]) learns the answers only.

use serde::{Deserialize, Serialize};

/// Why no mask could be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MaskError {
    /// A row has documents that end but never separate prompt and answer.
    #[error("the row has {documents} end-of-document tokens but only {separators} separators")]
    MissingSeparators {
        /// End-of-document tokens in the row.
        documents: usize,
        /// Separators in the row.
        separators: usize,
    },
}

/// Position of every token in its document: restarts after each `eod`, which keeps its own
/// position.
pub fn document_position_ids(input_ids: &[u32], eod: u32) -> Vec<u32> {
    let mut next = 0;
    let position = |&token: &u32| {
        let position = next;
        next = if token == eod { 0 } else { next + 1 };
        position
    };
    input_ids.iter().map(position).collect()
}

/// Zero where the input is `eod`: the prediction across a border of documents is not learnt.
pub fn border_mask(input_ids: &[u32], eod: u32) -> Vec<bool> {
    input_ids.iter().map(|&token| token != eod).collect()
}

/// Megatron's rule for text rows: the loss covers each answer and its `eod`, not prompt nor
/// separator.
///
/// `labels` is the row shifted by one. Tokens after the last `eod` stay in the loss, and so
/// does padding, as upstream has it.
///
/// # Errors
///
/// Refuses a row with more `eod` than `sep`.
pub fn answer_mask(labels: &[u32], eod: u32, sep: u32) -> Result<Vec<bool>, MaskError> {
    let (ends, separators) = (positions(labels, eod), positions(labels, sep));
    let mut mask = vec![true; labels.len()];
    if ends.len() > separators.len() {
        return Err(MaskError::MissingSeparators {
            documents: ends.len(),
            separators: separators.len(),
        });
    }
    if ends.is_empty() {
        if let [only] = separators[..] {
            mask[..=only].fill(false);
        }
        return Ok(mask);
    }
    let balanced = ends.len() == separators.len();
    let mut previous_end = None;
    for (i, &end) in ends.iter().enumerate() {
        // Just after the previous document; the very first one starts with the row.
        let start = previous_end.map_or(0, |p| p + 1);
        let separator = if balanced {
            let from = previous_end.unwrap_or(0);
            separators.iter().copied().find(|q| (from..end).contains(q))
        } else {
            separators.iter().copied().rfind(|&q| q < end)
        };
        if let Some(separator) = separator.filter(|&q| q >= start) {
            mask[start..=separator].fill(false);
        }
        if balanced
            && i > 0
            && i + 1 == ends.len()
            && let Some(&trailing) = separators.iter().find(|&&q| q >= end)
        {
            mask[end + 1..=trailing].fill(false);
        }
        previous_end = Some(end);
    }
    Ok(mask)
}

/// The rule of upstream's Hugging Face class (`get_loss_mask`), over inputs; kept for comparison.
pub fn hugging_face_mask(input_ids: &[u32], eod: u32, sep: u32) -> Vec<bool> {
    let (ends, separators) = (positions(input_ids, eod), positions(input_ids, sep));
    let mut mask = vec![true; input_ids.len()];
    let (Some(&first_end), Some(&first_separator)) = (ends.first(), separators.first()) else {
        return mask;
    };
    if first_end > first_separator {
        mask[..first_separator].fill(false);
        if ends.len() > separators.len() {
            mask.fill(true);
        } else {
            for (i, &end) in ends.iter().enumerate() {
                clear(&mut mask, end, separators.get(i + 1).copied());
            }
        }
    } else if ends.len() >= separators.len() {
        for (i, &end) in ends.iter().enumerate() {
            clear(&mut mask, end, separators.get(i).copied());
        }
    }
    for end in ends {
        mask[end] = true;
    }
    mask
}

/// Markers of rows that hold images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageMarkers {
    /// Begin of a document.
    pub bos: u32,
    /// End of a document.
    pub eod: u32,
    /// Placeholder of image tokens, and padding.
    pub pad: u32,
    /// Separator between prompt and answer.
    pub sep: u32,
    /// Before the tokens of an image.
    pub image_start: u32,
    /// After the tokens of an image.
    pub image_end: u32,
}

/// Megatron's rule for rows with images, over inputs: answers only, and no marker is learnt from.
pub fn image_row_mask(input_ids: &[u32], markers: &ImageMarkers) -> Vec<bool> {
    let never = [markers.bos, markers.image_start, markers.eod, markers.pad];
    let mut in_prompt = false;
    let learnt = |&token: &u32| {
        in_prompt = (in_prompt || token == markers.bos) && token != markers.sep;
        !in_prompt && !never.contains(&token)
    };
    input_ids.iter().map(learnt).collect()
}

/// Megatron's positions for rows with images: 0 up to the last image-end of each document, then
/// counting.
pub fn image_row_position_ids(input_ids: &[u32], markers: &ImageMarkers) -> Vec<u32> {
    let mut position_ids = Vec::with_capacity(input_ids.len());
    for document in input_ids.split_inclusive(|&token| token == markers.eod) {
        let counted_from =
            document.iter().rposition(|&token| token == markers.image_end).unwrap_or(0);
        position_ids.extend((0..document.len()).map(|i| i.saturating_sub(counted_from) as u32));
    }
    position_ids
}

fn positions(tokens: &[u32], wanted: u32) -> Vec<usize> {
    tokens.iter().enumerate().filter(|(_, token)| **token == wanted).map(|(i, _)| i).collect()
}

/// Clears `[from, to)`, to the end where there is no `to`.
fn clear(mask: &mut [bool], from: usize, to: Option<usize>) {
    let to = to.unwrap_or(mask.len());
    if from < to {
        mask[from..to].fill(false);
    }
}
