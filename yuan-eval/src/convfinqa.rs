//! Calculations of `ConvFinQA`: an answer is right if it contains the result or the formula.

use serde_json::Value;

/// What is to be calculated.
#[derive(Debug, Clone, PartialEq)]
pub struct Calculation {
    /// The result (`exe_answer`), a number or a text.
    pub result: Value,
    /// How it is written down (`answers[0]`).
    pub formula: String,
    /// The last question.
    pub question: String,
}

impl Calculation {
    /// The result as the authors' program writes it.
    pub fn result(&self) -> String {
        match &self.result {
            Value::Number(number) if number.is_f64() => python(number.as_f64().unwrap_or(0.0)),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        }
    }

    /// Whether an answer contains the result or the formula, by the rules of ChatRAG-Bench, the first
    /// that holds.
    pub fn is_in(&self, answer: &str) -> bool {
        let answer = cleaned(answer);
        // Nothing is in every answer.
        let contains = |text: String| !text.is_empty() && answer.contains(&text);
        let result = self.result();
        if contains(result.clone()) || contains(self.formula.clone()) {
            return true;
        }
        let Some(number) = self.result.as_f64() else { return false };
        // Python rounds a whole number to itself.
        let rounded = |number: f64, digits: usize| python(round(number, digits));
        if contains(rounded(number, 3)) || contains(rounded(number, 2)) {
            return true;
        }
        let percent = number * 100.0;
        let says_percent = self.question.contains("percent");
        if says_percent
            && (contains(python(percent))
                || contains(rounded(percent, 1))
                || contains(rounded(percent, 2)))
        {
            return true;
        }
        if let Some(whole) = result.strip_suffix(".0")
            && answer.contains(whole)
        {
            return true;
        }
        let negated = match self.result.as_i64() {
            Some(whole) => whole.unsigned_abs().to_string(),
            None => python(-number),
        };
        answer.contains("decrease") && number < 0.0 && answer.contains(&negated)
    }
}

/// Without thousands, currencies, units and what stands alone in brackets; words one space apart.
fn cleaned(answer: &str) -> String {
    let mut text = answer.to_owned();
    for unwanted in [",", "$", "million", "billion"] {
        text = text.replace(unwanted, "");
    }
    let mut rest = text.as_str();
    let mut kept = String::with_capacity(rest.len());
    while let Some(open) = rest.find('(') {
        let inner = &rest[open + 1..];
        let length = inner.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(0);
        kept.push_str(&rest[..open]);
        if length > 0 && inner[length..].starts_with(')') {
            rest = &inner[length + 1..];
        } else {
            kept.push('(');
            rest = inner;
        }
    }
    kept.push_str(rest);
    kept.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn round(number: f64, digits: usize) -> f64 {
    format!("{number:.digits$}").parse().unwrap_or(number)
}

/// A floating-point number as Python shows it.
fn python(number: f64) -> String {
    let magnitude = number.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let text = format!("{number:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(exponent) => ('-', exponent),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    format!("{number:?}")
}
