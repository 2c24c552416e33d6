//! How many rows of tokens the ranks that share experts computed.

/// Token rows that each rank of a row computed in the experts of one layer; ranks that hold copies of
/// the same experts are added up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRows(Vec<u64>);

impl DeviceRows {
    /// Counts, the first device's first.
    pub fn new(rows_per_device: Vec<u64>) -> Self {
        Self(rows_per_device)
    }

    /// Counts, the first device's first.
    pub fn rows_per_device(&self) -> &[u64] {
        &self.0
    }

    /// Devices that share the experts.
    pub fn num_devices(&self) -> usize {
        self.0.len()
    }

    /// Rows of the busiest device over the mean; 1 is perfect balance, 0 means no rows.
    pub fn max_over_mean(&self) -> f64 {
        let (max, sum) = (self.0.iter().copied().max().unwrap_or(0), self.0.iter().sum::<u64>());
        if sum == 0 { 0.0 } else { max as f64 * self.num_devices() as f64 / sum as f64 }
    }

    /// Adds the rows of another batch.
    pub fn add(&mut self, other: &Self) {
        for (sum, more) in self.0.iter_mut().zip(&other.0) {
            *sum += more;
        }
    }
}
