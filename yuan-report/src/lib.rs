//! What a pre-training run with LAEP has to show, all of it read back from its metrics file.
//!
//! Read in this order: [`History`] (the events of a run), [`summary_table`] (before and after its
//! prunes), [`pictures`] (SVG), [`html_report`] (one page with everything), and [`Report`], which
//! makes all of them and writes them into the run's directory.
//!
//! ```no_run
//! let report = yuan_report::Report::of("runs/pretrain".as_ref())?;
//! report.save()?;
//! println!("{}", report.table());
//! # Ok::<(), yuan_report::ReportError>(())
//! ```

mod answers;
mod error;
mod evaluation;
mod history;
mod html;
pub mod pictures;
mod report;
mod table;

pub use answers::Answer;
pub use error::ReportError;
pub use evaluation::evaluation_page;
pub use history::{History, Stage, StageLines, Window};
pub use html::html_report;
pub use report::Report;
pub use table::summary_table;
