//! Do images and text use the same experts?

use serde::{Deserialize, Serialize};
use serde_json::Value;
use yuan_laep::LayerLoad;

use crate::{Callback, Context, Event, StepMetrics, TrainError};

/// Sums the loads of images and of text over windows and tells both ([`Event::ImageLoad`]); a model of
/// text alone is told nothing about.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct ImageLoads {
    steps: u64,
    images: Vec<Vec<u64>>,
    text: Vec<Vec<u64>>,
}

impl ImageLoads {
    fn add(sums: &mut [Vec<u64>], counts: Vec<Vec<u64>>) {
        for (sum, more) in sums.iter_mut().flatten().zip(counts.into_iter().flatten()) {
            *sum += more;
        }
    }
}

impl<M> Callback<M> for ImageLoads {
    fn name(&self) -> &'static str {
        "image_loads"
    }

    fn on_step(
        &mut self,
        context: &mut Context<'_, M>,
        metrics: &StepMetrics,
    ) -> Result<(), TrainError> {
        if metrics.image_loads.is_empty() {
            return Ok(());
        }
        let counts = |load: &LayerLoad| load.tokens_per_expert().to_vec();
        let images: Vec<Vec<u64>> = metrics.image_loads.iter().map(counts).collect();
        let all = metrics.loads.iter().map(counts).zip(&images);
        let text = all.map(|(all, images)| {
            all.iter().zip(images).map(|(all, images)| all.saturating_sub(*images)).collect()
        });
        let text: Vec<Vec<u64>> = text.collect();
        // After a prune a layer has fewer experts, in another order: a new window begins.
        if self.images.iter().map(Vec::len).ne(images.iter().map(Vec::len)) {
            *self = Self { steps: 1, images, text };
        } else {
            self.steps += 1;
            Self::add(&mut self.images, images);
            Self::add(&mut self.text, text);
        }
        if self.steps < context.config().laep.window_steps {
            return Ok(());
        }
        let layers = |sums: Vec<Vec<u64>>| sums.into_iter().map(LayerLoad::new).collect();
        let Self { steps, images, text } = std::mem::take(self);
        context.emit(Event::ImageLoad {
            step: context.step(),
            window_steps: steps,
            images: layers(images),
            text: layers(text),
        });
        Ok(())
    }

    fn state(&self) -> Option<Value> {
        serde_json::to_value(self).ok()
    }

    fn restore(&mut self, state: Value) -> Result<(), TrainError> {
        let restored = serde_json::from_value(state)
            .map_err(|error| TrainError::Callback { name: "image_loads", cause: error.into() });
        *self = restored?;
        Ok(())
    }
}
