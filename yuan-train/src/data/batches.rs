//! Rows in their order, made ahead of the step that takes them, and batches of them.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
};

use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use rayon::prelude::*;
use yuan_model::{BatchImages, LossMask, vision::pixels_of};

use super::{MemoryRows, Row, RowSource};
use crate::{Batch, TrainError};

/// Hands out the rows of a source one after the other.
///
/// The position is one number, so a resumed run sees exactly the rows that the interrupted one
/// would have seen. While a step computes, a thread makes the rows of the next one.
#[derive(Debug)]
pub struct RowStream {
    source: Arc<dyn RowSource>,
    consumed: u64,
    ahead: Option<Ahead>,
}

/// Rows that a thread makes.
#[derive(Debug)]
struct Ahead {
    ask: Sender<(u64, usize)>,
    made: Receiver<Result<Vec<Row>, TrainError>>,
    /// What was asked for last: from where, and how many.
    asked: Option<(u64, usize)>,
}

impl RowStream {
    /// The rows of a source, from the first on.
    pub fn of(source: Arc<dyn RowSource>) -> Self {
        Self { source, consumed: 0, ahead: None }
    }

    /// Rows of `seq_len` inputs and labels of tokens in memory, in an order that `seed` decides, or
    /// in the order of the tokens without one.
    ///
    /// # Errors
    ///
    /// If there are too few tokens for a single row.
    pub fn new(
        tokens: Vec<u32>,
        eod: u32,
        seq_len: usize,
        seed: Option<u64>,
    ) -> Result<Self, TrainError> {
        Ok(Self::of(Arc::new(MemoryRows::new(tokens, eod, seq_len, seed)?)))
    }

    /// Rows handed out so far, over all epochs.
    pub fn consumed(&self) -> u64 {
        self.consumed
    }

    /// Goes on after `consumed` rows.
    pub fn seek(&mut self, consumed: u64) {
        self.consumed = consumed;
    }

    /// The next rows; a new epoch begins where one ends.
    ///
    /// # Errors
    ///
    /// If a file is damaged.
    pub fn next_rows(&mut self, count: usize) -> Result<Vec<Row>, TrainError> {
        let place = self.consumed;
        let was_asked = |ahead: &mut Ahead| {
            let made = ahead.asked.take().map(|asked| (asked, ahead.made.recv().ok()));
            made.filter(|(asked, _)| *asked == (place, count)).and_then(|(_, rows)| rows)
        };
        let rows = match self.ahead.as_mut().and_then(was_asked) {
            Some(rows) => rows?,
            None => rows_of(&*self.source, place, count)?,
        };
        self.consumed += count as u64;
        let ahead = self.ahead.get_or_insert_with(|| Ahead::of(Arc::clone(&self.source)));
        // Without the thread, rows are made when they are wanted.
        let next = (self.consumed, count);
        ahead.asked = ahead.ask.send(next).is_ok().then_some(next);
        Ok(rows)
    }

    /// The next rows as a batch on a device.
    ///
    /// # Errors
    ///
    /// If a file is damaged.
    pub fn next_batch(&mut self, batch_size: usize, device: &Device) -> Result<Batch, TrainError> {
        Ok(batch_of(&self.next_rows(batch_size)?, device))
    }
}

impl Ahead {
    fn of(source: Arc<dyn RowSource>) -> Self {
        let (ask, asked) = channel::<(u64, usize)>();
        let (give, made) = channel();
        // It ends when the stream is dropped.
        thread::spawn(move || {
            while let Ok((place, count)) = asked.recv() {
                if give.send(rows_of(&*source, place, count)).is_err() {
                    break;
                }
            }
        });
        Self { ask, made, asked: None }
    }
}

fn rows_of(source: &dyn RowSource, place: u64, count: usize) -> Result<Vec<Row>, TrainError> {
    // What takes time in a row, decoding its images, is spread over the cores.
    (place..place + count as u64).into_par_iter().map(|place| source.row(place)).collect()
}

/// Rows, all of one length, as a batch on a device.
pub fn batch_of(rows: &[Row], device: &Device) -> Batch {
    let shape = [rows.len(), rows.first().map_or(0, |row| row.input_ids.len())];
    let tensor = |column: fn(&Row) -> &Vec<u32>| -> Tensor<2, Int> {
        let tokens = rows.iter().flat_map(|row| column(row).iter().map(|&token| i64::from(token)));
        Tensor::from_data(TensorData::new(tokens.collect::<Vec<_>>(), shape), device)
    };
    let batch = Batch::new(
        tensor(|row| &row.input_ids),
        tensor(|row| &row.labels),
        tensor(|row| &row.position_ids),
    );
    let batch = match images_of(rows, device) {
        Some(images) => batch.with_images(images),
        None => batch,
    };
    let signals = (0..rows.first().map_or(0, |row| row.signals.len())).map(|number| {
        let values: Vec<f32> =
            rows.iter().flat_map(|row| row.signals[number].iter().copied()).collect();
        Tensor::from_data(TensorData::new(values, shape), device)
    });
    let batch = Batch { signals: signals.collect(), ..batch };
    if rows.iter().all(|row| row.learnt.is_none()) {
        return batch;
    }
    let all = |row: &Row| vec![true; row.labels.len()];
    let learnt: Vec<Vec<bool>> =
        rows.iter().map(|row| row.learnt.clone().unwrap_or_else(|| all(row))).collect();
    let fills = |row: &Row| (0..row.labels.len()).map(|at| at >= row.padding_from).collect();
    let padding: Vec<Vec<bool>> = rows.iter().map(fills).collect();
    batch.with_mask(LossMask::new(&learnt, &padding, device))
}

/// The images of all rows, if there are any.
fn images_of(rows: &[Row], device: &Device) -> Option<BatchImages> {
    let mut tiles = rows.iter().flat_map(|row| &row.tiles).peekable();
    tiles.peek()?;
    let tiles = pixels_of(tiles, FloatDType::F32, device);
    let mut places = Vec::new();
    for (number, row) in rows.iter().enumerate() {
        let start = number * row.input_ids.len();
        places.extend(row.image_places.iter().map(|place| start + place));
    }
    Some(BatchImages { tiles, places })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> RowStream {
        RowStream::new((0..42).collect(), 9, 4, Some(3)).unwrap()
    }

    fn rows(stream: &mut RowStream, counts: &[usize]) -> Vec<Row> {
        counts.iter().flat_map(|&count| stream.next_rows(count).unwrap()).collect()
    }

    #[test]
    fn a_stream_taken_up_later_goes_on_as_the_uninterrupted_one() {
        let whole = rows(&mut stream(), &[37]);
        for stop in [0, 1, 9, 10, 11, 25] {
            let mut resumed = stream();
            resumed.seek(stop as u64);
            assert_eq!(rows(&mut resumed, &[37 - stop]), whole[stop..]);
        }
        // In batches of any size, with a jump back that the thread ahead does not know of.
        let mut stream = stream();
        assert_eq!(rows(&mut stream, &[3, 3, 3, 1, 7]), whole[..17]);
        stream.seek(4);
        assert_eq!(rows(&mut stream, &[7, 7, 2]), whole[4..20]);
    }

    #[test]
    fn a_mask_counts_what_is_learnt_and_what_fills_up() {
        let mut rows = rows(&mut stream(), &[2]);
        let batch = batch_of(&rows, &Device::default());
        assert!(batch.mask.is_none());
        rows[1].learnt = Some(vec![false, true, true, false]);
        rows[1].padding_from = 3;
        let mask = batch_of(&rows, &Device::default()).mask.unwrap();
        assert_eq!(mask.learnt_per_row, [4, 2]);
        let learnt: Vec<f32> = mask.learnt.into_data().iter::<f32>().collect();
        assert_eq!(learnt, [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0]);
        let padding: Vec<bool> = mask.padding.unwrap().into_data().iter::<bool>().collect();
        assert_eq!(padding, [false, false, false, false, false, false, false, true]);
    }
}
