//! Names and layout of the parameters of an image tower and its projector.

use burn::{module::Module, tensor::TensorData};

use super::elements::transpose;
use crate::named;

/// A parameter as upstream's checkpoints have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// Its name there.
    pub name: String,
    /// Whether it is stored with its output first: `[out, in, …]`.
    pub is_transposed: bool,
}

/// Upstream's name of a parameter of a [`VisionTower`](crate::vision::VisionTower) or a
/// [`Projector`](crate::vision::Projector), by its path in the module; none of others.
pub fn published(path: &str) -> Option<Published> {
    let matrix = |name: String| Some(Published { name, is_transposed: true });
    let same = |name: String| Some(Published { name, is_transposed: false });
    let parts: Vec<&str> = path.split('.').collect();
    let layer = |number: &str| format!("vision_model.encoder.layers.{number}");
    match parts[..] {
        ["patch", "weight"] => matrix("vision_model.embeddings.patch_embedding.weight".into()),
        ["patch", "bias"] => same("vision_model.embeddings.patch_embedding.bias".into()),
        [table @ ("class_embedding" | "position_embedding")] => {
            same(format!("vision_model.embeddings.{table}"))
        }
        ["blocks", number, norm @ ("norm1" | "norm2"), _, what] => {
            let what = if what == "beta" { "bias" } else { "weight" };
            same(format!("{}.{norm}.{what}", layer(number)))
        }
        ["blocks", number, norm @ ("q_norm" | "k_norm"), _] => {
            same(format!("{}.attn.{norm}.weight", layer(number)))
        }
        ["blocks", number, scale @ ("ls1" | "ls2")] => same(format!("{}.{scale}", layer(number))),
        ["blocks", number, linear, what] => {
            let within = if matches!(linear, "qkv" | "proj") { "attn" } else { "mlp" };
            let name = format!("{}.{within}.{linear}.{what}", layer(number));
            if what == "weight" { matrix(name) } else { same(name) }
        }
        [linear @ ("gate" | "up" | "down"), "weight"] => {
            matrix(format!("imagemlp.{linear}_proj.weight"))
        }
        ["norm", _] => same("imagemlp_layernorm.weight".into()),
        _ => None,
    }
}

/// Fills a tower or a projector with upstream's tensors, which `read` has by their names: all that it
/// has, in f32.
///
/// # Errors
///
/// Names a parameter that `read` does not have, or has in another size.
pub fn fill<M: Module>(
    module: M,
    mut read: impl FnMut(&str) -> Option<TensorData>,
) -> Result<M, String> {
    let mut problem = None;
    let module = named::write_parameters(module, |path, shape| {
        let Published { name, is_transposed } = published(path)?;
        let Some(data) = read(&name) else {
            problem.get_or_insert(format!("{name} is missing"));
            return None;
        };
        if data.num_elements() != shape.num_elements() {
            let (found, expected) = (data.shape().to_vec(), shape.to_vec());
            problem.get_or_insert(format!(
                "{name} is {found:?}, expected the elements of {expected:?}"
            ));
            return None;
        }
        let (data, shape) = (data.convert::<f32>(), shape.to_vec());
        let values: Vec<f32> = data.iter::<f32>().collect();
        Some(match (is_transposed, &shape[..]) {
            (true, &[from, to]) => {
                let mut transposed = vec![0.0; values.len()];
                transpose(&values, to, from, &mut transposed, |value| value);
                TensorData::new(transposed, shape)
            }
            _ => TensorData::new(values, shape),
        })
    });
    problem.map_or(Ok(module), Err)
}
