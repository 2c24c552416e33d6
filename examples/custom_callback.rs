//! A callback of your own: it watches a run, keeps a state across checkpoints, and ends the run.
//!
//!     cargo run --release --example custom_callback

use std::error::Error;

use yuan::{
    prelude::*,
    train::{burn::tensor::Device, data::RowStream, fresh_model},
};

/// Ends a run when the loss has not improved for some steps.
struct StopEarly {
    patience: u64,
    best: f64,
    best_step: u64,
}

impl<M> Callback<M> for StopEarly {
    fn name(&self) -> &'static str {
        "stop_early"
    }

    fn on_step(
        &mut self,
        context: &mut Context<'_, M>,
        metrics: &StepMetrics,
    ) -> Result<(), TrainError> {
        if metrics.loss < self.best {
            (self.best, self.best_step) = (metrics.loss, metrics.step);
        } else if metrics.step >= self.best_step + self.patience {
            println!("no better than {:.3} since step {}", self.best, self.best_step);
            context.request_stop();
        }
        Ok(())
    }

    /// What a checkpoint carries, so that a resumed run decides as the uninterrupted one would.
    fn state(&self) -> Option<serde_json::Value> {
        Some(serde_json::json!([self.best, self.best_step]))
    }

    fn restore(&mut self, state: serde_json::Value) -> Result<(), TrainError> {
        let restored = serde_json::from_value(state)
            .map_err(|error| TrainError::Callback { name: "stop_early", cause: error.into() });
        (self.best, self.best_step) = restored?;
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let config = TrainConfig {
        steps: 200,
        batch_size: 4,
        seq_len: 32,
        learning_rate: 1e-2,
        min_learning_rate: 1e-2,
        laep: LaepConfig { trigger: Trigger::Never, ..LaepConfig::default() },
        ..TrainConfig::default()
    };
    // Tokens that nothing can be learnt from but their frequency.
    let tokens = |seed: u32| -> Vec<u32> {
        (0..4000)
            .scan(seed, |x, _| {
                *x = x.wrapping_mul(48_271) % 65_521;
                Some(*x % 50)
            })
            .collect()
    };
    let rows = [
        RowStream::new(tokens(1), 0, config.seq_len, Some(0))?,
        RowStream::new(tokens(2), 0, config.seq_len, None)?,
    ];
    let device = Device::flex().autodiff();
    let model = fresh_model(&YuanConfig::tiny(50), config.seed, &device)?;
    // Checkpoints go here; a run that is to be kept has a directory of its own.
    let run_dir = tempfile::tempdir()?;
    let stop = StopEarly { patience: 10, best: f64::INFINITY, best_step: 0 };
    let trainer = Trainer::new(config, run_dir.path(), &device, model, rows)?;
    let mut trainer = trainer.with_callback(stop)?;
    trainer.run()?;
    println!("ended at step {} of {}", trainer.step(), trainer.config().steps);
    Ok(())
}
