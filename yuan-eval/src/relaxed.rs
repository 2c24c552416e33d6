//! Objects that a model writes in its answers: JSON, or nearly so, as Python shows its values.

/// A value: what it holds, and how it was written.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Value {
    /// Of a text, what stands between its quotes.
    pub written: String,
    pub kind: Kind,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Kind {
    /// A text, a number, or a bare word.
    Plain,
    List(Vec<Value>),
    Object(Vec<(String, Value)>),
}

impl Value {
    /// A member of an object.
    pub fn get(&self, key: &str) -> Option<&Value> {
        let Kind::Object(members) = &self.kind else { return None };
        members.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    pub fn list(&self) -> Option<&[Value]> {
        match &self.kind {
            Kind::List(values) => Some(values),
            _ => None,
        }
    }

    /// The values of a list as they are written, or the one value.
    pub fn texts(&self) -> Vec<String> {
        match &self.kind {
            Kind::List(values) => values.iter().map(|value| value.written.clone()).collect(),
            _ => vec![self.written.clone()],
        }
    }
}

/// How deep values may lie in each other.
const DEPTH: usize = 16;

/// All objects of a text, in order; those within another one follow it.
pub(crate) fn objects(text: &str) -> Vec<Value> {
    let mut found = Vec::new();
    let mut at = 0;
    // An object that is never closed is read to the end of the text for nothing: not too often.
    let mut left = STEPS_PER_BYTE * text.len();
    while let Some(open) = text[at..].find('{') {
        let start = at + open;
        let mut reader = Reader { text, at: start, left };
        let value = reader.value(0);
        left = reader.left;
        match value {
            Some(value) => {
                at = reader.at;
                push_all(value, &mut found);
            }
            None if left == 0 => break,
            None => at = start + 1,
        }
    }
    found
}

/// Takes an object and the objects in it.
fn push_all(value: Value, found: &mut Vec<Value>) {
    let inner: Vec<Value> = match &value.kind {
        Kind::Object(members) => members.iter().map(|(_, value)| value.clone()).collect(),
        Kind::List(values) => values.clone(),
        Kind::Plain => return,
    };
    if matches!(value.kind, Kind::Object(_)) {
        found.push(value);
    }
    inner.into_iter().for_each(|value| push_all(value, found));
}

/// How often each byte of a text may be looked at.
const STEPS_PER_BYTE: usize = 64;

/// The last object of a text that has a key.
pub(crate) fn last_with(text: &str, key: &str) -> Option<Value> {
    objects(text).into_iter().rev().find(|value| value.get(key).is_some())
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    /// Steps that may still be taken.
    left: usize,
}

impl Reader<'_> {
    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.left = self.left.checked_sub(1)?;
        self.at += next.len_utf8();
        Some(next)
    }

    fn skip_spaces(&mut self) {
        while self.peek().is_some_and(char::is_whitespace) {
            self.next();
        }
    }

    fn take(&mut self, wanted: char) -> Option<()> {
        self.skip_spaces();
        (self.peek()? == wanted).then(|| self.at += wanted.len_utf8())
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        if depth > DEPTH {
            return None;
        }
        self.skip_spaces();
        let start = self.at;
        let kind = match self.peek()? {
            '{' => Kind::Object(self.members(depth)?),
            '[' => Kind::List(self.values(']', depth)?),
            '(' => Kind::List(self.values(')', depth)?),
            '"' | '\'' => {
                return Some(Value { written: self.quoted()?, kind: Kind::Plain });
            }
            _ => {
                let is_end = |c: char| matches!(c, ',' | '}' | ']' | ')' | ':' | '\n');
                let length = self.text[start..].find(is_end)?;
                self.left = self.left.checked_sub(length)?;
                self.at += length;
                let written = self.text[start..self.at].trim().to_owned();
                return (!written.is_empty()).then_some(Value { written, kind: Kind::Plain });
            }
        };
        Some(Value { written: self.text[start..self.at].to_owned(), kind })
    }

    fn members(&mut self, depth: usize) -> Option<Vec<(String, Value)>> {
        self.take('{')?;
        let mut members = Vec::new();
        loop {
            if self.take('}').is_some() {
                return Some(members);
            }
            let key = self.value(depth + 1)?.written;
            self.take(':')?;
            members.push((key, self.value(depth + 1)?));
            if self.take(',').is_none() {
                self.take('}')?;
                return Some(members);
            }
        }
    }

    fn values(&mut self, end: char, depth: usize) -> Option<Vec<Value>> {
        self.next()?;
        let mut values = Vec::new();
        loop {
            if self.take(end).is_some() {
                return Some(values);
            }
            values.push(self.value(depth + 1)?);
            if self.take(',').is_none() {
                self.take(end)?;
                return Some(values);
            }
        }
    }

    /// What follows a backslash.
    fn escaped(&mut self, written: &mut String) -> Option<()> {
        let plain = match self.next()? {
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            'b' => '\u{8}',
            'f' => '\u{c}',
            'u' => match self.unit() {
                Some(unit) => {
                    // Letters beyond 16 bits come in two parts.
                    let rest = &self.text[self.at..];
                    let pair = (0xd800..0xdc00).contains(&unit) && rest.starts_with("\\u");
                    let low = pair.then(|| self.text.get(self.at + 2..self.at + 6)).flatten();
                    let low = low.and_then(|digits| u16::from_str_radix(digits, 16).ok());
                    if low.is_some() {
                        self.at += 6;
                    }
                    let units = [Some(unit), low].into_iter().flatten();
                    written.extend(
                        char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)),
                    );
                    return Some(());
                }
                None => 'u',
            },
            other => other,
        };
        written.push(plain);
        Some(())
    }

    /// Four hexadecimal digits.
    fn unit(&mut self) -> Option<u16> {
        let digits = self.text.get(self.at..self.at + 4)?;
        let unit = u16::from_str_radix(digits, 16).ok()?;
        self.at += 4;
        Some(unit)
    }

    /// A text between quotes of one kind. A quote of the same kind within, as in 'it's', does not end it
    /// unless something follows that can stand behind a value.
    fn quoted(&mut self) -> Option<String> {
        let quote = self.next()?;
        let mut written = String::new();
        loop {
            match self.next()? {
                '\\' => self.escaped(&mut written)?,
                c if c == quote => {
                    let rest = self.text[self.at..].trim_start();
                    if rest.starts_with([',', '}', ']', ')', ':']) {
                        return Some(written);
                    }
                    written.push(c);
                }
                c => written.push(c),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_found_as_json_and_as_python_writes_them() {
        let text =
            "So {not one} and {\"answer\": [\"1\", 'it's', 2.5]} or {'a': (1, 2), 'b': None}.";
        let found = objects(text);
        assert_eq!(found.len(), 2);
        let inner = objects(r#"{"answer": [{"a": 1}, {"b": {"c": 2}}]}"#);
        assert_eq!(inner.len(), 4);
        assert_eq!(inner[3].get("c").unwrap().written, "2");
        let escaped = objects(r#"{"a": "Ra\u00fal \ud83d\ude00 \"x\""}"#);
        assert_eq!(escaped[0].get("a").unwrap().written, "Raúl 😀 \"x\"");
        assert_eq!(found[0].get("answer").unwrap().texts(), ["1", "it's", "2.5"]);
        assert_eq!(found[1].get("a").unwrap().written, "(1, 2)");
        assert_eq!(found[1].get("a").unwrap().list().unwrap().len(), 2);
        assert_eq!(found[1].get("b").unwrap().written, "None");
        assert_eq!(last_with(text, "answer").unwrap(), found[0]);
        assert!(objects(&"{".repeat(10_000)).is_empty());
        assert!(objects(&"{\"a".repeat(50_000)).is_empty());
        assert!(objects("{\"answer\": \"cut off").is_empty());
    }
}
