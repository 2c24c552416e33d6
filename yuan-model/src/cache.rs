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
    /// Sequences of which nobody looks at what follows.
    ended: Vec<bool>,
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
        let (standing, ended) = (vec![0; padding.len()], vec![false; padding.len()]);
        let layers = vec![LayerCache::default(); num_layers];
        Self { layers, padding, standing, ended, length: 0, capacity }
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

    /// Only these sequences, in this order; one that is named more than once is there as often, and
    /// each goes on by itself. So several continuations share the pass over what they begin with.
    ///
    /// # Panics
    ///
    /// If there is no such sequence.
    #[must_use]
    pub fn select(self, sequences: &[usize]) -> Self {
        fn chosen<T: Copy>(values: &[T], sequences: &[usize]) -> Vec<T> {
            sequences.iter().map(|&sequence| values[sequence]).collect()
        }
        let rows = |device: &Device| {
            let rows: Vec<i64> = sequences.iter().map(|&sequence| sequence as i64).collect();
            Tensor::<1, Int>::from_data(TensorData::new(rows, [sequences.len()]), device)
        };
        let select = |layer: LayerCache| LayerCache {
            keys_values: layer
                .keys_values
                .map(|pair| pair.map(|x| x.clone().select(0, rows(&x.device())))),
            filter: layer.filter.map(|FilterCache { conv1, conv2 }| {
                let rows = rows(&conv1.device());
                FilterCache { conv1: conv1.select(0, rows.clone()), conv2: conv2.select(0, rows) }
            }),
        };
        Self {
            padding: chosen(&self.padding, sequences),
            standing: chosen(&self.standing, sequences),
            ended: chosen(&self.ended, sequences),
            layers: self.layers.into_iter().map(select).collect(),
            ..self
        }
    }

    /// Says that nobody looks at what follows in a sequence: its tokens count as no load from now on.
    ///
    /// # Panics
    ///
    /// If there is no such sequence.
    pub fn end(&mut self, sequence: usize) {
        self.ended[sequence] = true;
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
        let Self { layers, padding, standing, ended, length, capacity } = self;
        (layers, Span { start: *length, tokens, capacity: *capacity, padding, standing, ended })
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
    ended: &'a [bool],
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

    /// True where a new token is padding or of a sequence that has ended, `[batch, tokens]`; absent if
    /// none is.
    pub(crate) fn padding_mask(&self, device: &Device) -> Option<Tensor<2, Bool>> {
        let is_padding = |(&padding, &ended): (&usize, &bool)| {
            (self.start..self.start + self.tokens).map(move |place| ended || place < padding)
        };
        let mask: Vec<bool> = self.padding.iter().zip(self.ended).flat_map(is_padding).collect();
        let is_there = mask.contains(&true);
        let mask = || TensorData::new(mask, [self.padding.len(), self.tokens]);
        is_there.then(|| Tensor::from_data(mask(), device))
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
