//! The images of a batch: some tiles at a time through the tower, each part with a graph of its own
//! that is differentiated once the language model has been.

use burn::{
    module::Module,
    optim::{GradientsAccumulator, GradientsParams},
    tensor::{FloatDType, Tensor},
};
use yuan_model::{Inputs, YuanModel, ops, vision::ImageEncoder};

use crate::Freeze;

/// What the forward pass leaves of the images of a batch.
pub(super) struct SeenImages {
    /// The rows of the language model, `[rows, hidden]`, where its graph begins.
    pub rows: Tensor<2>,
    encoder: ImageEncoder,
    tiles: Tensor<4>,
    /// The graphs of the parts; none where they are computed again.
    kept: Vec<Tensor<2>>,
}

impl SeenImages {
    /// Sends the images of a batch through the tower, in the type of `dtype`; `again` keeps no graph, and
    /// every part is computed once more for its gradients.
    pub fn forward(
        model: &YuanModel,
        inputs: &Inputs,
        dtype: FloatDType,
        freeze: Freeze,
        again: bool,
    ) -> Option<Self> {
        let images = inputs.images()?;
        let encoder = model.images.clone().expect("images are given to a model that sees them");
        let encoder = match freeze.vision {
            true => ImageEncoder { tower: encoder.tower.no_grad(), ..encoder },
            false => encoder,
        };
        let tiles = images.tiles.clone().cast(dtype);
        let (mut kept, mut rows) = (Vec::new(), Vec::new());
        let forward = if again { encoder.clone().no_grad() } else { encoder.clone() };
        for part in ImageEncoder::parts(tiles.dims()[0]) {
            let seen = forward.forward(tiles.clone().slice_dim(0, part));
            rows.push(seen.clone().inner());
            if !again {
                kept.push(seen);
            }
        }
        let rows = Tensor::from_inner(Tensor::cat(rows, 0)).require_grad();
        Some(Self { rows, encoder, tiles, kept })
    }

    /// The gradients of tower and projector for those of the rows, `[rows, hidden]`.
    pub fn backward(self, model: &YuanModel, of_rows: Tensor<2>) -> GradientsParams {
        let mut sum = GradientsAccumulator::<YuanModel>::new();
        let (mut kept, mut row) = (self.kept.into_iter(), 0);
        for part in ImageEncoder::parts(self.tiles.dims()[0]) {
            let again = || self.encoder.forward(self.tiles.clone().slice_dim(0, part));
            let seen = kept.next().unwrap_or_else(again);
            let rows = seen.dims()[0];
            let gradient = of_rows.clone().slice_dim(0, row..row + rows);
            row += rows;
            let gradients = ops::continue_backward(seen, Tensor::from_inner(gradient)).backward();
            sum.accumulate(model, GradientsParams::from_grads(gradients, model));
        }
        sum.grads()
    }
}
