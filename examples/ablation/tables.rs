//! The variants, the paper's numbers, and the tables that put ours beside them.

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
    fn table_1() -> Vec<Self> {
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
    fn table_2(layers: usize, lfa: bool) -> Vec<Self> {
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

/// Means over the seeds of one variant.
struct Row {
    parameters: f64,
    loss: f64,
    gini: f64,
    /// Mean over the seeds of (loss − the base's loss of that seed).
    difference: f64,
    /// Half the width of its 95 % confidence interval; none for a single seed.
    error: Option<f64>,
}

fn row(outcomes: &[Outcome], variant: &Variant) -> Option<Row> {
    let of = |key: &str, seed: u64| outcomes.iter().find(|o| o.variant == key && o.seed == seed);
    let base = Variant { lfa: variant.lfa, ..Variant::base() }.key();
    let runs: Vec<&Outcome> = outcomes.iter().filter(|o| o.variant == variant.key()).collect();
    let differences: Vec<f64> =
        runs.iter().filter_map(|run| Some(run.loss - of(&base, run.seed)?.loss)).collect();
    let n = differences.len() as f64;
    if differences.is_empty() {
        return None;
    }
    let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / n;
    let difference = mean(&mut differences.iter().copied());
    let variance =
        differences.iter().map(|d| (d - difference).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    Some(Row {
        parameters: mean(&mut runs.iter().map(|run| run.parameters as f64)),
        loss: mean(&mut runs.iter().map(|run| run.loss)),
        gini: mean(&mut runs.iter().map(|run| run.gini)),
        difference,
        error: student_t(differences.len()).map(|t| t * (variance / n).sqrt()),
    })
}

/// Student's t at 95 % for the mean of so many values.
fn student_t(values: usize) -> Option<f64> {
    const T: [f64; 9] = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262];
    values.checked_sub(2).map(|i| T.get(i).copied().unwrap_or(1.96))
}

/// Both tables with a verdict on the direction of every difference to the base.
pub fn report(outcomes: &[Outcome], layers: usize) -> String {
    let mut text = String::new();
    for (title, variants) in [
        ("Table 1: auxiliary losses and the cumulative constraint (alpha off)", Variant::table_1()),
        (
            "Table 2: the individual constraint (beta off), with localized filtering",
            Variant::table_2(layers, true),
        ),
        ("Table 2, without localized filtering", Variant::table_2(layers, false)),
    ] {
        text += &format!(
            "{title}\n{:<34}  {:>10}  {:>8}  {:>18}  {:>5}  {:>7}  {:>12}  direction\n",
            "", "parameters", "loss", "against the base", "gini", "paper", "against base"
        );
        let paper_base = variants[0].paper.unwrap_or(0.0);
        for variant in &variants {
            let Some(row) = row(outcomes, variant) else { continue };
            let paper = variant.paper.map_or(String::from("-"), |loss| format!("{loss:.3}"));
            let against = variant
                .paper
                .map_or(String::from("-"), |loss| format!("{:+.3}", loss - paper_base));
            let error = row.error.map_or_else(|| "?".into(), |error| format!("{error:.4}"));
            let ours = format!("{:+.4} +- {error}", row.difference);
            text += &format!(
                "{:<34}  {:>8.3} M  {:>8.4}  {ours:>18}  {:>5.2}  {paper:>7}  {against:>12}  {}\n",
                variant.name,
                row.parameters / 1e6,
                row.loss,
                row.gini,
                verdict(&row, variant.paper.map(|loss| loss - paper_base))
            );
        }
        text.push('\n');
    }
    text.push_str(
        "Loss: mean validation cross-entropy over the seeds, nats per token; +-: 95 % confidence interval of the\n\
         paired difference (Student's t). The direction agrees or not where ours lies outside of it, else it is noise.\n",
    );
    text
}

fn verdict(row: &Row, paper: Option<f64>) -> &'static str {
    match paper {
        _ if row.difference == 0.0 => "",
        None => "not in the paper",
        Some(_) if row.error.is_none() => "one seed tells nothing",
        Some(_) if row.difference.abs() <= row.error.unwrap_or(0.0) => "within noise",
        Some(paper) if paper.abs() < 5e-4 => "the paper has none",
        Some(paper) if paper.signum() == row.difference.signum() => "agrees",
        Some(_) => "does not agree",
    }
}

/// Differences to the base, ours as bars with their standard errors, the paper's as rings.
pub fn picture(outcomes: &[Outcome], layers: usize) -> anyhow::Result<String> {
    use yuan::train::report::pictures::{Difference, differences};
    let rows = Variant::all(layers).into_iter().filter(|variant| variant.name != "base");
    let difference = |variant: Variant| {
        let row = row(outcomes, &variant)?;
        let base = if variant.lfa { 1.661 } else { 1.739 };
        Some(Difference {
            name: if variant.lfa {
                variant.name.into()
            } else {
                format!("{}, no LFA", variant.name)
            },
            ours: row.difference,
            error: row.error.unwrap_or(0.0),
            paper: variant.paper.map(|loss| loss - base),
        })
    };
    Ok(differences("Loss against the base run", &rows.filter_map(difference).collect::<Vec<_>>())?)
}
