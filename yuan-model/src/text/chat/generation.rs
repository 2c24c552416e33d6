//! `{% generation %}`: the tag by which the `transformers` library marks what the assistant says.

use std::{borrow::Cow, ops::Range};

use minijinja::{Environment, Error, State, Value, value::Kwargs};

/// The function that a block of the tag calls.
const CALLED: &str = "yuan_generation";

/// The template with every `{% generation %} … {% endgeneration %}` as a call of [`CALLED`], which
/// has the same effect on spaces and on the variables within.
pub(super) fn as_call(source: &str) -> Cow<'_, str> {
    if !source.contains("generation") {
        return source.into();
    }
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        text.push_str(before);
        rest = tag;
        let inner = tag.trim_start_matches(['-', '+']);
        let sign = &tag[..tag.len() - inner.len()];
        let word = inner.trim_start();
        for (name, call) in
            [("generation", format!(" call {CALLED}() ")), ("endgeneration", " endcall ".into())]
        {
            if let Some(behind) = word.strip_prefix(name)
                && behind.trim_start().trim_start_matches(['-', '+']).starts_with("%}")
            {
                text.push_str(sign);
                text.push_str(&call);
                rest = behind.trim_start();
                break;
            }
        }
    }
    text.push_str(rest);
    text.into()
}

/// Marks in a rendered text where such blocks begin and end.
#[derive(Debug, Clone)]
pub(super) struct Marks {
    begin: String,
    end: String,
}

impl Marks {
    /// Marks that do not occur in `texts`: characters for private use and a number.
    pub fn unlike(texts: &[&str]) -> Self {
        let mark = |number: usize, side: &str| format!("\u{e000}{number}{side}\u{e001}");
        let occurs =
            |number: &usize| texts.iter().any(|text| text.contains(&format!("\u{e000}{number}")));
        let number = (0..).find(|number| !occurs(number)).unwrap_or_default();
        Self { begin: mark(number, "<"), end: mark(number, ">") }
    }

    /// Makes the tag write them.
    pub fn add_to(&self, environment: &mut Environment<'_>) {
        let marks = self.clone();
        let marked = move |state: &mut State, options: Kwargs| -> Result<String, Error> {
            let caller: Value = options.get("caller")?;
            let said = caller.call(state, &[])?;
            Ok(format!("{}{said}{}", marks.begin, marks.end))
        };
        environment.add_function(CALLED, marked);
    }

    /// The text without marks, and the bytes of it that were between them.
    pub fn taken_out(&self, marked: &str) -> (String, Vec<Range<usize>>) {
        let (mut text, mut spans, mut open) = (String::new(), Vec::new(), None);
        let mut rest = marked;
        loop {
            let next = [&self.begin, &self.end].map(|mark| rest.find(mark.as_str()));
            let (at, is_begin) = match next {
                [Some(begin), Some(end)] => (begin.min(end), begin < end),
                [Some(begin), None] => (begin, true),
                [None, Some(end)] => (end, false),
                [None, None] => break,
            };
            text.push_str(&rest[..at]);
            rest = &rest[at + if is_begin { self.begin.len() } else { self.end.len() }..];
            if is_begin {
                open = open.or(Some(text.len()));
            } else if let Some(begin) = open.take() {
                spans.push(begin..text.len());
            }
        }
        text.push_str(rest);
        (text, spans)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_tag_becomes_a_call() {
        let expected = "a{%- call yuan_generation() -%}b{% endcall %}c";
        assert_eq!(as_call("a{%- generation -%}b{% endgeneration %}c"), expected);
        for other in ["{% if generation %}", "{{ generation }}", "{% generations %}", "{%"] {
            assert_eq!(as_call(other), other);
        }
    }

    #[test]
    fn marks_are_unlike_what_there_is() {
        let marks = Marks::unlike(&["a\u{e000}0\u{e001}b"]);
        let marked = format!("x{}yä{}z", marks.begin, marks.end);
        let (text, spans) = marks.taken_out(&marked);
        assert_eq!((text.as_str(), &text[spans[0].clone()]), ("xyäz", "yä"));
        assert_eq!(spans.len(), 1);
    }
}
