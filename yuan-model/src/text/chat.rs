//! Conversations as one text: Jinja templates as the `transformers` library renders them.

use std::{collections::BTreeMap, fs, io, path::Path};

use minijinja::{
    Environment, Error, ErrorKind, context,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, ser::PrettyFormatter};

use super::file::{TextError, json};
use crate::files::FileError;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A turn.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// The template of a model.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// A template from its text.
    ///
    /// # Errors
    ///
    /// If it is no Jinja.
    pub fn new(source: &str) -> Result<Self, TextError> {
        let mut environment = Environment::new();
        environment.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()
                .map_err(failed)?,
        );
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", to_json);
        environment.add_template_owned(NAME, source.to_owned()).map_err(failed)?;
        Ok(Self { environment })
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
        source.map(|source| Self::new(&source)).transpose()
    }

    /// The conversation as text, with the opening of the next answer if `add_generation_prompt`.
    ///
    /// # Errors
    ///
    /// If the template refuses the messages or has a mistake.
    pub fn render(
        &self,
        messages: &[Message],
        special_tokens: &BTreeMap<String, String>,
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let context = context! {
            messages => Serde(messages),
            add_generation_prompt => add_generation_prompt,
            ..minijinja::Value::from(Serde(special_tokens))
        };
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(context))
            .map_err(failed)
    }
}

/// The template itself, or the one called `default` of several.
fn text_of(value: &Value) -> Option<&str> {
    let named = |template: &Value| template["name"] == "default";
    value.as_str().or_else(|| value.as_array()?.iter().find(|t| named(t))?["template"].as_str())
}

fn failed(error: Error) -> TextError {
    // The chain of causes goes into one sentence; the template's source does not.
    let line = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    TextError::Template(format!("{detail}{line}"))
}

/// JSON as Python's `json.dumps` writes it, which templates were made for: spaces after `,` and
/// `:`.
fn to_json(value: &minijinja::Value, options: Kwargs) -> Result<String, Error> {
    let failed =
        |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut text = Vec::new();
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    match indent {
        Some(indent) => {
            let spaces = vec![b' '; indent];
            let formatter = PrettyFormatter::with_indent(&spaces);
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut text, formatter))
                .map_err(failed)?;
        }
        None => {
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut text, Python))
                .map_err(failed)?;
        }
    }
    String::from_utf8(text)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

struct Python;

impl serde_json::ser::Formatter for Python {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, messages: &[Message]) -> Result<String, TextError> {
        let tokens = [("bos_token", "<BOS>"), ("eos_token", "<eod>")];
        let tokens = tokens.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        ChatTemplate::new(source)?.render(messages, &tokens, true)
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
}
