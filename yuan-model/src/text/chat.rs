//! Conversations as one text: Jinja templates as the `transformers` library renders them.
//!
//! Templates come with weights from anywhere, so they are untrusted: they are compiled when they
//! are used, on a thread whose stack suffices for any nesting that so much text can have, and
//! rendered with limited fuel, which bounds time, memory and output.

use std::{
    fmt::Write as _,
    fs,
    ops::Range,
    path::Path,
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::Duration,
};

use minijinja::{Environment, Error, ErrorKind, context, syntax::SyntaxConfig, value::Serde};
use serde::{Serialize, Serializer, ser::SerializeStruct};
use serde_json::{Value, json};

use super::file::{TextError, json};
use generation::Marks;
use yuan_files::FileError;

mod generation;
mod to_json;

/// One turn of a conversation.
///
/// A template finds `content`: a text, or, where images come before it, a list of parts, as in the
/// `transformers` library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
    /// Images that come before it.
    pub images: usize,
}

impl Serialize for Message {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut message = serializer.serialize_struct("Message", 2)?;
        message.serialize_field("role", &self.role)?;
        if self.images == 0 {
            message.serialize_field("content", &self.content)?;
        } else {
            let mut parts = vec![json!({"type": "image"}); self.images];
            parts.push(json!({"type": "text", "text": self.content}));
            message.serialize_field("content", &parts)?;
        }
        message.end()
    }
}

impl Message {
    /// A turn.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), images: 0 }
    }

    /// The same with images before what is said.
    #[must_use]
    pub fn with_images(self, images: usize) -> Self {
        Self { images, ..self }
    }
}

/// A conversation as a template wrote it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// The bytes of the text that the template marks as the assistant's
    /// (`{% generation %} … {% endgeneration %}`).
    pub assistant: Vec<Range<usize>>,
}

/// The template of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatTemplate {
    source: String,
}

const NAME: &str = "chat_template";
/// Longest template; those of published models have some 10 kB.
const MOST_SOURCE: usize = 256 << 10;
/// Stack for compiling and rendering: nesting takes at least a byte of the template, or some of the
/// fuel, a level. Only what is used of it becomes memory.
const STACK: usize = 1 << 30;
/// What is not charged for as it grows, such as lists of lists, may take so long.
const PATIENCE: Duration = Duration::from_secs(10);
/// Instructions and pieces of 64 bytes that a template may use, beside those for its input.
const FUEL: u64 = 500_000;

impl ChatTemplate {
    /// The text of a template for models that come without one: turns as `User: …` and
    /// `Assistant: …`, one a line, and behind every answer the token that ends a text.
    pub fn plain(end: &str) -> String {
        let end = Value::from(end).to_string();
        Self::PLAIN.replace("eos_token", &end)
    }

    const PLAIN: &str = "{% for message in messages %}\
        {% if message.role == 'user' %}User: {{ message.content }}\nAssistant:\
        {% elif message.role == 'assistant' %}\
        {% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}\
        {% else %}{{ message.content }}\n{% endif %}{% endfor %}";

    /// A template from its text, which is looked at when it is rendered.
    pub fn new(source: impl Into<String>) -> Self {
        Self { source: source.into() }
    }

    /// The template of a model directory: `chat_template.jinja`, `chat_template.json`, or a key of
    /// the tokenizer's configuration.
    pub(super) fn find(
        directory: &Path,
        tokenizer_config: &Value,
    ) -> Result<Option<Self>, TextError> {
        let jinja = directory.join("chat_template.jinja");
        let source = if jinja.is_file() {
            Some(fs::read_to_string(&jinja).map_err(FileError::of("read", &jinja))?)
        } else {
            let file = json(&directory.join("chat_template.json"))?.unwrap_or_default();
            let key = [&file["chat_template"], &tokenizer_config["chat_template"]];
            key.into_iter().find_map(text_of).map(str::to_owned)
        };
        Ok(source.map(Self::new))
    }

    /// The conversation as text, with the opening of the next answer if `add_generation_prompt`.
    ///
    /// `messages` are usually [`Message`]s; whatever has the fields that the template looks for
    /// will do. `variables` are an object with what else it may look for: special tokens by their
    /// names (`bos_token`, …), `tools`, `documents`.
    ///
    /// # Errors
    ///
    /// If the template is no Jinja, refuses the messages, has a mistake, or does not end in time.
    pub fn render(
        &self,
        messages: &[impl Serialize],
        variables: &impl Serialize,
        add_generation_prompt: bool,
    ) -> Result<Rendered, TextError> {
        let plain = |error: serde_json::Error| TextError::Template(error.to_string());
        let given = [
            serde_json::to_string(messages).map_err(plain)?,
            serde_json::to_string(variables).map_err(plain)?,
        ];
        let context = context! {
            messages => Serde(messages),
            add_generation_prompt => add_generation_prompt,
            ..context! {
                ..minijinja::Value::from(Serde(variables)),
                ..context! { tools => (), documents => () }
            }
        };
        let (source, (done, wait)) = (self.source.clone(), channel());
        // It cannot be ended from outside: one that does not end is left behind.
        let thread = thread::Builder::new().stack_size(STACK).spawn(move || {
            drop(done.send(render_here(&source, &given, context)));
        });
        thread.map_err(|error| TextError::Template(format!("cannot start a thread: {error}")))?;
        match wait.recv_timeout(PATIENCE) {
            Ok(rendered) => rendered,
            Err(RecvTimeoutError::Timeout) => Err(TextError::Template("it does not end".into())),
            Err(RecvTimeoutError::Disconnected) => {
                Err(TextError::Template("it cannot be rendered".into()))
            }
        }
    }
}

fn render_here(
    source: &str,
    given: &[String; 2],
    context: minijinja::Value,
) -> Result<Rendered, TextError> {
    if source.len() > MOST_SOURCE {
        let reason = format!("it has {} bytes, more than {MOST_SOURCE}", source.len());
        return Err(TextError::Template(reason));
    }
    let size: usize = given.iter().map(String::len).sum();
    let marks = Marks::unlike(&[source, &given[0], &given[1]]);
    let mut environment = environment(FUEL + 4 * size as u64).map_err(failed)?;
    marks.add_to(&mut environment);
    let source = generation::as_call(source);
    environment.add_template(NAME, &source).map_err(failed)?;
    let rendered = environment.get_template(NAME).and_then(|template| template.render(context));
    let (text, assistant) = marks.taken_out(&rendered.map_err(failed)?);
    Ok(Rendered { text, assistant })
}

/// What templates find in the `transformers` library.
fn environment(fuel: u64) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    environment.set_syntax(syntax);
    environment.set_fuel(Some(fuel));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", to_json::to_json);
    Ok(environment)
}

/// The local time as Python's `strftime` writes it.
fn strftime_now(format: &str) -> Result<String, Error> {
    let mut text = String::new();
    write!(text, "{}", chrono::Local::now().format(format)).map_err(|_| {
        let reason = format!("strftime_now: {format:?} is no format of a time");
        Error::new(ErrorKind::InvalidOperation, reason)
    })?;
    Ok(text)
}

/// The template itself, or the one called `default` of several.
fn text_of(value: &Value) -> Option<&str> {
    let named = |template: &Value| template["name"] == "default";
    value.as_str().or_else(|| value.as_array()?.iter().find(|t| named(t))?["template"].as_str())
}

fn failed(error: Error) -> TextError {
    // The chain of causes goes into one sentence; the template's source does not.
    let line = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
    let detail = match error.kind() {
        ErrorKind::OutOfFuel => "it does not end, or writes too much".to_owned(),
        kind => error.detail().map_or_else(|| kind.to_string(), str::to_owned),
    };
    TextError::Template(format!("{}{line}", detail.replace('\n', " ")))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn render(source: &str, messages: &[Message]) -> Result<String, TextError> {
        let tokens = [("bos_token", "<BOS>"), ("eos_token", "<eod>")];
        let tokens: BTreeMap<_, _> = tokens.into();
        Ok(ChatTemplate::new(source).render(messages, &tokens, true)?.text)
    }

    #[test]
    fn a_template_of_yuans_kind_renders_as_transformers_does() {
        let source = "{{ bos_token }}{% for message in messages %}\n\
            {% if message['role'] == 'user' %}<|User|>{{ message['content'].strip() }}\n\
            {%- elif message.role == 'assistant' %}<|Assistant|>{{ message.content }}{{ eos_token }}\n\
            {%- endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}";
        let turns = [
            Message::new("user", "  Hello & <b> "),
            Message::new("assistant", "Hi."),
            Message::new("user", "Go on"),
        ];
        // Rendered by jinja2 3.1.6 with trim_blocks and lstrip_blocks, as transformers sets it up.
        let expected = "<BOS><|User|>Hello & <b><|Assistant|>Hi.<eod><|User|>Go on<|Assistant|>";
        assert_eq!(render(source, &turns).unwrap(), expected);
    }

    #[test]
    fn images_of_a_message_are_parts_before_its_text() {
        let source = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}\
            {% for p in m.content %}{% if p.type == 'image' %}<IMAGE></IMAGE>{% else %}{{ p.text }}\
            {% endif %}{% endfor %}{% endif %}{% endfor %}";
        let turns = [
            Message::new("user", "Which is larger?").with_images(2),
            Message::new("assistant", " The second."),
        ];
        let expected = "<IMAGE></IMAGE><IMAGE></IMAGE>Which is larger? The second.";
        assert_eq!(render(source, &turns).unwrap(), expected);
    }

    #[test]
    fn json_is_written_as_python_writes_it() {
        let source = "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}";
        let expected = "[{\"role\": \"user\", \"content\": \"<ä'\"}] {\n  \"role\": \"user\",\n  \"content\": \"<ä'\"\n}";
        assert_eq!(render(source, &[Message::new("user", "<ä'")]).unwrap(), expected);
    }

    #[test]
    fn a_refusal_and_a_mistake_are_one_sentence() {
        let refusal = "{% if messages[0].role != 'user' %}\
                       {{ raise_exception('The user speaks first') }}{% endif %}";
        let error = render(refusal, &[Message::new("assistant", "Hi")]).unwrap_err();
        assert_eq!(error.to_string(), "chat template: The user speaks first (line 1)");
        let error = render("{% for %}", &[]).unwrap_err().to_string();
        assert!(error.starts_with("chat template: ") && !error.contains('\n'), "{error}");
        let error = render("{{ nothing.at.all }}", &[]).unwrap_err().to_string();
        assert_eq!(error, "chat template: `nothing` is undefined (line 1)");
    }

    #[test]
    fn a_template_can_neither_end_the_process_nor_keep_it() {
        let doubling = format!("{{% set x = 'a' %}}{}", "{% set x = x + x %}".repeat(60));
        let nested = format!("{{{{ {}1 }}}}", "-".repeat(100_000));
        let filters = format!("{{{{ 'a'{} }}}}", " | upper".repeat(20_000));
        let lists = "{% set ns = namespace(x=[]) %}\
                     {% for i in range(100000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}";
        for source in [
            "{% for i in range(99999999) %}{% for j in range(99999999) %}{% endfor %}{% endfor %}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ messages | tojson(indent=1000000000000) }}",
            "{{ 'x' * 1000000000000 }}",
            "{{ strftime_now('%Q') }}",
            &doubling,
            &nested,
            &filters,
            lists,
            &"x".repeat(MOST_SOURCE + 1),
        ] {
            match render(source, &[Message::new("user", "Hi")]) {
                Ok(text) => assert!(text.len() < 1 << 26),
                Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
            }
        }
    }
}
