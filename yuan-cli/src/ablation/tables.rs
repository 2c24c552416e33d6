//! The tables that put the outcomes beside the paper's numbers.

use yuan::report::pictures::{Difference, differences};

use super::variants::{Outcome, Variant};

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
                verdict(variant, &row, variant.paper.map(|loss| loss - paper_base))
            );
        }
        text.push('\n');
    }
    text.push_str(
        "Loss: mean validation cross-entropy over the seeds, nats per token; +-: 95 % confidence interval of the\n\
         paired difference (Student's t). The direction agrees or not where the difference lies outside of it,\n\
         else it is noise.\n",
    );
    text
}

/// What the direction of a difference says; the base has none to itself. The text does not depend
/// on whether a difference is exactly zero, which rounding decides.
fn verdict(variant: &Variant, row: &Row, paper: Option<f64>) -> &'static str {
    let Some(paper) = paper else { return "not in the paper" };
    match row.error {
        _ if variant.is_base() => "",
        None => "one seed tells nothing",
        Some(error) if row.difference.abs() <= error => "within noise",
        Some(_) if paper.abs() < 5e-4 => "the paper has none",
        Some(_) if paper.signum() == row.difference.signum() => "agrees",
        Some(_) => "does not agree",
    }
}

/// Differences to the base: those of these runs as bars with their 95 % confidence intervals, the
/// paper's as rings.
pub fn picture(outcomes: &[Outcome], layers: usize) -> anyhow::Result<String> {
    let rows = Variant::all(layers).into_iter().filter(|variant| !variant.is_base());
    let difference = |variant: Variant| {
        let row = row(outcomes, &variant)?;
        let base = if variant.lfa { 1.661 } else { 1.739 };
        Some(Difference {
            name: if variant.lfa {
                variant.name.into()
            } else {
                format!("{}, no LFA", variant.name)
            },
            measured: row.difference,
            error: row.error.unwrap_or(0.0),
            paper: variant.paper.map(|loss| loss - base),
        })
    };
    Ok(differences("Loss against the base run", &rows.filter_map(difference).collect::<Vec<_>>())?)
}
