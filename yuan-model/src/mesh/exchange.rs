//! Tokens to the devices of their experts and back.
//!
//! On every device of a row the tokens are sorted by expert, and so they arrive: what a device
//! receives is sorted by expert, and by source within one. Where which rows go follows from the
//! counts alone.

use std::ops::Range;

use burn::tensor::{Device, Tensor};

use crate::ops::{self, Target};

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
}

impl Exchange {
    /// `counts[device][expert]` rows leave each device for each expert, and device `d` holds
    /// `experts_per_device[d]` experts, those of device 0 first.
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

    /// Sends the rows of every device, `[rows, hidden]` sorted by expert, to the devices of their
    /// experts; nothing arrives where no token goes.
    ///
    /// # Panics
    ///
    /// If there are fewer tensors than devices, or fewer rows than were counted.
    pub fn send(&self, rows: Vec<Tensor<2>>) -> Vec<Option<Arrived>> {
        let mut starts: Vec<usize> = vec![0; self.counts.len()];
        let target = |(at, experts): (usize, &Range<usize>)| {
            let of_expert =
                |expert: usize| self.counts.iter().map(move |counts| counts[expert]).enumerate();
            let parts = experts.clone().flat_map(of_expert).map(|(from, count)| {
                starts[from] += count;
                (from, starts[from] - count..starts[from])
            });
            Target { at, parts: parts.collect() }
        };
        let targets = self.experts.iter().enumerate().map(target).collect();
        let arrive = |(rows, experts): (Option<Tensor<2>>, &Range<usize>)| {
            let received = |expert| self.counts.iter().map(|counts| counts[expert]).sum();
            Some(Arrived { rows: rows?, rows_per_expert: experts.clone().map(received).collect() })
        };
        ops::exchange(rows, targets).into_iter().zip(&self.experts).map(arrive).collect()
    }

    /// Sends what the experts made of the rows back to where they came from: the inverse of
    /// [`send`](Self::send).
    ///
    /// # Panics
    ///
    /// As [`send`](Self::send).
    pub fn send_back(
        &self,
        rows: Vec<Option<Tensor<2>>>,
        devices: &[Device],
    ) -> Vec<Option<Tensor<2>>> {
        let mut targets: Vec<Target> =
            (0..devices.len()).map(|at| Target { at, parts: Vec::new() }).collect();
        for (at, experts) in self.experts.iter().enumerate() {
            let mut start = 0;
            for expert in experts.clone() {
                for (target, counts) in targets.iter_mut().zip(&self.counts) {
                    target.parts.push((at, start..start + counts[expert]));
                    start += counts[expert];
                }
            }
        }
        let Some((width, dtype)) =
            rows.iter().flatten().next().map(|rows| (rows.dims()[1], rows.dtype()))
        else {
            return vec![None; devices.len()];
        };
        // A row that nobody takes stands for a device where nothing arrived.
        let row = |device| Tensor::zeros([1, width], (device, dtype));
        let rows =
            rows.into_iter().zip(devices).map(|(rows, device)| rows.unwrap_or_else(|| row(device)));
        ops::exchange(rows.collect(), targets)
    }

    /// Rows from one device to another.
    fn sent(&self, from: usize, to: usize) -> usize {
        self.counts[from][self.experts[to].clone()].iter().sum()
    }
}
