//! The model over a mesh: the layers of [`YuanModel`], device by device, with an exchange of tokens
//! in each.

use std::{collections::HashMap, ops::Range};

use burn::{
    module::Module,
    tensor::{Device, FloatDType, Int, Tensor, TensorData},
};

use super::{
    DeviceMesh,
    exchange::{Arrived, Exchange},
};
use crate::{
    Batch, ConfigError, ModelError, YuanConfig, YuanModel,
    attention::DocumentMask,
    loss::masked_mean,
    moe::{BalanceLosses, Experts, Routed},
    named, ops,
    rope::Rotary,
};

/// A Yuan model spread over the devices of a [`DeviceMesh`].
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

/// Loss of a batch and where its tokens went.
#[derive(Debug, Clone)]
pub struct MeshOutput {
    /// Mean next-token cross-entropy over the batch, `[1]`, on the mesh's home.
    pub loss: Tensor<1>,
    /// Weighted sum of the balancing losses of all layers over the batch, `[1]`, if any is on.
    pub balance_loss: Option<Tensor<1>>,
    /// Per layer: tokens that each expert received from all devices, `[num_experts]`, on the mesh's
    /// home.
    pub tokens_per_expert: Vec<Tensor<1, Int>>,
    /// Per layer: rows that the devices at each place of a row received, summed over the rows.
    pub rows_per_device: Vec<Vec<u64>>,
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
        let few = config.experts_per_layer.iter().position(|&experts| experts < mesh.expert());
        if let Some(layer) = few {
            return Err(ConfigError::Contradiction(format!(
                "layer {layer} has {} experts, too few for the {} devices of the mesh that share them",
                config.experts_per_layer[layer],
                mesh.expert()
            )));
        }
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

    /// Loss of a batch, whose rows are spread over the devices in their order.
    ///
    /// The same as that of the model on one device, balancing losses included.
    ///
    /// # Errors
    ///
    /// If the rows of the batch cannot be spread evenly, or a device fails.
    pub fn loss(
        &self,
        batch: Batch,
        balance: BalanceLosses,
        dtype: FloatDType,
    ) -> Result<MeshOutput, ModelError> {
        let shards = self.shards(batch)?;
        let mut x = self.embed(&shards, dtype);
        let (mut tokens_per_expert, mut rows_per_device) = (Vec::new(), Vec::new());
        let mut balance_losses = Vec::new();
        for layer in 0..self.config.num_hidden_layers() {
            let output = self.layer(layer, x, &shards, balance)?;
            x = output.hidden;
            tokens_per_expert.push(output.tokens_per_expert);
            rows_per_device.push(output.rows_per_device);
            balance_losses.extend(output.balance_loss);
        }
        Ok(MeshOutput {
            loss: self.loss_of_hidden(x, &shards)?,
            balance_loss: balance_losses.into_iter().reduce(|sum, more| sum + more),
            tokens_per_expert,
            rows_per_device,
        })
    }

    /// The table's rows of every device's tokens, in the given type: `[batch share, seq, hidden]`
    /// each.
    pub fn embed(&self, shards: &[Shard], dtype: FloatDType) -> Vec<Tensor<3>> {
        let embed = |(model, shard): (&YuanModel, &Shard)| {
            model.embed(shard.input_ids.clone(), Some(dtype))
        };
        self.replicas.iter().zip(shards).map(embed).collect()
    }

    /// Mean cross-entropy over the batch of what the last layer left on every device, `[1]`, on the
    /// mesh's home.
    ///
    /// # Errors
    ///
    /// If there are no devices.
    pub fn loss_of_hidden(
        &self,
        x: Vec<Tensor<3>>,
        shards: &[Shard],
    ) -> Result<Tensor<1>, ModelError> {
        let nothing = || ModelError::Mesh("a mesh needs at least one device".into());
        let home = shards.first().map(Shard::device).ok_or_else(nothing)?;
        let losses = self.replicas.iter().zip(x).zip(shards).map(|((model, x), shard)| {
            let hidden = model.final_norm.forward(x);
            ops::transfer(
                masked_mean(model.token_losses(hidden, shard.labels.clone()), None),
                &home,
            )
        });
        // As many tokens on every device: the mean of means is the mean.
        let sum = losses.reduce(|sum, loss| sum + loss).ok_or_else(nothing)?;
        Ok(sum.div_scalar(self.replicas.len() as f64))
    }

    /// One layer on all devices.
    ///
    /// # Errors
    ///
    /// If a device fails.
    pub fn layer(
        &self,
        layer: usize,
        x: Vec<Tensor<3>>,
        shards: &[Shard],
        balance: BalanceLosses,
    ) -> Result<MeshLayerOutput, ModelError> {
        let blocks = || self.replicas.iter().map(|replica| &replica.blocks[layer]);
        let (mut residual, mut routed, mut rows) = (Vec::new(), Vec::new(), Vec::new());
        for ((block, x), shard) in blocks().zip(x).zip(shards) {
            let x = block.attend(x, &shard.rotary, shard.documents.as_ref());
            let (to, tokens) = block.moe.route(block.moe_norm.forward(x.clone()), None);
            residual.push(x);
            routed.push(to);
            rows.push(tokens);
        }
        let balance_loss = balance_loss(&routed, shards, balance);
        // Reading the counts of one device must not keep the others from starting; a flush may
        // wait, so all have work first.
        for tokens in &rows {
            tokens.device().flush().map_err(ModelError::device)?;
        }
        let counts: Vec<Vec<usize>> = routed
            .iter()
            .map(|routed| routed.dispatch.rows_per_expert())
            .collect::<Result<_, _>>()?;
        let tokens_per_expert = sum_of_counts(&counts, &shards[0].device());

        let width = self.mesh.expert();
        let mut rows_per_device = vec![0; width];
        let devices: Vec<Device> = shards.iter().map(Shard::device).collect();
        let mut returned = Vec::with_capacity(rows.len());
        let (mut rows, mut counts) = (rows.into_iter(), counts.into_iter());
        for (replicas, devices) in self.replicas.chunks(width).zip(devices.chunks(width)) {
            let exchange =
                Exchange::new(counts.by_ref().take(width).collect(), &self.placement[layer]);
            rows_per_device
                .iter_mut()
                .zip(exchange.rows_per_device())
                .for_each(|(sum, n)| *sum += n as u64);
            let arrived = exchange.send(rows.by_ref().take(width).collect());
            let computed = replicas.iter().zip(arrived).map(|(replica, arrived)| {
                let Arrived { rows, rows_per_expert } = arrived?;
                Some(replica.blocks[layer].moe.experts.forward(rows, || rows_per_expert))
            });
            returned.extend(exchange.send_back(computed.collect(), devices));
        }
        let combine = |(((block, x), routed), rows): (
            ((&crate::Block, Tensor<3>), Routed),
            Option<Tensor<2>>,
        )| {
            // Every token visits an expert: nothing returns only where there are no tokens.
            let Some(rows) = rows else { return x };
            let hidden = routed.combine(rows, x.dims());
            block.add(x, hidden)
        };
        let hidden = blocks().zip(residual).zip(routed).zip(returned).map(combine).collect();
        Ok(MeshLayerOutput { hidden, tokens_per_expert, rows_per_device, balance_loss })
    }

    /// Cuts a batch into one part for each device, in order.
    ///
    /// # Errors
    ///
    /// If its rows cannot be spread evenly.
    pub fn shards(&self, batch: Batch) -> Result<Vec<Shard>, ModelError> {
        let [rows, seq] = batch.input_ids.dims();
        let share = rows / self.replicas.len();
        if share * self.replicas.len() != rows {
            let devices = self.replicas.len();
            return Err(ModelError::Mesh(format!(
                "a batch of {rows} rows cannot be spread evenly over {devices} devices"
            )));
        }
        let with_gradients = batch.input_ids.device().is_autodiff();
        let shard = |(index, device): (usize, &Device)| {
            let device = match (with_gradients, device.is_autodiff()) {
                (true, false) => device.clone().autodiff(),
                (false, true) => device.clone().inner(),
                _ => device.clone(),
            };
            let part = |x: &Tensor<2, Int>| {
                ops::transfer_int(
                    x.clone().slice_dim(0, index * share..(index + 1) * share),
                    &device,
                )
            };
            let position_ids = part(&batch.position_ids);
            Shard {
                input_ids: part(&batch.input_ids),
                labels: part(&batch.labels),
                documents: self
                    .config
                    .reset_attention_mask
                    .then(|| DocumentMask::new(position_ids.clone())),
                rotary: Rotary::new(&self.config, Some(position_ids), seq, &device),
            }
        };
        Ok(self.mesh.devices().iter().enumerate().map(shard).collect())
    }
}

/// What one device computes of a batch.
#[derive(Debug)]
pub struct Shard {
    input_ids: Tensor<2, Int>,
    labels: Tensor<2, Int>,
    rotary: Rotary,
    documents: Option<DocumentMask>,
}

impl Shard {
    fn device(&self) -> Device {
        self.input_ids.device()
    }
}

/// What one layer did on all devices.
#[derive(Debug, Clone)]
pub struct MeshLayerOutput {
    /// The residual stream on every device, `[batch share, seq, hidden]`.
    pub hidden: Vec<Tensor<3>>,
    /// Tokens that each expert received from all devices, `[num_experts]`, on the mesh's home.
    pub tokens_per_expert: Tensor<1, Int>,
    /// Rows that the devices at each place of a row received, summed over the rows.
    pub rows_per_device: Vec<u64>,
    /// Weighted sum of the balancing losses that are on, `[1]`, on the mesh's home.
    pub balance_loss: Option<Tensor<1>>,
}

/// The balancing losses over all tokens of the batch, as one device would compute them.
fn balance_loss(routed: &[Routed], shards: &[Shard], balance: BalanceLosses) -> Option<Tensor<1>> {
    let home = shards[0].device();
    let sums = routed.iter().zip(shards).map(|(routed, shard)| {
        let sums = balance.sums(&routed.tokens(shard.input_ids.dims()[0], None))?;
        Some(ops::transfer(sums, &home))
    });
    let sums = sums.collect::<Option<Vec<_>>>()?.into_iter().reduce(|sum, more| sum + more)?;
    let [_, experts] = routed[0].routing.logits.dims();
    Some(balance.of_sums(sums, experts))
}

/// Sums over the devices.
fn sum_of_counts(counts: &[Vec<usize>], home: &Device) -> Tensor<1, Int> {
    let experts = counts.first().map_or(0, Vec::len);
    let sum = |expert| counts.iter().map(|counts| counts[expert] as i64).sum();
    let sums: Vec<i64> = (0..experts).map(sum).collect();
    Tensor::from_data(TensorData::from(sums.as_slice()), home)
}

/// A number of experts for each of `devices`, as equal as can be.
pub(super) fn evenly(experts: usize, devices: usize) -> Vec<usize> {
    (0..devices).map(|device| experts / devices + usize::from(device < experts % devices)).collect()
}
