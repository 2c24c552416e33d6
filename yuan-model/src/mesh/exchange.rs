//! Tokens to the devices of their experts and back.
//!
//! On every device of a row the tokens are sorted by expert, and a device holds neighbouring experts: what goes to one
//! device is one slice. A device that has received the slices of all others sorts them by expert and source with one
//! gather, whose order follows from the counts alone.

use std::ops::Range;

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::ops;

/// Who sends how many rows to which experts, in one row of devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exchange {
    /// Rows for every expert of the layer, for each sending device.
    counts: Vec<Vec<usize>>,
    /// Experts of each device.
    experts: Vec<Range<usize>>,
}

/// Rows that arrived at one device, sorted by expert.
#[derive(Debug, Clone)]
pub struct Arrived {
    /// `[rows, hidden]`
    pub rows: Tensor<2>,
    /// Rows of each expert of the device.
    pub rows_per_expert: Vec<usize>,
    /// How they were sorted, if they had to be.
    order: Option<Order>,
}

impl Arrived {
    /// The same with what `compute` makes of the rows, given how many each expert has: as many, in their order.
    pub fn computed(self, compute: impl FnOnce(Tensor<2>, &[usize]) -> Tensor<2>) -> Self {
        Self { rows: compute(self.rows, &self.rows_per_expert), ..self }
    }
}

impl Exchange {
    /// `counts[device][expert]` rows leave each device for each expert, and device `d` holds `experts_per_device[d]`
    /// experts, those of device 0 first.
    ///
    /// # Panics
    ///
    /// If there are not as many counts as devices, or not as many in one of them as experts.
    pub fn new(counts: Vec<Vec<usize>>, experts_per_device: &[usize]) -> Self {
        assert_eq!(counts.len(), experts_per_device.len(), "counts of every device");
        let mut end = 0;
        let experts = experts_per_device.iter().map(|&experts| {
            end += experts;
            end - experts..end
        });
        let experts: Vec<Range<usize>> = experts.collect();
        assert!(counts.iter().all(|counts| counts.len() == end), "a count for every expert");
        Self { counts, experts }
    }

    /// Rows that each device receives.
    pub fn rows_per_device(&self) -> Vec<usize> {
        (0..self.experts.len())
            .map(|to| (0..self.counts.len()).map(|from| self.sent(from, to)).sum())
            .collect()
    }

    /// Sends the rows of every device, `[rows, hidden]` sorted by expert, to the devices of their experts; nothing
    /// arrives where no token goes.
    pub fn send(&self, rows: Vec<Tensor<2>>, devices: &[Device]) -> Vec<Option<Arrived>> {
        let parts = deal(rows.into_iter().map(Some), devices, |from, to| self.sent(from, to));
        let arrive = |(to, parts): (usize, Vec<Tensor<2>>)| {
            let (rows, order) = (joined(parts)?, self.order(to, &devices[to]));
            let rows = match &order {
                Some(Order { arrived_at, sorted_at }) => {
                    ops::gather_rows(rows, arrived_at.clone(), sorted_at.clone(), 1)
                }
                None => rows,
            };
            let received = |expert| self.counts.iter().map(|counts| counts[expert]).sum();
            Some(Arrived { rows, rows_per_expert: self.experts[to].clone().map(received).collect(), order })
        };
        parts.into_iter().enumerate().map(arrive).collect()
    }

    /// Sends what the experts made of the rows back to where they came from: the inverse of [`send`](Self::send).
    pub fn send_back(&self, arrived: Vec<Option<Arrived>>, devices: &[Device]) -> Vec<Option<Tensor<2>>> {
        let in_order_of_arrival = |arrived: Option<Arrived>| {
            let Arrived { rows, order, .. } = arrived?;
            Some(match order {
                Some(Order { arrived_at, sorted_at }) => ops::gather_rows(rows, sorted_at, arrived_at, 1),
                None => rows,
            })
        };
        let rows = arrived.into_iter().map(in_order_of_arrival);
        deal(rows, devices, |at, to| self.sent(to, at)).into_iter().map(joined).collect()
    }

    /// Rows from one device to another.
    fn sent(&self, from: usize, to: usize) -> usize {
        self.counts[from][self.experts[to].clone()].iter().sum()
    }

    /// How device `to` sorts what arrives; nothing to do where one device sends, or one expert receives.
    fn order(&self, to: usize, device: &Device) -> Option<Order> {
        let experts = self.experts[to].clone();
        if self.counts.len() == 1 || experts.len() == 1 {
            return None;
        }
        let mut start = 0;
        // Where the rows of every source and expert lie as they arrive.
        let mut ranges = Vec::with_capacity(self.counts.len());
        for counts in &self.counts {
            let of_source = counts[experts.clone()].iter().map(|&count| {
                start += count;
                start - count..start
            });
            ranges.push(of_source.collect::<Vec<_>>());
        }
        let by_expert = (0..experts.len()).flat_map(|expert| ranges.iter().map(move |of| of[expert].clone()));
        let arrived_at: Vec<i32> = by_expert.flatten().map(|place| place as i32).collect();
        let mut sorted_at = vec![0; arrived_at.len()];
        arrived_at.iter().zip(0..).for_each(|(&arrived, sorted)| sorted_at[arrived as usize] = sorted);
        let [arrived_at, sorted_at] = [arrived_at, sorted_at]
            .map(|places| Tensor::from_data(TensorData::from(places.as_slice()), device));
        Some(Order { arrived_at, sorted_at })
    }
}

/// A permutation of rows, `[rows]` each.
#[derive(Debug, Clone)]
struct Order {
    /// For every sorted row, the place at which it arrived.
    arrived_at: Tensor<1, Int>,
    /// Its inverse.
    sorted_at: Tensor<1, Int>,
}

fn joined(mut parts: Vec<Tensor<2>>) -> Option<Tensor<2>> {
    match parts.len() {
        0 => None,
        1 => parts.pop(),
        _ => Some(Tensor::cat(parts, 0)),
    }
}

/// Cuts the rows of every device into neighbouring parts, `count(from, to)` rows each, and gives them to their devices.
fn deal(
    rows: impl Iterator<Item = Option<Tensor<2>>>,
    devices: &[Device],
    count: impl Fn(usize, usize) -> usize,
) -> Vec<Vec<Tensor<2>>> {
    let mut parts: Vec<Vec<Tensor<2>>> = vec![Vec::new(); devices.len()];
    for (from, rows) in rows.enumerate() {
        let Some(rows) = rows else { continue };
        let mut start = 0;
        for (to, device) in devices.iter().enumerate() {
            let end = start + count(from, to);
            if end > start {
                parts[to].push(ops::transfer(rows.clone().slice_dim(0, start..end), device));
            }
            start = end;
        }
    }
    parts
}
