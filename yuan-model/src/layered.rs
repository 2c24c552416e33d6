//! A model as its layers: embed → layers → loss, written once for one device and for many.
//!
//! Everything that runs the layers goes through [`through_layers`]: a forward pass, one over a
//! cache, the loss on one device or on a mesh, and the recomputation of layers for their gradients.

use burn::{
    module::Module,
    tensor::{Bool, Device, FloatDType, Int, Tensor, TensorData},
};

use crate::{ModelError, moe::BalanceLosses, ranks::DeviceRows};

/// Rows of tokens with what to predict at each of them.
#[derive(Debug, Clone)]
pub struct Batch {
    /// `[batch, seq]`
    pub input_ids: Tensor<2, Int>,
    /// The token that follows each input, `[batch, seq]`.
    pub labels: Tensor<2, Int>,
    /// Position of each token in its document, `[batch, seq]`.
    pub position_ids: Tensor<2, Int>,
    /// Which labels are learnt; none: all of them.
    pub mask: Option<LossMask>,
    /// Over ranks: the part of the learnt labels of all their rows that these rows have, by which
    /// the mean over them is multiplied.
    pub share: Option<f64>,
}

/// Which labels of a batch are learnt, and which of its tokens only fill the rows up.
#[derive(Debug, Clone)]
pub struct LossMask {
    /// 1 where the label is learnt and 0 elsewhere, `[batch, seq]`.
    pub learnt: Tensor<2>,
    /// True where a token only fills its row up, `[batch, seq]`: it is not counted as a load. None
    /// if no token does.
    pub padding: Option<Tensor<2, Bool>>,
    /// Learnt labels of each row, `[batch]`, on the host: parts of a batch weigh as many as they
    /// have, without a look at the device.
    pub learnt_per_row: Vec<u64>,
}

impl LossMask {
    /// From what is learnt of each row, and what only fills it up; all rows are equally long.
    pub fn new(learnt: &[Vec<bool>], padding: &[Vec<bool>], device: &Device) -> Self {
        let shape = [learnt.len(), learnt.first().map_or(0, Vec::len)];
        let ones: Vec<f32> = learnt.concat().into_iter().map(f32::from).collect();
        let padding = padding.concat();
        let padding = padding
            .contains(&true)
            .then(|| Tensor::from_data(TensorData::new(padding, shape), device));
        let count = |row: &Vec<bool>| row.iter().filter(|learnt| **learnt).count() as u64;
        Self {
            learnt: Tensor::from_data(TensorData::new(ones, shape), device),
            padding,
            learnt_per_row: learnt.iter().map(count).collect(),
        }
    }

    /// Learnt labels of all rows.
    pub fn count(&self) -> u64 {
        self.learnt_per_row.iter().sum()
    }
}

impl Batch {
    /// Rows of which every label is learnt, each tensor `[batch, seq]`.
    pub fn new(
        input_ids: Tensor<2, Int>,
        labels: Tensor<2, Int>,
        position_ids: Tensor<2, Int>,
    ) -> Self {
        Self { input_ids, labels, position_ids, mask: None, share: None }
    }

    /// The same rows, of which only some labels are learnt.
    #[must_use]
    pub fn with_mask(self, mask: LossMask) -> Self {
        Self { mask: Some(mask), ..self }
    }

    /// The rows of one rank, which have this part of the learnt labels of all ranks' rows: the loss
    /// is its part of the mean over all of them.
    #[must_use]
    pub fn with_share(self, share: f64) -> Self {
        Self { share: Some(share), ..self }
    }
}

/// What one layer returns; `H` is the residual stream: one tensor, or one for every device.
#[derive(Debug, Clone)]
pub struct LayerOutput<H> {
    /// The residual stream after the layer, `[batch, seq, hidden]` (on a mesh each device's share).
    pub hidden: H,
    /// Tokens that each expert received, padding excluded; a token counts once per expert.
    pub load: ExpertLoad,
    /// On a mesh: rows that its devices computed in their experts.
    pub rows_per_device: Option<DeviceRows>,
    /// Weighted sum of the balancing losses that are on, `[1]`.
    pub balance_loss: Option<Tensor<1>>,
}

/// Tokens that each expert of a layer received, where they are: nothing is moved to be counted.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "on one device it is always the large one")]
pub enum ExpertLoad {
    /// On the device that counted them, `[num_experts]`.
    Device(Tensor<1, Int>),
    /// Already read, as a mesh has to before tokens can travel.
    Host(Vec<u64>),
}

impl ExpertLoad {
    /// The sum of two loads of the same layer.
    ///
    /// # Panics
    ///
    /// If one is on a device and the other was read already.
    pub fn plus(self, other: Self) -> Self {
        match (self, other) {
            (Self::Device(a), Self::Device(b)) => Self::Device(a + b),
            (Self::Host(a), Self::Host(b)) => {
                Self::Host(a.iter().zip(b).map(|(a, b)| a + b).collect())
            }
            _ => panic!("loads of one model are all on the device or all on the host"),
        }
    }

    /// The counts on the host, `[num_experts]`.
    ///
    /// # Errors
    ///
    /// If the device fails to hand over its data.
    pub fn read(self) -> Result<Vec<u64>, ModelError> {
        match self {
            Self::Device(counts) => {
                Ok(Self::from_data(counts.try_into_data().map_err(ModelError::device)?))
            }
            Self::Host(counts) => Ok(counts),
        }
    }

    /// Counts that were read from a device, `[num_experts]`.
    pub fn from_data(data: TensorData) -> Vec<u64> {
        data.convert::<i64>().iter::<i64>().map(|count| count as u64).collect()
    }

    pub(crate) fn into_tensor(self) -> Tensor<1, Int> {
        match self {
            Self::Device(counts) => counts,
            Self::Host(_) => unreachable!("a model on one device reads no counts"),
        }
    }
}

/// Loss of a batch and where its tokens went.
#[derive(Debug, Clone)]
pub struct LossOutput {
    /// Mean next-token cross-entropy over the learnt labels of the batch, in nats per token, `[1]`.
    pub loss: Tensor<1>,
    /// What is minimised beside it: the weighted balancing losses of all layers, `[1]`, if any is
    /// on.
    pub balance_loss: Option<Tensor<1>>,
    /// Per layer: tokens that each expert received.
    pub loads: Vec<ExpertLoad>,
    /// Per layer: rows that each device of a mesh computed in its experts; empty on one device.
    pub rows_per_device: Vec<DeviceRows>,
}

impl LossOutput {
    /// A loss, `[1]`, and the tokens that each expert of each layer received, `[num_experts]`, on
    /// one device and without balancing losses.
    pub fn new(loss: Tensor<1>, tokens_per_expert: Vec<Tensor<1, Int>>) -> Self {
        let loads = tokens_per_expert.into_iter().map(ExpertLoad::Device).collect();
        Self { loss, balance_loss: None, loads, rows_per_device: Vec::new() }
    }
}

/// What all layers together left behind, beside the residual stream.
#[derive(Debug, Default)]
pub struct LayerSums {
    /// Per layer: tokens that each expert received.
    pub loads: Vec<ExpertLoad>,
    /// Per layer of a mesh: rows of its devices.
    pub rows_per_device: Vec<DeviceRows>,
    /// Sum of the balancing losses of the layers, `[1]`, if any is on.
    pub balance_loss: Option<Tensor<1>>,
}

impl LayerSums {
    /// With the loss of what the last layer left.
    pub fn with_loss(self, loss: Tensor<1>) -> LossOutput {
        let Self { loads, rows_per_device, balance_loss } = self;
        LossOutput { loss, balance_loss, loads, rows_per_device }
    }
}

/// A model as its layers, on one device or several: a residual stream is one tensor for each.
pub trait Layered: Module {
    /// What every layer is given beside the residual stream.
    type Inputs;

    /// Prepares a batch: positions, documents and, on a mesh, each device's share.
    ///
    /// # Errors
    ///
    /// If the batch does not fit the devices.
    fn inputs(&self, batch: Batch) -> Result<Self::Inputs, ModelError>;

    /// Layers, L.
    fn num_layers(&self) -> usize;

    /// The embedding of every device's tokens in the type to compute in, `[batch, seq, hidden]`.
    fn embed(&self, inputs: &Self::Inputs, dtype: FloatDType) -> Vec<Tensor<3>>;

    /// One layer on all devices; `x` is the residual stream of each, `[batch share, seq, hidden]`.
    ///
    /// # Errors
    ///
    /// If a device fails.
    fn layer(
        &self,
        layer: usize,
        x: Vec<Tensor<3>>,
        inputs: &Self::Inputs,
        balance: BalanceLosses,
    ) -> Result<LayerOutput<Vec<Tensor<3>>>, ModelError>;

    /// Mean cross-entropy, `[1]`, of what the last layer left on every device,
    /// `[batch share, seq, hidden]`.
    ///
    /// # Errors
    ///
    /// If a device fails.
    fn loss_of_hidden(
        &self,
        x: Vec<Tensor<3>>,
        inputs: &Self::Inputs,
    ) -> Result<Tensor<1>, ModelError>;

    /// Loss of a batch, with a graph of all layers where the devices record one.
    ///
    /// # Errors
    ///
    /// If the batch does not fit the devices, or one of them fails.
    fn loss_by_layers(
        &self,
        batch: Batch,
        balance: BalanceLosses,
        dtype: FloatDType,
    ) -> Result<LossOutput, ModelError> {
        let inputs = self.inputs(batch)?;
        let embedded = self.embed(&inputs, dtype);
        let (x, sums) = through_layers(self.num_layers(), embedded, |layer, x| {
            self.layer(layer, x, &inputs, balance)
        })?;
        Ok(sums.with_loss(self.loss_of_hidden(x, &inputs)?))
    }
}

/// Runs the residual stream `x`, `[batch, seq, hidden]` or one such share for each device, through
/// layers `0..num_layers` and gathers what they return.
///
/// # Errors
///
/// The first error of a layer.
pub fn through_layers<H, E>(
    num_layers: usize,
    mut x: H,
    mut layer: impl FnMut(usize, H) -> Result<LayerOutput<H>, E>,
) -> Result<(H, LayerSums), E> {
    let mut sums = LayerSums::default();
    for index in 0..num_layers {
        let output = layer(index, x)?;
        x = output.hidden;
        sums.loads.push(output.load);
        sums.rows_per_device.extend(output.rows_per_device);
        sums.balance_loss = match (sums.balance_loss, output.balance_loss) {
            (Some(sum), Some(more)) => Some(sum + more),
            (sum, more) => sum.or(more),
        };
    }
    Ok((x, sums))
}
