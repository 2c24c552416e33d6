//! LAEP on a mixture of experts that is no Yuan model: four methods, and it can be pruned in
//! mid-training.
//!
//!     cargo run --release --example prune_any

use burn::module::{Initializer::Normal, Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Distribution, Int, Tensor, activation::softmax};
use yuan::{model::ExpertAxis, prelude::*};

const WIDTH: usize = 8;
/// Linear experts, of which the router chooses one for every input.
#[derive(Module, Debug)]
struct Mixture {
    router: Param<Tensor<2>>,  // [width, experts]
    experts: Param<Tensor<3>>, // [experts, width, width]
}

impl Mixture {
    fn new(experts: usize, device: &Device) -> Self {
        let init = Normal { mean: 0.0, std: 0.5 };
        Self {
            router: init.init([WIDTH, experts], device),
            experts: init.init([experts, WIDTH, WIDTH], device),
        }
    }

    /// Output for `[n, width]`, and how many inputs each expert received.
    fn forward(&self, x: Tensor<2>) -> (Tensor<2>, Tensor<1, Int>) {
        let scores = softmax(x.clone().matmul(self.router.val()), 1);
        let columns = Tensor::<1, Int>::arange(0..scores.dims()[1] as i64, &x.device());
        let visits = scores.clone().argmax(1).equal(columns.unsqueeze());
        let weights = (scores * visits.clone().float()).transpose().unsqueeze_dim::<3>(2);
        let outputs = x.unsqueeze_dim::<3>(0).matmul(self.experts.val()); // [experts, n, width]
        ((outputs * weights).sum_dim(0).squeeze_dim(0), visits.int().sum_dim(0).squeeze_dim(0))
    }
}

impl PrunableExperts for Mixture {
    fn experts_per_layer(&self) -> Vec<usize> {
        vec![self.experts.dims()[0]]
    }

    fn top_k(&self) -> usize {
        1
    }

    fn expert_axes(&self) -> Vec<Vec<ExpertAxis>> {
        let axis = |param, axis| ExpertAxis { param, axis, blocks: 1 };
        vec![vec![axis(self.router.id, 1), axis(self.experts.id, 0)]]
    }

    fn set_experts_per_layer(&mut self, _: Vec<usize>) {} // the shapes say it
}

/// Inputs around four centres, the first the most frequent; each centre has a map of its own.
fn batch(centres: &Tensor<2>, maps: &Tensor<3>, device: &Device) -> (Tensor<2>, Tensor<2>) {
    let uniform = Tensor::<1>::random([256], Distribution::Uniform(0.0, 1.0), device);
    let kind = uniform.powf_scalar(3.0).mul_scalar(4.0).int();
    let noise = Tensor::random([256, WIDTH], Distribution::Normal(0.0, 0.3), device);
    let x = centres.clone().select(0, kind.clone()) + noise;
    let y = x.clone().unsqueeze_dim::<3>(1).matmul(maps.clone().select(0, kind)).squeeze_dim(1);
    (x, y)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (plain, device) = (Device::flex(), Device::flex().autodiff());
    plain.seed(1);
    let normal = Distribution::Normal(0.0, 1.0);
    let centres = Tensor::random([4, WIDTH], normal, &plain);
    let maps = Tensor::random([4, WIDTH, WIDTH], normal, &plain);
    let mut model = Mixture::new(16, &device);
    let mut optimizer = AdamW::new(&AdamWConfig::default().with_weight_decay(0.0));
    let mut tracker = LoadTracker::new(50, 1)?;
    for step in 1..=600 {
        let (x, y) = batch(&centres, &maps, &plain);
        let (output, load) = model.forward(x.autodiff());
        let loss = (output - y.autodiff()).powf_scalar(2.0).mean();
        let tokens: Vec<u64> =
            load.into_data().convert::<i64>().iter::<i64>().map(|n| n as u64).collect();
        tracker.record(vec![LayerLoad::new(tokens)])?;
        if step % 100 == 0 {
            let value = loss.clone().into_scalar::<f32>();
            println!("step {step}: loss {value:.4}, {:?} experts", model.experts_per_layer());
        }
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(model, gradients, 1e-2, 1.0);
        if step == 300 {
            let limits = PruneLimits { beta: 0.05.into(), multiple_of: 2, ..Default::default() };
            let layout = ExpertLayout { top_k: model.top_k(), groups: 2 };
            let plan = PrunePlan::new(&tracker.last(1).layers, &limits, layout)?;
            println!("{plan}");
            let (pruned, cuts) = model.keep_experts(&plan.kept())?;
            optimizer.cut(&cuts); // the moments of the kept experts stay
            (model, tracker) = (pruned, LoadTracker::new(50, 1)?);
        }
    }
    Ok(())
}
