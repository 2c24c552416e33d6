//! What a model remembers of the tokens it has read, so that the next one costs only itself.

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};

use crate::ops;

/// Keys, values and filter memories of a batch of sequences that grow together.
///
/// Sequences of unequal length start with padding, so that all of them end at the same place.
#[derive(Debug, Clone)]
pub struct Cache {
    layers: Vec<LayerCache>,
    padding: Vec<usize>,
    /// Tokens of each sequence at position 0, but for the first one.
    standing: Vec<usize>,
    length: usize,
    capacity: usize,
}

/// The part of one layer.
#[derive(Debug, Clone, Default)]
pub struct LayerCache {
    /// Rotated keys and values, `[batch, heads, room, head_dim]` each, whose room grows with the
    /// sequences up to the capacity; absent before the first token.
    keys_values: Option<[Tensor<4>; 2]>,
    /// Memory of the localized filter; absent before the first token.
    pub(crate) filter: Option<FilterCache>,
}

/// What the last token adds to the next one in either convolution: the two-token memory of the
/// filter.
///
/// Upstream keeps the last two inputs and computes the first convolution of the last token again.
#[derive(Debug, Clone)]
pub struct FilterCache {
    /// `A0 u_{t−1}`, `[batch, 1, hidden / 2]`
    pub conv1: Tensor<3>,
    /// `C0 c1_{t−1}`, `[batch, 1, hidden]`
    pub conv2: Tensor<3>,
}

impl Cache {
    /// An empty cache for as many sequences as `padding` has entries: the padding tokens that each
    /// starts with.
    ///
    /// `capacity` counts padding, prompt and all tokens to come; memory is taken as they come.
    pub fn new(num_layers: usize, padding: Vec<usize>, capacity: usize) -> Self {
        let standing = vec![0; padding.len()];
        let layers = vec![LayerCache::default(); num_layers];
        Self { layers, padding, standing, length: 0, capacity }
    }

    /// The same with positions that begin to count later: the first `standing[i] + 1` tokens of
    /// sequence `i` are all at position 0, as images are in upstream's training.
    ///
    /// # Panics
    ///
    /// If there are not as many numbers as sequences.
    #[must_use]
    pub fn with_standing(self, standing: Vec<usize>) -> Self {
        assert_eq!(standing.len(), self.padding.len(), "a number for every sequence");
        Self { standing, ..self }
    }

    /// Tokens read so far, padding included.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing has been read yet.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Tokens that can still be read.
    pub fn room(&self) -> usize {
        self.capacity - self.length
    }

    /// Sequences.
    pub fn batch(&self) -> usize {
        self.padding.len()
    }

    /// Rotated keys and values of a layer, `[batch, heads, len, head_dim]` each, if anything has
    /// been read.
    pub fn keys_values(&self, layer: usize) -> Option<[Tensor<4>; 2]> {
        let filled = |x: &Tensor<4>| x.clone().slice_dim(2, 0..self.length);
        self.layers[layer].keys_values.as_ref().map(|[keys, values]| [filled(keys), filled(values)])
    }

    /// The filter's memory of a layer, if anything has been read.
    pub fn filter(&self, layer: usize) -> Option<&FilterCache> {
        self.layers[layer].filter.as_ref()
    }

    /// The layers, and where the next `tokens` tokens of every sequence go.
    ///
    /// # Panics
    ///
    /// If there is no room for them.
    pub(crate) fn split(&mut self, tokens: usize) -> (&mut [LayerCache], Span<'_>) {
        assert!(
            tokens <= self.room(),
            "{tokens} tokens do not fit the {} left of the cache",
            self.room()
        );
        let Self { layers, padding, standing, length, capacity } = self;
        (layers, Span { start: *length, tokens, capacity: *capacity, padding, standing })
    }

    pub(crate) fn advance(&mut self, tokens: usize) {
        self.length += tokens;
    }
}

/// The newest tokens of every sequence.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span<'a> {
    start: usize,
    tokens: usize,
    capacity: usize,
    padding: &'a [usize],
    standing: &'a [usize],
}

/// Tokens that there is room for at first; then the room doubles.
const FIRST_ROOM: usize = 256;

impl Span<'_> {
    /// Room for `end` tokens and some that follow, no more than the capacity.
    fn room(&self, end: usize) -> usize {
        end.checked_next_power_of_two().unwrap_or(end).max(FIRST_ROOM).min(self.capacity)
    }

    fn has_padding(&self) -> bool {
        self.padding.iter().any(|&padding| padding > self.start)
    }

    /// Position of every new token in its sequence, `[batch or 1, tokens]`; zero for padding.
    pub(crate) fn position_ids(&self, device: &Device) -> Tensor<2, Int> {
        let sums = self.padding.iter().zip(self.standing);
        let mut rows: Vec<usize> = sums.map(|(padding, standing)| padding + standing).collect();
        if rows.windows(2).all(|pair| pair[0] == pair[1]) {
            rows.truncate(1);
        }
        let position = |before: usize| {
            (self.start..self.start + self.tokens)
                .map(move |place| place.saturating_sub(before) as i64)
        };
        let positions: Vec<i64> = rows.iter().flat_map(|&before| position(before)).collect();
        Tensor::from_data(TensorData::new(positions, [rows.len(), self.tokens]), device)
    }

    /// True where a new token is padding, `[batch, tokens]`; absent if none is.
    pub(crate) fn padding_mask(&self, device: &Device) -> Option<Tensor<2, Bool>> {
        let is_padding = |&padding: &usize| {
            (self.start..self.start + self.tokens).map(move |place| place < padding)
        };
        let mask: Vec<bool> = self.padding.iter().flat_map(is_padding).collect();
        let mask = || TensorData::new(mask, [self.padding.len(), self.tokens]);
        self.has_padding().then(|| Tensor::from_data(mask(), device))
    }
}

impl LayerCache {
    /// Attention of new tokens over all tokens, which `query`, `key` and `value`,
    /// `[batch, heads, tokens, head_dim]` each, then belong to.
    pub(crate) fn attend(
        &mut self,
        query: Tensor<4>,
        key: Tensor<4>,
        value: Tensor<4>,
        span: &Span<'_>,
    ) -> Tensor<4> {
        let [batch, heads, tokens, head_dim] = key.dims();
        let empty = |like: &Tensor<4>, room: usize| {
            Tensor::zeros([batch, heads, room, head_dim], (&like.device(), like.dtype()))
        };
        let end = span.start + tokens;
        // Taken out while they are written, since only the one owner of a tensor may write it in
        // place.
        let [keys, values] = self.keys_values.take().unwrap_or_else(|| {
            let room = span.room(end);
            [empty(&key, room), empty(&value, room)]
        });
        let [keys, values] = [keys, values].map(|filled| match filled.dims()[2] {
            room if room >= end => filled,
            room => {
                let more = empty(&filled, span.room(end) - room);
                Tensor::cat(vec![filled, more], 2)
            }
        });
        let place = [0..batch, 0..heads, span.start..end, 0..head_dim];
        let keys = keys.slice_assign(place.clone(), key.clone());
        let values = values.slice_assign(place, value.clone());
        let context = if span.start == 0 && !span.has_padding() {
            ops::causal_attention(query, key, value, None)
        } else {
            ops::cached_attention(query, keys.clone(), values.clone(), end, span.padding)
        };
        self.keys_values = Some([keys, values]);
        context
    }
}
