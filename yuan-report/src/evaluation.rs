//! The page of an evaluation.

use yuan_eval::{Average, Published, Scored, SetScore, published};

use crate::html::{document, escape, table_of};

/// What answers to a benchmark scored, as one HTML page that needs nothing else: every set with its
/// interval beside the published numbers, and the answers that score lowest.
pub fn evaluation_page(scored: &Scored) -> String {
    let title = format!("{} by the {} rules", scored.benchmark, rules(scored));
    let mut body = format!("<p>{}</p>\n", escape(&summary(scored)));
    body += &sets(scored);
    if !scored.missing.is_empty() {
        let missing = escape(&scored.missing.join(", "));
        body += &format!("<p>There is no mean over the benchmark without {missing}.</p>\n");
    }
    body += "<p class=\"dim\">Intervals hold 95 % of the scores when as many items are drawn again with \
             replacement. Published numbers are those of Yuan3.0 Ultra (arXiv 2601.14327) and of the best \
             other model in its table; the rules by which they were made are not fully known.</p>\n";
    body += &worst(scored);
    document(&title, &body)
}

fn rules(scored: &Scored) -> &'static str {
    match scored.profile {
        yuan_eval::Profile::Authors => "authors’",
        yuan_eval::Profile::Yuan => "Yuan",
    }
}

fn summary(scored: &Scored) -> String {
    let Scored { items, answered, unknown, malformed: (malformed, first), .. } = scored;
    let mean =
        scored.average.map_or_else(String::new, |Average { value, interval: [low, high] }| {
            format!("The mean is {value:.1} ({low:.1} to {high:.1}). ")
        });
    let mut text = format!("{mean}{answered} of {items} items have an answer");
    if answered < items {
        text += "; the others count as wrong";
    }
    if *unknown > 0 {
        text += &format!("; {unknown} answers belong to no item");
    }
    if let Some(first) = first {
        text += &format!("; {malformed} lines are no answers ({first})");
    }
    text + "."
}

fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let head: Vec<String> = head.iter().map(|cell| escape(cell)).collect();
    let escaped = |row: &Vec<String>| row.iter().map(|cell| escape(cell)).collect();
    table_of(&head, &rows.iter().map(escaped).collect::<Vec<_>>()) + "\n"
}

fn sets(scored: &Scored) -> String {
    let beside = |set: Option<&str>, metric: &str| {
        let found = Published::find(scored.benchmark, set, metric);
        found.map_or_else(
            || [String::new(), String::new()],
            |n| [format!("{:.1}", n.ultra), format!("{:.1} {}", n.best_other.0, n.best_other.1)],
        )
    };
    let mut rows: Vec<Vec<String>> = Vec::new();
    for SetScore { set, metric, value, interval: [low, high], items, answered, words } in
        &scored.sets
    {
        let [ultra, other] = beside(Some(set), metric);
        rows.push(vec![
            set.clone(),
            metric.clone(),
            format!("{value:.1}"),
            format!("{low:.1} to {high:.1}"),
            ultra,
            other,
            format!("{answered} of {items}"),
            format!("{words:.1}"),
        ]);
    }
    for number in published(scored.benchmark).iter().filter(|number| number.set.is_none()) {
        let own = scored.average.filter(|_| number.metric == "mean");
        let [ultra, other] = beside(None, number.metric);
        let interval = own.map(|own| format!("{:.1} to {:.1}", own.interval[0], own.interval[1]));
        rows.push(vec![
            "all".into(),
            number.metric.into(),
            own.map_or_else(String::new, |own| format!("{:.1}", own.value)),
            interval.unwrap_or_default(),
            ultra,
            other,
            String::new(),
            String::new(),
        ]);
    }
    let head =
        ["set", "metric", "score", "95 %", "Ultra, published", "best other", "answered", "words"];
    format!("<h2>Scores</h2>\n{}", table(&head, &rows))
}

fn worst(scored: &Scored) -> String {
    if scored.worst.is_empty() {
        return String::new();
    }
    let mut text = "<h2>The answers that score lowest</h2>\n".to_owned();
    for item in &scored.worst {
        let paragraph = |what: &str, said: &str| {
            format!("<p><span class=\"dim\">{what}</span> {}</p>\n", escape(said))
        };
        text += &format!("<h3>{}: {:.1}</h3>\n", escape(&item.id), item.value);
        text += &paragraph("asked, the end:", &item.asked);
        text += &paragraph("answered:", &item.answered);
        text += &paragraph("right:", &item.right);
    }
    text
}
