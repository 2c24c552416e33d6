//! Names of files in a run directory, and of those that come with a model.

/// Name of the file with a run's settings.
pub(crate) const CONFIG: &str = "run.json";
/// Name of the model's file.
pub(crate) const MODEL: &str = "config.json";
/// Name of the tokenizer's file.
pub(crate) const TOKENIZER: &str = "tokenizer.json";
/// Name of the file with a chat template.
pub(crate) const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// Name of the file in a run that holds the options it was made with.
pub(crate) const OPTIONS: &str = "options.toml";
/// What may be beside the tokenizer.
pub(crate) const TOKENIZER_FILES: [&str; 7] = [
    TOKENIZER,
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
    "chat_template.json",
];
