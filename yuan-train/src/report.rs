//! What a run has to show, all of it read back from its metrics file.

mod history;
mod pictures;
mod table;

pub use history::{History, Phase};
pub use pictures::{draw_expert_load, draw_loss};
pub use table::summary_table;
