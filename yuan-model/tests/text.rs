//! Tokenizer and chat template as they lie beside published weights.

use std::{fs, path::Path};

use serde_json::{Value, json};
use tempfile::TempDir;
use yuan_model::{
    SpecialTokens, YuanConfig,
    text::{Message, Tokenizer},
};

/// A byte-level tokenizer of single bytes with Yuan's special tokens, as a `tokenizer.json`.
fn tokenizer_json() -> Value {
    // The bytes of printable ASCII are themselves in a byte-level alphabet; the others of UTF-8 are
    // shifted.
    let printable = |byte: u32| {
        (33..=126).contains(&byte) || (161..=172).contains(&byte) || (174..=255).contains(&byte)
    };
    let mut next = 256;
    let mut vocab = serde_json::Map::new();
    for byte in 0..256_u32 {
        let code = if printable(byte) {
            byte
        } else {
            next += 1;
            next - 1
        };
        vocab.insert(char::from_u32(code).unwrap().to_string(), json!(byte));
    }
    let added: Vec<Value> = ["<eod>", "<BOS>", "<|User|>", "<|Assistant|>"]
        .iter()
        .enumerate()
        .map(|(i, content)| {
            json!({"id": 256 + i, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    json!({
        "version": "1.0", "added_tokens": added, "normalizer": null, "pre_tokenizer": byte_level,
        "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
}

fn write(directory: &Path, file: &str, content: &Value) {
    fs::write(directory.join(file), content.to_string()).unwrap();
}

fn ids(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

const TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}<|User|>\
    {{ message['content'] }}{% elif message['role'] == 'assistant' %}<|Assistant|>{{ message['content'] }}<eod>\
    {% else %}{{ raise_exception('no ' + message['role'] + ' speaks here') }}{% endif %}{% endfor %}\
    {% if add_generation_prompt %}<|Assistant|>{% endif %}";

#[test]
fn text_becomes_tokens_and_comes_back_character_by_character() {
    let directory = TempDir::new().unwrap();
    write(directory.path(), "tokenizer.json", &tokenizer_json());
    let tokenizer = Tokenizer::load(directory.path()).unwrap();
    assert_eq!((tokenizer.vocab_size(), tokenizer.token_id("<eod>")), (260, Some(256)));
    let text = "Grüße, 元!";
    let tokens = tokenizer.encode(&format!("{text}<eod>"), true).unwrap();
    assert_eq!(tokens, [ids(text), vec![256]].concat());
    assert_eq!(tokenizer.decode(&tokens).unwrap(), text);
    // A character of several tokens comes with the last of them, and never broken.
    let mut stream = tokenizer.stream(&[]);
    let pieces: Vec<String> = ids("aü元").iter().map(|&id| stream.step(id).unwrap()).collect();
    assert_eq!(pieces, ["a", "", "ü", "", "", "元"]);
    assert_eq!(stream.finish().unwrap(), "");
    // One that ends inside of a character says so; one that completes the prompt's begins with it.
    let mut stream = tokenizer.stream(&ids("a"));
    assert_eq!(stream.step(ids("元")[0]).unwrap(), "");
    assert_eq!(stream.finish().unwrap(), "\u{fffd}");
    let character = ids("元");
    assert_eq!(tokenizer.decode_after(&character[..1], &character[1..]).unwrap(), "元");
}

/// Words as sentencepiece has them: every piece starts with a space, and the decoder takes the
/// first one away.
#[test]
fn the_space_between_prompt_and_text_is_kept() {
    let directory = TempDir::new().unwrap();
    let pieces: Vec<_> = (0..20).map(|i| json!([format!("\u{2581}w{i}"), -1.0])).collect();
    let json = json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": null, "post_processor": null,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
        ]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces},
    });
    write(directory.path(), "tokenizer.json", &json);
    let tokenizer = Tokenizer::load(directory.path()).unwrap();
    let prompt = tokenizer.encode("w5 w6", true).unwrap();
    let tokens = tokenizer.encode("w7 w1", true).unwrap();
    assert_eq!(tokenizer.decode(&tokens).unwrap(), "w7 w1");
    assert_eq!(tokenizer.decode_after(&prompt, &tokens).unwrap(), " w7 w1");
    let whole = [&prompt[..], &tokens].concat();
    assert_eq!(tokenizer.decode(&whole).unwrap(), "w5 w6 w7 w1");
    assert_eq!(tokenizer.decode_after(&[], &whole).unwrap(), "w5 w6 w7 w1");
}

#[test]
fn stop_tokens_come_from_every_file_that_names_one() {
    let directory = TempDir::new().unwrap();
    write(directory.path(), "tokenizer.json", &tokenizer_json());
    let stops =
        |config: &YuanConfig| Tokenizer::load(directory.path()).unwrap().stop_tokens(config);
    let tokens = SpecialTokens { eos: vec![3], eod: Some(256), ..SpecialTokens::default() };
    let config = YuanConfig { tokens, ..YuanConfig::tiny(300) };
    assert_eq!(stops(&config), [3, 256]);
    assert_eq!(stops(&YuanConfig::tiny(300)), [0_u32; 0]);
    write(
        directory.path(),
        "tokenizer_config.json",
        &json!({"eos_token": {"content": "<|User|>"}}),
    );
    write(directory.path(), "generation_config.json", &json!({"eos_token_id": [256, 7]}));
    assert_eq!(stops(&config), [3, 7, 256, 258]);
    write(directory.path(), "generation_config.json", &json!({"eos_token_id": 9}));
    assert_eq!(stops(&YuanConfig::tiny(300)), [9, 258]);
}

#[test]
fn a_conversation_follows_the_template_wherever_it_is() {
    let tokens = json!({"bos_token": "<BOS>", "eos_token": "<eod>"});
    let mut with_template = tokens.clone();
    with_template["chat_template"] = json!(TEMPLATE);
    let mut with_named = tokens.clone();
    with_named["chat_template"] =
        json!([{"name": "rag", "template": "{{ 1 }}"}, {"name": "default", "template": TEMPLATE}]);
    type Place<'a> = (&'a str, &'a dyn Fn(&Path));
    let places: [Place<'_>; 4] = [
        ("tokenizer_config.json", &|path| write(path, "tokenizer_config.json", &with_template)),
        ("a list in it", &|path| write(path, "tokenizer_config.json", &with_named)),
        ("chat_template.json", &|path| {
            write(path, "tokenizer_config.json", &tokens);
            write(path, "chat_template.json", &json!({"chat_template": TEMPLATE}));
        }),
        ("chat_template.jinja", &|path| {
            write(path, "tokenizer_config.json", &tokens);
            fs::write(path.join("chat_template.jinja"), TEMPLATE).unwrap();
        }),
    ];
    let turns = [
        Message::new("user", "Hi"),
        Message::new("assistant", "Yes?"),
        Message::new("user", "1 < 2"),
    ];
    let expected = [
        vec![257, 258],
        ids("Hi"),
        vec![259],
        ids("Yes?"),
        vec![256, 258],
        ids("1 < 2"),
        vec![259],
    ]
    .concat();
    for (place, fill) in places {
        let directory = TempDir::new().unwrap();
        write(directory.path(), "tokenizer.json", &tokenizer_json());
        fill(directory.path());
        let tokenizer = Tokenizer::load(directory.path()).unwrap();
        assert_eq!(tokenizer.encode_chat(&turns).unwrap(), expected, "{place}");
        let error = tokenizer.encode_chat(&[Message::new("robot", "?")]).unwrap_err().to_string();
        assert_eq!(error, "chat template: no robot speaks here (line 1)", "{place}");
    }
}

/// With a template that marks the answers and with one that does not.
#[test]
fn answers_and_what_ends_them_are_learnt() {
    let marked = TEMPLATE.replace(
        "<|Assistant|>{{ message['content'] }}<eod>",
        "<|Assistant|>{% generation %}{{ message['content'] }}<eod>{% endgeneration %}",
    );
    assert_ne!(marked, TEMPLATE);
    for template in [TEMPLATE, &marked] {
        let directory = TempDir::new().unwrap();
        write(directory.path(), "tokenizer.json", &tokenizer_json());
        fs::write(directory.path().join("chat_template.jinja"), template).unwrap();
        let config = json!({"bos_token": "<BOS>", "eos_token": "<eod>"});
        write(directory.path(), "tokenizer_config.json", &config);
        let tokenizer = Tokenizer::load(directory.path()).unwrap();
        let turn = |role: &str, text: &str| Message::new(role, text);
        let messages =
            [turn("user", "a"), turn("assistant", "b c"), turn("user", "d"), turn("assistant", "")];
        let conversation = tokenizer.encode_conversation(&messages).unwrap();
        let (eod, bos, user, assistant) = (256, 257, 258, 259);
        let expected: Vec<u32> = [bos, user]
            .into_iter()
            .chain(ids("a"))
            .chain([assistant])
            .chain(ids("b c"))
            .chain([eod, user])
            .chain(ids("d"))
            .chain([assistant, eod])
            .collect();
        assert_eq!(conversation.tokens, expected);
        let learnt: Vec<u32> = (conversation.tokens.iter().zip(&conversation.learnt))
            .filter(|(_, learnt)| **learnt)
            .map(|(token, _)| *token)
            .collect();
        assert_eq!(learnt, [ids("b c"), vec![eod, eod]].concat());
    }
}

#[test]
fn files_that_are_not_there_or_not_what_they_say_are_named() {
    let directory = TempDir::new().unwrap();
    let failed = || {
        let message = Tokenizer::load(directory.path()).unwrap_err().to_string();
        message.replace(&format!("{}/", directory.path().display()), "")
    };
    assert!(failed().starts_with("cannot read tokenizer.json: No such file"), "{}", failed());
    write(directory.path(), "tokenizer.json", &json!({"version": 7}));
    assert!(failed().starts_with("tokenizer.json: "), "{}", failed());
    write(directory.path(), "tokenizer.json", &tokenizer_json());
    fs::write(directory.path().join("tokenizer_config.json"), "{").unwrap();
    assert!(failed().starts_with("tokenizer_config.json: EOF"), "{}", failed());
    write(directory.path(), "tokenizer_config.json", &json!({"chat_template": "{% if %}"}));
    // A template is looked at when it is used.
    let tokenizer = Tokenizer::load(directory.path()).unwrap();
    let said = tokenizer.encode_chat(&[Message::new("user", "Hi")]).unwrap_err().to_string();
    assert!(said.starts_with("chat template: ") && !said.contains('\n'), "{said}");
    fs::remove_file(directory.path().join("tokenizer_config.json")).unwrap();
    let tokenizer = Tokenizer::load(directory.path()).unwrap();
    let error = tokenizer.encode_chat(&[Message::new("user", "Hi")]).unwrap_err().to_string();
    assert_eq!(
        error,
        "chat template: the model has none, so it cannot chat: give it a text to continue"
    );
}
