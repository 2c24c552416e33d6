//! When two answers say the same, and where a text says it.

use std::ops::Range;

/// An answer as it is compared: as a number if it is one, else as words without regard to case, spaces
/// and a full stop at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Said {
    Number(Decimal),
    Words(String),
}

impl Said {
    /// What an answer says.
    pub fn of(text: &str) -> Self {
        let text = text.trim().trim_end_matches('.').trim_end();
        match Decimal::of(text.trim_start_matches('$').trim_end_matches('%').trim()) {
            Some(number) => Self::Number(number),
            None => Self::Words(lower(text)),
        }
    }

    /// Where a text says the same in a place of its own, in order and without overlaps.
    pub fn places(&self, text: &str) -> Vec<Range<usize>> {
        match self {
            Self::Number(number) => {
                let is_same = |place: &Range<usize>| {
                    let found = &text[place.clone()];
                    Decimal::of(found.trim_start_matches('$')).as_ref() == Some(number)
                };
                numbers_in(text).into_iter().filter(is_same).collect()
            }
            Self::Words(words) => words_in(text, words),
        }
    }
}

/// A decimal number, digit by digit: floats take long numbers that differ for the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Decimal {
    is_negative: bool,
    /// Without zeros before it.
    whole: String,
    /// Without zeros behind it.
    fraction: String,
}

impl Decimal {
    /// Digits with one point at most, commas between thousands if any, and a sign.
    fn of(text: &str) -> Option<Self> {
        let (is_negative, digits) = match text.strip_prefix(['-', '−']) {
            Some(digits) => (true, digits),
            None => (false, text),
        };
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        let are_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        let mut groups = whole.split(',');
        let first = groups.next().unwrap_or("");
        let are_thousands =
            groups.all(|group| group.len() == 3) && (first.len() <= 3 || !whole.contains(','));
        let plain = whole.replace(',', "");
        if first.is_empty() || !are_thousands || !are_digits(&plain) || !are_digits(fraction) {
            return None;
        }
        let whole = plain.trim_start_matches('0').to_owned();
        let fraction = fraction.trim_end_matches('0').to_owned();
        let is_zero = whole.is_empty() && fraction.is_empty();
        Some(Self { is_negative: is_negative && !is_zero, whole, fraction })
    }
}

/// The numbers of a text that stand alone: no parts of words, of fractions or of larger numbers.
fn numbers_in(text: &str) -> Vec<Range<usize>> {
    let (mut found, mut rest) = (Vec::new(), 0);
    let is_part = |c: char| c.is_ascii_digit() || c == '.' || c == ',';
    while let Some(at) = text[rest..].find(|c: char| c.is_ascii_digit()) {
        let start = rest + at;
        let length = text[start..].find(|c: char| !is_part(c)).unwrap_or(text.len() - start);
        rest = start + length;
        // What ends a sentence or a clause is no part of the number.
        let end = start + text[start..rest].trim_end_matches(['.', ',']).len();
        let before = text[..start].chars().next_back();
        let sign = before.filter(|c| matches!(c, '-' | '−'));
        let begin = start - sign.map_or(0, char::len_utf8);
        let edge = text[..begin].chars().next_back();
        let continues = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '/');
        // In `7-5` the line is no sign, and 5 is no answer by itself.
        let is_difference = sign.is_some() && edge.is_some_and(char::is_alphanumeric);
        if !continues(edge) && !continues(text[end..].chars().next()) && !is_difference {
            found.push(begin..end);
        }
    }
    found
}

/// Where words stand that are no part of longer ones.
fn words_in(text: &str, words: &str) -> Vec<Range<usize>> {
    let (mut found, mut free) = (Vec::new(), 0);
    if words.is_empty() {
        return found;
    }
    let continues = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    for (start, _) in text.char_indices() {
        let before = text[..start].chars().next_back();
        let begins_word = words.starts_with(char::is_alphanumeric);
        if start < free || (begins_word && continues(before)) {
            continue;
        }
        let Some(length) = length_of(&text[start..], words) else { continue };
        let end = start + length;
        let ends_word = words.ends_with(char::is_alphanumeric);
        if !(ends_word && continues(text[end..].chars().next())) {
            found.push(start..end);
            free = end;
        }
    }
    found
}

/// How many bytes at the beginning of a text say certain words, if it begins with them.
fn length_of(text: &str, words: &str) -> Option<usize> {
    let mut wanted = words.chars().peekable();
    let mut characters = text.char_indices().peekable();
    let mut end = 0;
    while let Some(&next) = wanted.peek() {
        let (at, found) = characters.next()?;
        end = at + found.len_utf8();
        if next == ' ' {
            if !found.is_whitespace() {
                return None;
            }
            while characters.next_if(|(_, c)| c.is_whitespace()).is_some() {}
            wanted.next();
            continue;
        }
        for lower in found.to_lowercase() {
            wanted.next_if_eq(&lower)?;
        }
    }
    Some(end)
}

/// Lower case, with single spaces between words.
fn lower(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(answer: &str, text: &str) -> usize {
        Said::of(answer).places(text).len()
    }

    #[test]
    fn answers_are_the_same_as_words_or_as_numbers() {
        for (one, other, same) in [
            ("Paris.", "paris", true),
            ("1,000", "1000.0", true),
            ("$50", "50%", true),
            ("-1,234,567.50", "-1234567.5", true),
            ("007", "7", true),
            ("the  red   one", "The red one", true),
            ("1,2", "12", false),
            ("3,14", "314", false),
            ("1.5,2", "1.52", false),
            ("--5", "5", false),
            ("9007199254740993", "9007199254740992", false),
            ("4", "42", false),
            ("", "42", false),
        ] {
            assert_eq!(Said::of(one) == Said::of(other), same, "{one} and {other}");
        }
    }

    #[test]
    fn the_same_is_found_however_it_is_spelled() {
        assert_eq!(count("42", "It is 42. Again 42.0, $42 and 042; not 4.2, 142 or 42x."), 4);
        assert_eq!(count("a", "a A a. (a), and band"), 4);
        assert_eq!(count("red one", "The Red  one, the red\none. Red ones."), 2);
        assert_eq!(count("5", "-5, 1/5, 5/6, 7-5 and 5"), 1);
        assert_eq!(count("-5", "-5 and 7-5"), 1);
        assert_eq!(count("1000", "1,000 of 1000"), 2);
        assert_eq!(count("", "anything"), 0);
    }
}
