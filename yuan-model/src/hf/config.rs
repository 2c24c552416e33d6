//! `config.json`, flat as in a text model or nested under `llm_config` as in a multimodal one.

use std::{fs, path::Path};

use serde_json::{Map, Value, json};

use crate::{ConfigError, RouterType, YuanConfig};

mod keys;

use super::vision::{images_of, with_images};
use keys::{Keys, wrong_kind};

impl YuanConfig {
    /// Reads a `config.json`; unknown keys are tolerated.
    ///
    /// # Errors
    ///
    /// Keys that are missing, of the wrong kind, contradictory, or that ask for something this
    /// library does not compute.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let root = parse(text)?;
        let images = images_of(&root)?;
        let config = Self { images, ..Self::language_of(&root)? };
        config.validate()?;
        Ok(config)
    }

    /// Reads the language model's part of a `config.json` and nothing else.
    ///
    /// # Errors
    ///
    /// As [`from_json`](Self::from_json), for this part.
    pub fn language_from_json(text: &str) -> Result<Self, ConfigError> {
        let config = Self::language_of(&parse(text)?)?;
        config.validate()?;
        Ok(config)
    }

    fn language_of(root: &Value) -> Result<Self, ConfigError> {
        let config = root.get("llm_config").filter(|value| !value.is_null()).unwrap_or(root);
        let object =
            config.as_object().ok_or_else(|| ConfigError::Format("expected an object".into()))?;
        let empty = Map::new();
        let moe = match object.get("moe_config") {
            None | Some(Value::Null) => &empty,
            Some(Value::Object(moe)) => moe,
            Some(other) => return Err(wrong_kind("moe_config", other, "an object")),
        };
        Keys { object, moe }.config()
    }

    /// Reads the file at `path`; see [`from_json`](Self::from_json).
    ///
    /// # Errors
    ///
    /// A file that cannot be read, and everything [`from_json`](Self::from_json) refuses.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path)
            .map_err(|cause| ConfigError::Io { path: path.into(), cause })?;
        Self::from_json(&text)
    }

    /// The configuration as a `config.json` with the keys that upstream's readers look for: flat, or
    /// nested if the model has an image tower.
    pub fn to_json(&self) -> String {
        let uniform = self.experts_per_layer.windows(2).all(|pair| pair[0] == pair[1]);
        let mut moe = json!({
            "moe_top_k": self.top_k,
            "norm_topk_prob": true,
            "router_type": match self.router_type {
                RouterType::Attention => "attn_router",
                RouterType::Linear => "linear",
            },
            "num_attention_router_heads": self.num_attention_heads,
            "gated_linear_unit": true,
            "ffn_hidden_size": self.expert_hidden_size,
        });
        moe["per_layer_experts_blocks"] = json!(self.experts_per_layer);
        if uniform {
            // Readers of Flash know no list.
            moe["moe_num_experts"] = json!(self.experts_per_layer.first());
        }
        let yarn = self.yarn.as_ref();
        let mut root = json!({
            "architectures": ["YuanForCausalLM"],
            "model_type": "yuan",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers(),
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_attention_heads,
            "attention_projection_size": self.attention_projection_size,
            "head_dim": self.head_dim(),
            "ffn_hidden_size": self.expert_hidden_size,
            "intermediate_size": self.expert_hidden_size,
            "moe_config": moe,
            "use_moe": true,
            "use_lf_gate": self.localized_filter,
            "lf_conv2d_group": 1,
            "lf_conv2d_num_pad": 0,
            "use_lfa_bias": self.filter_bias,
            "use_bias": false,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_epsilon,
            "rotary_base": self.rotary_base,
            "rotary_percent": self.rotary_percent,
            "use_yarn": yarn.is_some(),
            "max_position_embeddings": self.max_seq_len,
            "tie_word_embeddings": false,
            "attn_dropout": self.attention_dropout,
            "dropout": self.hidden_dropout,
            "reset_attention_mask": self.isolate_documents,
            "initializer_range": self.init_std,
            "logit_scale": self.logit_scale,
        });
        let tokens = &self.tokens;
        let optional = [
            ("rotary_dim", self.rotary_dim.map(Value::from)),
            ("seq_len_interpolation_factor", self.position_divisor.map(Value::from)),
            ("embedding_initializer_range", self.embedding_init_std.map(Value::from)),
            ("router_selection_bias", self.router_selection_bias.then_some(Value::Bool(true))),
            ("yarn_scale_factor", yarn.map(|y| json!(y.scale_factor))),
            (
                "scaled_max_position_embeddings",
                yarn.map(|y| json!(y.scaled_max_position_embeddings)),
            ),
            ("bos_token_id", tokens.bos.map(Value::from)),
            ("eos_token_id", eos_json(&tokens.eos)),
            ("pad_token_id", tokens.pad.map(Value::from)),
            ("eod_token", tokens.eod.map(Value::from)),
            ("eod_token_id", tokens.eod.map(Value::from)),
            ("sep_token", tokens.sep.map(Value::from)),
            ("sep_token_id", tokens.sep.map(Value::from)),
            ("mask_token_id", tokens.mask.map(Value::from)),
        ];
        for (key, value) in optional.into_iter().filter_map(|(key, value)| Some((key, value?))) {
            root[key] = value;
        }
        if let Some(images) = &self.images {
            root = with_images(images, root);
        }
        format!("{root:#}\n")
    }
}

fn parse(text: &str) -> Result<Value, ConfigError> {
    serde_json::from_str(text).map_err(|error| ConfigError::Format(error.to_string()))
}

/// One token as a number, several as a list.
pub(super) fn eos_json(eos: &[u32]) -> Option<Value> {
    match eos {
        [] => None,
        [one] => Some(json!(one)),
        several => Some(json!(several)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{YarnConfig, vision::ImageConfig};

    fn with(edit: impl FnOnce(&mut Value)) -> Result<YuanConfig, ConfigError> {
        let mut root: Value = serde_json::from_str(&YuanConfig::tiny(96).to_json()).unwrap();
        edit(&mut root);
        YuanConfig::from_json(&root.to_string())
    }

    #[test]
    fn every_preset_survives_a_round_trip() {
        let yarn = YarnConfig { scale_factor: 4.0, scaled_max_position_embeddings: 256 };
        let odd = YuanConfig {
            rotary_dim: Some(16),
            position_divisor: Some(2.0),
            yarn: Some(yarn),
            attention_dropout: 0.1,
            ..YuanConfig::tiny(96)
        };
        let seeing = YuanConfig { images: Some(ImageConfig::published()), ..YuanConfig::ultra() };
        for config in
            [YuanConfig::flash(), YuanConfig::ultra(), YuanConfig::ultra_unpruned(), odd, seeing]
        {
            assert_eq!(YuanConfig::from_json(&config.to_json()).unwrap(), config);
        }
    }

    #[test]
    fn a_multimodal_config_holds_the_language_model_under_llm_config() {
        let config = YuanConfig::ultra();
        let nested = format!(r#"{{"model_type": "yuanvl", "llm_config": {}}}"#, config.to_json());
        assert_eq!(YuanConfig::from_json(&nested).unwrap(), config);
    }

    #[test]
    fn unknown_keys_are_tolerated_and_the_per_layer_list_wins() {
        let config = with(|root| {
            root["something_new"] = json!({"deep": [1, 2]});
            root["moe_config"]["per_layer_experts_blocks"] = json!([4, 6]);
        });
        assert_eq!(config.unwrap().experts_per_layer, [4, 6]);
    }

    #[test]
    fn contradictions_name_both_keys() {
        let message = |edit: &dyn Fn(&mut Value)| with(|root| edit(root)).unwrap_err().to_string();
        assert_eq!(
            message(&|root| root["moe_config"]["ffn_hidden_size"] = json!(99)),
            "ffn_hidden_size = 32 contradicts moe_config.ffn_hidden_size = 99"
        );
        assert_eq!(
            message(&|root| root["head_dim"] = json!(16)),
            "attention_projection_size = 64 contradicts head_dim × num_attention_heads = 32"
        );
        assert_eq!(
            message(&|root| root["moe_config"]["per_layer_experts_blocks"] = json!([4])),
            "moe_config.per_layer_experts_blocks lists 1 layers, but num_hidden_layers = 2"
        );
        assert_eq!(
            message(&|root| root["moe_config"]["per_layer_experts_blocks"] = json!([4, 1])),
            "layer 1 has 1 experts, fewer than moe_config.moe_top_k = 2"
        );
        assert_eq!(
            message(&|root| root["num_attention_heads"] = json!(3)),
            "attention_projection_size = 64 contradicts head_dim × num_attention_heads = 96"
        );
        assert_eq!(
            message(&|root| root["lf_conv2d_add_bias"] = json!(true)),
            "use_lfa_bias = false contradicts lf_conv2d_add_bias = true"
        );
        assert_eq!(
            message(&|root| root["eod_token"] = json!(500)),
            "eod_token_id = 500 is outside vocab_size = 96"
        );
    }

    #[test]
    fn what_is_not_computed_is_refused() {
        for (key, value) in [
            ("use_moe", json!(false)),
            ("use_bias", json!(true)),
            ("use_shareqk", json!(true)),
            ("rotary_interleaved", json!(true)),
            ("use_rope_scaling", json!(true)),
            ("lf_conv2d_group", json!(4)),
            ("hidden_act", json!("gelu")),
        ] {
            let error = with(|root| root[key] = value.clone()).unwrap_err();
            assert!(matches!(error, ConfigError::Unsupported { .. }), "{key}: {error}");
            assert!(error.to_string().starts_with(key), "{error}");
        }
    }

    #[test]
    fn absent_and_misshapen_keys_are_named() {
        for key in
            ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rotary_base"]
        {
            let error = with(|root| drop(root.as_object_mut().unwrap().remove(key))).unwrap_err();
            assert_eq!(error.to_string(), format!("the configuration has no `{key}`"));
            let error = with(|root| root[key] = json!("many")).unwrap_err();
            assert!(error.to_string().contains(&format!("`{key}` is \"many\"")), "{error}");
        }
        assert!(matches!(YuanConfig::from_json("{"), Err(ConfigError::Format(_))));
        assert!(matches!(YuanConfig::from_json("[]"), Err(ConfigError::Format(_))));
    }
}
