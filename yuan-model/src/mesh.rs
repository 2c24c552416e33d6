//! One model on many devices: data parallel outside the experts, expert parallel within them.
//!
//! A [`DeviceMesh`] is a grid of `data` rows of `expert` devices. Every device holds a copy of all
//! that is no expert's and computes its share of a batch; the experts of every layer are split over
//! the devices of a row, and every row holds them all. Tokens travel to their experts and back
//! within their row ([`exchange`]).
//!
//! One process drives all devices, which may be those of other processes and machines
//! ([`device`](crate::device())), and one autodiff graph spans them. [`MeshModel`] is built of the
//! same layers as [`YuanModel`](crate::YuanModel) and computes the same, forward and gradients.

use burn::tensor::Device;

use crate::ModelError;

pub mod exchange;
mod model;
mod placement;

pub use model::{MeshModel, Shard};

/// Devices in `data` rows of `expert`, row by row.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceMesh {
    devices: Vec<Device>,
    data: usize,
}

impl DeviceMesh {
    /// A mesh of `data` rows.
    ///
    /// A device may be listed more than once: it then does the work of several, which is how a mesh
    /// is tried without them.
    ///
    /// # Errors
    ///
    /// If there is no device, the rows are not of one length, or the devices are of different
    /// kinds.
    pub fn new(devices: Vec<Device>, data: usize) -> Result<Self, ModelError> {
        let refuse = |reason: String| Err(ModelError::Mesh(reason));
        let Some(first) = devices.first() else {
            return refuse("a mesh needs at least one device".into());
        };
        if data == 0 || !devices.len().is_multiple_of(data) {
            return refuse(format!(
                "{} devices cannot be cut into {data} rows of one length",
                devices.len()
            ));
        }
        let kind = |device: &Device| std::mem::discriminant(device.clone().inner().as_dispatch());
        if let Some(other) = devices.iter().find(|device| kind(device) != kind(first)) {
            return refuse(format!(
                "the devices of a mesh must be of one kind, not {first:?} and {other:?}"
            ));
        }
        Ok(Self { devices, data })
    }

    /// The same devices, with gradients.
    #[must_use]
    pub fn autodiff(self) -> Self {
        Self { devices: self.devices.into_iter().map(Device::autodiff).collect(), ..self }
    }

    /// All devices, row by row.
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// The device that losses and norms are added up on: the first.
    pub fn home(&self) -> &Device {
        &self.devices[0]
    }

    /// Rows: copies of every expert.
    pub fn data(&self) -> usize {
        self.data
    }

    /// Devices of a row, over which the experts of a layer are spread.
    pub fn expert(&self) -> usize {
        self.devices.len() / self.data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_are_no_mesh_are_refused() {
        let refused = |devices: usize, data: usize| {
            DeviceMesh::new(vec![Device::flex(); devices], data).unwrap_err().to_string()
        };
        assert_eq!(refused(0, 1), "a mesh needs at least one device");
        assert_eq!(refused(3, 2), "3 devices cannot be cut into 2 rows of one length");
        assert_eq!(refused(2, 0), "2 devices cannot be cut into 0 rows of one length");
        let mesh = DeviceMesh::new(vec![Device::flex(); 6], 2).unwrap();
        assert_eq!((mesh.data(), mesh.expert()), (2, 3));
    }
}
