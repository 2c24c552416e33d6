//! What is trained: the rows of the paper's tables, and what a run of one came to.

use serde::{Deserialize, Serialize};
use yuan::laep::PerLayer;

/// One row of a table.
pub struct Variant {
    pub name: &'static str,
    /// α and β; none for a run that never prunes.
    pub limits: Option<(PerLayer, f64)>,
    /// Coefficients of the auxiliary and the sequence-wise loss, and the rate of bias-based
    /// balancing.
    pub balance: [f64; 3],
    /// Localized filtering.
    pub lfa: bool,
    /// Test loss of the paper's 10 B model.
    pub paper: Option<f64>,
}

/// What a run came to.
#[derive(Serialize, Deserialize)]
pub struct Outcome {
    pub variant: String,
    pub seed: u64,
    pub parameters: u64,
    pub experts_per_layer: Vec<usize>,
    pub loss: f64,
    pub gini: f64,
}

const OFF: [f64; 3] = [0.0; 3];

impl Variant {
    pub fn base() -> Self {
        Self { name: "base", limits: None, balance: OFF, lfa: true, paper: Some(1.661) }
    }

    /// Rows of Table 1: auxiliary losses and β.
    pub fn table_1() -> Vec<Self> {
        let balanced = |name, balance, paper| Self { name, balance, paper, ..Self::base() };
        let beta = |name, beta: f64, paper| Self {
            name,
            limits: Some((f64::INFINITY.into(), beta)),
            paper: Some(paper),
            ..Self::base()
        };
        vec![
            Self::base(),
            balanced("DeepSeek-V3 auxiliary loss 1e-4", [0.0, 1e-4, 0.0], Some(1.656)),
            balanced("Mixtral auxiliary loss 1e-4", [1e-4, 0.0, 0.0], Some(1.656)),
            balanced("Mixtral auxiliary loss 1e-2", [1e-2, 0.0, 0.0], None),
            balanced("bias-based balancing 1e-2", [0.0, 0.0, 1e-2], None),
            beta("beta 0.05", 0.05, 1.648),
            beta("beta 0.1", 0.1, 1.658),
            beta("beta 0.2", 0.2, 1.670),
        ]
    }

    /// Rows of Table 2: α, with and without localized filtering; β is not known and off here.
    pub fn table_2(layers: usize, lfa: bool) -> Vec<Self> {
        let row = |name, alpha: PerLayer, with: f64, without: f64| Self {
            name,
            limits: Some((alpha, 1.0)),
            balance: OFF,
            lfa,
            paper: Some(if lfa { with } else { without }),
        };
        let mixed = PerLayer::Each(
            (0..layers).map(|layer| if layer % 2 == 0 { 0.2 } else { 0.4 }).collect(),
        );
        vec![
            Self { lfa, paper: Some(if lfa { 1.661 } else { 1.739 }), ..Self::base() },
            row("alpha 0.2", 0.2.into(), 1.643, 1.723),
            row("alpha 0.2 and 0.4 in turn", mixed, 1.650, 1.729),
            row("alpha 0.4", 0.4.into(), 1.653, 1.733),
            row("alpha 0.6", 0.6.into(), 1.661, 1.741),
        ]
    }

    /// Every run, the base of each kind first.
    pub fn all(layers: usize) -> Vec<Self> {
        let with =
            Self::table_1().into_iter().chain(Self::table_2(layers, true).into_iter().skip(1));
        with.chain(Self::table_2(layers, false)).collect()
    }

    /// Whether it is what others are compared with.
    pub fn is_base(&self) -> bool {
        self.name == "base"
    }

    pub fn prunes(&self) -> bool {
        self.limits.is_some()
    }

    /// Name in file names and outcomes.
    pub fn key(&self) -> String {
        let name: String = self
            .name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' })
            .collect();
        if self.lfa { name } else { format!("{name}-without-lfa") }
    }
}
