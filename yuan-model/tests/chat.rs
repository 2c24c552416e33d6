//! Chat templates render as the `transformers` library renders them, spans of `{% generation %}`
//! included.

use serde_json::{Map, Value};
use yuan_model::text::ChatTemplate;

#[test]
fn templates_render_as_transformers_renders_them() {
    let text = include_str!("fixtures/chat_templates/cases.json");
    let cases: Value = serde_json::from_str(text).unwrap();
    for case in cases["cases"].as_array().unwrap() {
        let (name, template) = (&case["name"], case["template"].as_str().unwrap());
        let variables: Map<String, Value> =
            serde_json::from_value(case["variables"].clone()).unwrap();
        let rendered = ChatTemplate::new(template).render(
            case["messages"].as_array().unwrap(),
            &variables,
            case["add_generation_prompt"].as_bool().unwrap(),
        );
        if let Some(error) = case["error"].as_str() {
            let reason = error.split(": ").last().unwrap();
            let found = rendered.unwrap_err().to_string();
            assert!(found.contains(reason), "{name}: {found}");
            continue;
        }
        let rendered = rendered.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(rendered.text, case["expected"].as_str().unwrap(), "{name}");
        let letters = |byte| rendered.text[..byte].chars().count();
        let spans: Vec<Value> = rendered
            .assistant
            .iter()
            .map(|span| vec![letters(span.start), letters(span.end)].into())
            .collect();
        let expected = case["assistant_spans"].as_array().cloned().unwrap_or_default();
        assert_eq!(spans, expected, "{name}");
    }
}
