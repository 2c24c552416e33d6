//! The model over a mesh: the layers of [`YuanModel`], device by device, with an exchange of tokens
//! in each.

use std::{collections::HashMap, ops::Range};

use burn::{
    module::Module,
    tensor::{Bool, Device, FloatDType, Int, Tensor},
};

use super::{
    DeviceMesh,
    exchange::{Arrived, Exchange},
};
use crate::{
    Batch, ConfigError, ModelError, YuanConfig, YuanModel,
    attention::DocumentMask,
    layered::{ExpertLoad, LayerOutput, Layered},
    loss::masked_mean,
    moe::{BalanceLosses, Experts, Routed},
    named, ops,
    ranks::{DeviceRows, evenly},
    rope::Rotary,
};

/// A Yuan model spread over the devices of a [`DeviceMesh`].
///
/// ```
/// use burn::tensor::Device;
/// use yuan_model::{DeviceMesh, MeshModel, YuanConfig, YuanModel};
///
/// let model = YuanModel::new(&YuanConfig::tiny(96), &Device::flex())?;
/// // One row of two devices, here the same CPU twice: each holds half of the experts.
/// let mesh = DeviceMesh::new(vec![Device::flex(); 2], 1)?;
/// let spread = MeshModel::distribute(&model, &mesh)?;
/// assert_eq!(spread.placement(), [[4, 4], [4, 4]]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Module, Debug)]
pub struct MeshModel {
    /// What each device holds: a whole model but for the experts, of which there are its own only.
    pub(super) replicas: Vec<YuanModel>,
    /// Experts of every layer on each device of a row, `[layer][device]`; a device holds
    /// neighbouring ones.
    #[module(skip)]
    pub(super) placement: Vec<Vec<usize>>,
    #[module(skip)]
    pub(super) config: YuanConfig,
    #[module(skip)]
    pub(super) mesh: DeviceMesh,
}

impl MeshModel {
    /// A model whose weights are yet to be written: drawn anew, they would differ from device to
    /// device.
    ///
    /// The experts of a layer are split as evenly as their number allows.
    ///
    /// # Errors
    ///
    /// If the configuration contradicts itself, or a layer has fewer experts than a row has
    /// devices.
    pub fn new(config: &YuanConfig, mesh: &DeviceMesh) -> Result<Self, ConfigError> {
        Self::check(config, mesh)?;
        let placement: Vec<Vec<usize>> = config
            .experts_per_layer
            .iter()
            .map(|&experts| evenly(experts, mesh.expert()))
            .collect();
        let replica = |(index, device): (usize, &Device)| {
            let mut replica = YuanModel::new(config, device)?;
            for (block, devices) in replica.blocks.iter_mut().zip(&placement) {
                block.moe.experts = Experts::some(config, devices[index % mesh.expert()], device);
            }
            Ok(replica)
        };
        let replicas =
            mesh.devices().iter().enumerate().map(replica).collect::<Result<_, ConfigError>>()?;
        Ok(Self { replicas, placement, config: config.clone(), mesh: mesh.clone() })
    }

    /// Checks that every layer has an expert for every device that shares them.
    ///
    /// # Errors
    ///
    /// Names the layer that has too few.
    pub fn check(config: &YuanConfig, mesh: &DeviceMesh) -> Result<(), ConfigError> {
        for (layer, &experts) in config.experts_per_layer.iter().enumerate() {
            if experts < mesh.expert() {
                let devices = mesh.expert();
                return Err(ConfigError::TooFewForMesh { layer, experts, devices });
            }
        }
        Ok(())
    }

    /// Spreads a model over a mesh, with copies of its weights.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn distribute(model: &YuanModel, mesh: &DeviceMesh) -> Result<Self, ConfigError> {
        let empty = Self::new(model.config(), mesh)?;
        let stored = empty.stored_parameters();
        let shapes: HashMap<&str, &[usize]> = stored
            .iter()
            .map(|parameter| (parameter.path.as_str(), &parameter.shape[..]))
            .collect();
        let read = |path: &str, slices: Range<usize>| {
            let mut shape = shapes.get(path)?.to_vec();
            if slices.len() == shape.first().copied().unwrap_or(1) {
                return named::read_part(model, path, None);
            }
            // Experts one by one: no device reads those of another.
            shape[0] = slices.len();
            let parts = slices.map(|index| named::read_part(model, path, Some(index)));
            Some(named::joined(parts.collect::<Option<_>>()?, &shape))
        };
        Ok(named::write_stored(empty, &stored, read))
    }

    /// What the model is, whatever holds it.
    pub fn config(&self) -> &YuanConfig {
        &self.config
    }

    /// The devices that hold it.
    pub fn mesh(&self) -> &DeviceMesh {
        &self.mesh
    }

    /// Experts of every layer on each device of a row, `[layer][device]`: the first experts are on
    /// the first device.
    pub fn placement(&self) -> &[Vec<usize>] {
        &self.placement
    }

    /// Adds a number to the selection bias of every expert; see
    /// [`YuanModel::shift_selection_bias`](YuanModel::shift_selection_bias).
    pub fn shift_selection_bias(mut self, shifts: &[Vec<f32>]) -> Self {
        let shift = |replica: YuanModel| replica.shift_selection_bias(shifts);
        self.replicas = self.replicas.into_iter().map(shift).collect();
        self
    }

    /// Cuts a batch into one part for each device, in order and as equal as can be.
    ///
    /// # Errors
    ///
    /// If it has fewer rows than there are devices.
    pub fn shards(&self, batch: Batch) -> Result<Vec<Shard>, ModelError> {
        let ([rows, seq], devices) = (batch.input_ids.dims(), self.replicas.len());
        if rows < devices {
            let reason = format!("a batch of {rows} rows is too small for {devices} devices");
            return Err(ModelError::Mesh(reason));
        }
        let shares = evenly(rows, devices);
        let of_mask = batch.mask.as_ref().map(|mask| (mask, mask.count().max(1) as f64));
        let with_gradients = batch.input_ids.device().is_autodiff();
        let shard = |(index, device): (usize, &Device)| {
            let device = match (with_gradients, device.is_autodiff()) {
                (true, false) => device.clone().autodiff(),
                (false, true) => device.clone().inner(),
                _ => device.clone(),
            };
            let first: usize = shares[..index].iter().sum();
            let part = |x: &Tensor<2, Int>| {
                let own = x.clone().slice_dim(0, first..first + shares[index]);
                ops::transfer_int(own, &device)
            };
            let position_ids = part(&batch.position_ids);
            let own = first..first + shares[index];
            // The loss is the mean over the learnt labels of all devices.
            let (share, mask) = match of_mask {
                None => (shares[index] as f64 / rows as f64, None),
                Some((mask, count)) => {
                    let learnt: u64 = mask.learnt_per_row[own.clone()].iter().sum();
                    (learnt as f64 / count, Some(mask.learnt.clone().slice_dim(0, own.clone())))
                }
            };
            let padding = of_mask.and_then(|(mask, _)| mask.padding.clone());
            Shard {
                input_ids: part(&batch.input_ids),
                labels: part(&batch.labels),
                share,
                mask: mask.map(|mask| ops::transfer(mask, &device)),
                padding: padding.map(|padding| part(&padding.int()).equal_elem(1)),
                documents: self
                    .config
                    .isolate_documents
                    .then(|| DocumentMask::new(position_ids.clone())),
                rotary: Rotary::new(&self.config, Some(position_ids), seq, &device),
            }
        };
        Ok(self.mesh.devices().iter().enumerate().map(shard).collect())
    }
}

/// Runs every layer on all devices, with an exchange of tokens in each; the batch's rows are spread
/// over the devices in their order. Losses, balancing losses included, are those of one device.
impl Layered for MeshModel {
    type Inputs = Vec<Shard>;

    fn inputs(&self, batch: Batch) -> Result<Vec<Shard>, ModelError> {
        self.shards(batch)
    }

    fn num_layers(&self) -> usize {
        self.config.num_layers()
    }

    fn embed(&self, shards: &Vec<Shard>, dtype: FloatDType) -> Vec<Tensor<3>> {
        let mut embedded = Vec::with_capacity(shards.len());
        for (replica, shard) in self.replicas.iter().zip(shards) {
            embedded.push(replica.embed(shard.input_ids.clone(), Some(dtype)));
        }
        embedded
    }

    fn layer(
        &self,
        layer: usize,
        x: Vec<Tensor<3>>,
        shards: &Vec<Shard>,
        balance: BalanceLosses,
    ) -> Result<LayerOutput<Vec<Tensor<3>>>, ModelError> {
        let (routed, rows) = self.route(layer, x, shards);
        let balance_loss = balance_loss(&routed, shards, balance);
        // Reading the counts of one device must not keep the others from starting; a flush may
        // wait, so all have work first.
        for tokens in &rows {
            tokens.device().flush().map_err(ModelError::device)?;
        }
        let mut counts = Vec::with_capacity(routed.len());
        for device in &routed {
            counts.push(device.to.dispatch.rows_per_expert()?);
        }
        let load = ExpertLoad::Host(sum_over_devices(&counted(&routed, &counts, shards)?));
        let devices: Vec<Device> = shards.iter().map(Shard::device).collect();
        let (returned, rows_per_device) = self.visit_experts(layer, rows, counts, &devices);

        let mut hidden = Vec::with_capacity(devices.len());
        let blocks = self.replicas.iter().map(|replica| &replica.blocks[layer]);
        for ((block, device), rows) in blocks.zip(routed).zip(returned) {
            let x = device.residual;
            hidden.push(match rows {
                Some(rows) => {
                    let combined = device.to.combine(rows, x.dims());
                    block.add(x, combined)
                }
                // Every token visits an expert: nothing returns only where there are no tokens.
                None => x,
            });
        }
        let rows_per_device = Some(DeviceRows::new(rows_per_device));
        Ok(LayerOutput { hidden, load, rows_per_device, balance_loss })
    }

    fn loss_of_hidden(
        &self,
        x: Vec<Tensor<3>>,
        shards: &Vec<Shard>,
    ) -> Result<Tensor<1>, ModelError> {
        let home = shards[0].device();
        let mut sum: Option<Tensor<1>> = None;
        for ((replica, x), shard) in self.replicas.iter().zip(x).zip(shards) {
            let hidden = replica.final_norm.forward(x);
            let losses = replica.token_losses(hidden, shard.labels.clone());
            let loss = masked_mean(losses, shard.mask.clone());
            let loss = ops::transfer(loss, &home).mul_scalar(shard.share);
            sum = Some(match sum {
                Some(sum) => sum + loss,
                None => loss,
            });
        }
        sum.ok_or_else(|| ModelError::Mesh("a mesh needs at least one device".into()))
    }
}

/// One device between routing and combining.
struct RoutedDevice {
    /// The residual stream after attention, `[batch share, seq, hidden]`.
    residual: Tensor<3>,
    /// Where its tokens go.
    to: Routed,
}

impl MeshModel {
    /// Attention and routing on every device; also the tokens of each, sorted by expert.
    fn route(
        &self,
        layer: usize,
        x: Vec<Tensor<3>>,
        shards: &[Shard],
    ) -> (Vec<RoutedDevice>, Vec<Tensor<2>>) {
        let (mut routed, mut rows) = (Vec::new(), Vec::new());
        for ((replica, x), shard) in self.replicas.iter().zip(x).zip(shards) {
            let block = &replica.blocks[layer];
            let residual = block.attend(x, &shard.rotary, shard.documents.as_ref());
            let normed = block.moe_norm.forward(residual.clone());
            let (to, tokens) = block.moe.route(normed, None);
            routed.push(RoutedDevice { residual, to });
            rows.push(tokens);
        }
        (routed, rows)
    }

    /// Sends the rows of every device to their experts and back; also the rows that the devices at
    /// each place of a mesh's rows computed.
    fn visit_experts(
        &self,
        layer: usize,
        rows: Vec<Tensor<2>>,
        counts: Vec<Vec<usize>>,
        devices: &[Device],
    ) -> (Vec<Option<Tensor<2>>>, Vec<u64>) {
        let width = self.mesh.expert();
        let mut rows_per_device = vec![0; width];
        let mut returned = Vec::with_capacity(rows.len());
        let (mut rows, mut counts) = (rows.into_iter(), counts.into_iter());
        for (replicas, devices) in self.replicas.chunks(width).zip(devices.chunks(width)) {
            let counts = counts.by_ref().take(width).collect();
            let exchange = Exchange::new(counts, &self.placement[layer]);
            for (sum, rows) in rows_per_device.iter_mut().zip(exchange.rows_per_device()) {
                *sum += rows as u64;
            }
            let arrived = exchange.send(rows.by_ref().take(width).collect());
            let mut computed = Vec::with_capacity(width);
            for (replica, arrived) in replicas.iter().zip(arrived) {
                computed.push(arrived.map(|Arrived { rows, rows_per_expert }| {
                    replica.blocks[layer].moe.experts.forward(rows, || rows_per_expert)
                }));
            }
            returned.extend(exchange.send_back(computed, devices));
        }
        (returned, rows_per_device)
    }
}

/// What one device computes of a batch.
#[derive(Debug)]
pub struct Shard {
    input_ids: Tensor<2, Int>,
    labels: Tensor<2, Int>,
    /// The part of the batch's learnt labels that it has.
    share: f64,
    /// 1 where a label is learnt, if not everywhere, `[batch share, seq]`.
    mask: Option<Tensor<2>>,
    /// True where a token only fills a row up, `[batch share, seq]`.
    padding: Option<Tensor<2, Bool>>,
    rotary: Rotary,
    documents: Option<DocumentMask>,
}

impl Shard {
    fn device(&self) -> Device {
        self.input_ids.device()
    }
}

/// The balancing losses over all tokens of the batch, as one device would compute them.
fn balance_loss(
    routed: &[RoutedDevice],
    shards: &[Shard],
    balance: BalanceLosses,
) -> Option<Tensor<1>> {
    let home = shards[0].device();
    let mut total: Option<Tensor<1>> = None;
    for (device, shard) in routed.iter().zip(shards) {
        let batch = shard.input_ids.dims()[0];
        let sums =
            ops::transfer(balance.sums(&device.to.tokens(batch, shard.padding.as_ref()))?, &home);
        total = Some(match total {
            Some(total) => total + sums,
            None => sums,
        });
    }
    let [_, experts] = routed[0].to.routing.logits.dims();
    Some(balance.of_sums(total?, experts))
}

/// The counts of every device without the tokens that only fill rows up.
fn counted(
    routed: &[RoutedDevice],
    counts: &[Vec<usize>],
    shards: &[Shard],
) -> Result<Vec<Vec<usize>>, ModelError> {
    let mut own = counts.to_vec();
    for ((own, device), shard) in own.iter_mut().zip(routed).zip(shards) {
        if let Some(padding) = shard.padding.clone() {
            let tokens = padding.dims().iter().product::<usize>();
            let counted = padding.reshape([tokens]).bool_not();
            let load = ExpertLoad::Device(device.to.dispatch.tokens_per_expert_where(counted));
            *own = load.read()?.into_iter().map(|count| count as usize).collect();
        }
    }
    Ok(own)
}

/// Tokens of every expert, from `counts[device][expert]`.
fn sum_over_devices(counts: &[Vec<usize>]) -> Vec<u64> {
    let mut sums = vec![0; counts.first().map_or(0, Vec::len)];
    for counts in counts {
        for (sum, &count) in sums.iter_mut().zip(counts) {
            *sum += count as u64;
        }
    }
    sums
}
