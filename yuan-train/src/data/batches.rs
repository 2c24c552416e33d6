//! Rows of a token stream in a seeded order that can be taken up anywhere.

use burn::tensor::{Device, Tensor, TensorData};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use yuan_model::masks::document_position_ids;

use crate::{Batch, TrainError};

/// Cuts a token stream into rows of `seq_len` inputs and labels and hands them out in batches.
///
/// Every epoch has its own order, which seed and epoch decide. The position is one number, so a
/// resumed run sees exactly the rows that the interrupted one would have seen.
#[derive(Debug, Clone)]
pub struct RowStream {
    tokens: Vec<u32>,
    eod: u32,
    seq_len: usize,
    seed: Option<u64>,
    consumed: u64,
    epoch: Option<(u64, Vec<u32>)>,
}

impl RowStream {
    /// Rows in an order that `seed` decides, or in the order of the stream without one.
    ///
    /// # Errors
    ///
    /// If the stream is too short for a single row.
    pub fn new(
        tokens: Vec<u32>,
        eod: u32,
        seq_len: usize,
        seed: Option<u64>,
    ) -> Result<Self, TrainError> {
        let stream = Self { tokens, eod, seq_len, seed, consumed: 0, epoch: None };
        if stream.num_rows() == 0 {
            return Err(TrainError::Corpus(format!(
                "{} tokens are too few for one row of {seq_len}",
                stream.tokens.len()
            )));
        }
        Ok(stream)
    }

    /// Rows of one epoch.
    pub fn num_rows(&self) -> usize {
        self.tokens.len().saturating_sub(1) / self.seq_len
    }

    /// Rows handed out so far, over all epochs.
    pub fn consumed(&self) -> u64 {
        self.consumed
    }

    /// Goes on after `consumed` rows.
    pub fn seek(&mut self, consumed: u64) {
        self.consumed = consumed;
    }

    /// The next `batch_size` rows; a new epoch begins where one ends.
    pub fn next_batch(&mut self, batch_size: usize, device: &Device) -> Batch {
        let mut columns: [Vec<i64>; 3] = Default::default();
        for _ in 0..batch_size {
            let start = self.next_row() * self.seq_len;
            let row = &self.tokens[start..=start + self.seq_len];
            let inputs = &row[..self.seq_len];
            columns[0].extend(inputs.iter().map(|&token| i64::from(token)));
            columns[1].extend(row[1..].iter().map(|&token| i64::from(token)));
            columns[2].extend(document_position_ids(inputs, self.eod).into_iter().map(i64::from));
        }
        let shape = [batch_size, self.seq_len];
        let [input_ids, labels, position_ids] =
            columns.map(|column| Tensor::from_data(TensorData::new(column, shape), device));
        Batch { input_ids, labels, position_ids }
    }

    fn next_row(&mut self) -> usize {
        let rows = self.num_rows() as u64;
        let (epoch, index) = (self.consumed / rows, (self.consumed % rows) as usize);
        self.consumed += 1;
        let Some(seed) = self.seed else { return index };
        if self.epoch.as_ref().is_none_or(|(current, _)| *current != epoch) {
            let mut order: Vec<u32> = (0..rows as u32).collect();
            // Distinct streams for distinct (seed, epoch) pairs; StdRng spreads close seeds apart.
            order.shuffle(&mut StdRng::seed_from_u64(
                seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ epoch,
            ));
            self.epoch = Some((epoch, order));
        }
        self.epoch.as_ref().map_or(index, |(_, order)| order[index] as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(seed: Option<u64>) -> RowStream {
        RowStream::new((0..42).collect(), 9, 4, seed).unwrap()
    }

    fn first_tokens(stream: &mut RowStream, rows: usize) -> Vec<usize> {
        (0..rows).map(|_| stream.next_row()).collect()
    }

    #[test]
    fn every_epoch_visits_every_row_once_in_another_order() {
        let mut stream = stream(Some(7));
        assert_eq!(stream.num_rows(), 10);
        let epochs = [first_tokens(&mut stream, 10), first_tokens(&mut stream, 10)];
        assert_ne!(epochs[0], epochs[1]);
        for mut epoch in epochs {
            epoch.sort_unstable();
            assert_eq!(epoch, (0..10).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_stream_taken_up_later_goes_on_as_the_uninterrupted_one() {
        let mut whole = stream(Some(3));
        let rows = first_tokens(&mut whole, 37);
        for stop in [0, 1, 9, 10, 11, 25] {
            let mut resumed = stream(Some(3));
            resumed.seek(stop as u64);
            assert_eq!(first_tokens(&mut resumed, 37 - stop), rows[stop..]);
        }
    }

    #[test]
    fn labels_follow_inputs_and_positions_restart_after_a_document() {
        let batch = stream(None).next_batch(3, &Device::default());
        let read = |tensor: Tensor<2, burn::tensor::Int>| -> Vec<i64> {
            tensor.into_data().iter::<i64>().collect()
        };
        assert_eq!(read(batch.input_ids), (0..12).collect::<Vec<_>>());
        assert_eq!(read(batch.labels), (1..13).collect::<Vec<_>>());
        assert_eq!(read(batch.position_ids), [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 0, 1]);
    }

    #[test]
    fn too_few_tokens_are_refused() {
        let error = RowStream::new(vec![1, 2, 3], 0, 3, None).unwrap_err();
        assert_eq!(error.to_string(), "3 tokens are too few for one row of 3");
    }
}
