//! The keys of `config.json`, read one by one: kinds, synonyms that must agree, and what is
//! refused.

use serde_json::{Map, Value};

use crate::{ConfigError, RouterType, SpecialTokens, YarnConfig, YuanConfig};

/// Typed access to the keys.
pub(super) struct Keys<'a> {
    pub object: &'a Map<String, Value>,
    pub moe: &'a Map<String, Value>,
}

impl Keys<'_> {
    /// The configuration that they make; what this library does not compute is refused.
    pub fn config(&self) -> Result<YuanConfig, ConfigError> {
        self.refuse_unsupported()?;
        let hidden_size = self.required("hidden_size")?;
        let num_attention_heads: usize = self.required("num_attention_heads")?;
        let layers = self.required("num_hidden_layers")?;
        let head_dim = self.count("head_dim")?;
        let from_heads = head_dim.and_then(|d| d.checked_mul(num_attention_heads));
        let attention_projection_size = self
            .agree(
                "attention_projection_size",
                self.count("attention_projection_size")?,
                "head_dim × num_attention_heads",
                from_heads,
            )?
            .unwrap_or(hidden_size);
        let expert_hidden_size = self
            .agree(
                "ffn_hidden_size",
                self.count("ffn_hidden_size")?,
                "moe_config.ffn_hidden_size",
                moe_count(self.moe, "ffn_hidden_size")?,
            )?
            .or(self.count("intermediate_size")?)
            .ok_or(ConfigError::Missing("ffn_hidden_size"))?;
        let max_seq_len = self
            .count("max_position_embeddings")?
            .or(self.count("model_max_length")?)
            .unwrap_or(4096);
        Ok(YuanConfig {
            vocab_size: self.required("vocab_size")?,
            hidden_size,
            num_attention_heads,
            attention_projection_size,
            expert_hidden_size,
            experts_per_layer: self.experts_per_layer(layers)?,
            top_k: moe_count(self.moe, "moe_top_k")?.unwrap_or(2),
            router_type: self.router_type()?,
            localized_filter: self.flag("use_lf_gate")?.unwrap_or(true),
            filter_bias: self
                .agree(
                    "use_lfa_bias",
                    self.flag("use_lfa_bias")?,
                    "lf_conv2d_add_bias",
                    self.flag("lf_conv2d_add_bias")?,
                )?
                .unwrap_or(false),
            norm_epsilon: self.number("rms_norm_eps")?.unwrap_or(1e-6),
            rotary_base: self.number("rotary_base")?.ok_or(ConfigError::Missing("rotary_base"))?,
            rotary_percent: self.number("rotary_percent")?.unwrap_or(1.0),
            rotary_dim: self.count("rotary_dim")?,
            position_divisor: self.number("seq_len_interpolation_factor")?,
            yarn: self.yarn(max_seq_len)?,
            max_seq_len,
            init_std: self.number("initializer_range")?.unwrap_or(0.02),
            embedding_init_std: self.number("embedding_initializer_range")?,
            router_selection_bias: self.flag("router_selection_bias")?.unwrap_or(false),
            attention_dropout: self
                .agree(
                    "attn_dropout",
                    self.number("attn_dropout")?,
                    "attention_dropout",
                    self.number("attention_dropout")?,
                )?
                .unwrap_or(0.0),
            hidden_dropout: self.number("dropout")?.unwrap_or(0.0),
            logit_scale: self.number("logit_scale")?.unwrap_or(1.0),
            isolate_documents: self.flag("reset_attention_mask")?.unwrap_or(false),
            tokens: self.tokens()?,
            images: None,
        })
    }

    fn router_type(&self) -> Result<RouterType, ConfigError> {
        let key = "moe_config.router_type";
        match present(self.moe, "router_type") {
            None => Err(ConfigError::Missing(key)),
            Some(Value::String(name)) if name == "attn_router" => Ok(RouterType::Attention),
            Some(Value::String(name)) if name == "linear" => Ok(RouterType::Linear),
            Some(Value::String(name)) => Err(ConfigError::Unsupported {
                key,
                value: format!("{name:?}"),
                reason: "routers are `linear` or `attn_router`",
            }),
            Some(other) => Err(wrong_kind(key, other, "the name of a router")),
        }
    }

    fn refuse_unsupported(&self) -> Result<(), ConfigError> {
        let flags = [
            ("use_moe", self.flag("use_moe")?, true, "every layer is a mixture of experts"),
            ("use_bias", self.flag("use_bias")?, false, "projections have no bias"),
            ("use_shareqk", self.flag("use_shareqk")?, false, "queries and keys are separate"),
            (
                "rotary_interleaved",
                self.flag("rotary_interleaved")?,
                false,
                "rotary halves are paired",
            ),
            (
                "use_rope_scaling",
                self.flag("use_rope_scaling")?,
                false,
                "use_yarn is the scaling there is",
            ),
            ("causal_mask", self.flag("causal_mask")?, true, "attention is causal"),
            (
                "moe_config.norm_topk_prob",
                flag(self.moe, "norm_topk_prob")?,
                true,
                "the weights of a token's experts sum to one",
            ),
            (
                "moe_config.gated_linear_unit",
                flag(self.moe, "gated_linear_unit")?,
                true,
                "experts are SwiGLU",
            ),
        ];
        for (key, value, supported, reason) in flags {
            if let Some(value) = value.filter(|&value| value != supported) {
                return Err(ConfigError::Unsupported { key, value: value.to_string(), reason });
            }
        }
        if let Some(groups) = self.count("lf_conv2d_group")?.filter(|&groups| groups != 1) {
            let reason = "the filter's convolutions are dense (1)";
            return Err(ConfigError::Unsupported {
                key: "lf_conv2d_group",
                value: groups.to_string(),
                reason,
            });
        }
        if let Some(act) = self
            .object
            .get("hidden_act")
            .filter(|act| !act.is_null() && act.as_str() != Some("silu"))
        {
            return Err(ConfigError::Unsupported {
                key: "hidden_act",
                value: act.to_string(),
                reason: "experts use silu",
            });
        }
        if moe_count(self.moe, "num_attention_router_heads")? == Some(0) {
            return Err(ConfigError::Zero { key: "moe_config.num_attention_router_heads" });
        }
        Ok(())
    }

    fn experts_per_layer(&self, layers: usize) -> Result<Vec<usize>, ConfigError> {
        // A count beyond any file's means would only exhaust memory below.
        const MOST_LAYERS: usize = 1 << 16;
        if layers == 0 || layers > MOST_LAYERS {
            return Err(ConfigError::OutOfRange {
                key: "num_hidden_layers",
                value: layers.to_string(),
                expected: "is not in 1..=65536",
            });
        }
        let key = "moe_config.per_layer_experts_blocks";
        match self.moe.get("per_layer_experts_blocks") {
            None | Some(Value::Null) => {
                let experts = moe_count(self.moe, "moe_num_experts")?;
                Ok(vec![experts.ok_or(ConfigError::Missing("moe_config.moe_num_experts"))?; layers])
            }
            Some(Value::Array(blocks)) => {
                if blocks.len() != layers {
                    let listed = blocks.len();
                    return Err(ConfigError::LayersListed { key, listed, layers });
                }
                blocks.iter().map(|block| as_count(key, block)).collect()
            }
            Some(other) => Err(wrong_kind(key, other, "a list of counts")),
        }
    }

    fn yarn(&self, max_seq_len: usize) -> Result<Option<YarnConfig>, ConfigError> {
        if !self.flag("use_yarn")?.unwrap_or(false) {
            return Ok(None);
        }
        let scaled = self.count("scaled_max_position_embeddings")?;
        Ok(Some(YarnConfig {
            scale_factor: self.number("yarn_scale_factor")?.unwrap_or(128.0),
            scaled_max_position_embeddings: scaled.unwrap_or(max_seq_len),
        }))
    }

    fn tokens(&self) -> Result<SpecialTokens, ConfigError> {
        let either = |short, long| self.agree(short, self.token(short)?, long, self.token(long)?);
        Ok(SpecialTokens {
            bos: self.token("bos_token_id")?,
            eos: self.tokens_of("eos_token_id")?,
            pad: self.token("pad_token_id")?,
            eod: either("eod_token", "eod_token_id")?,
            sep: either("sep_token", "sep_token_id")?,
            mask: self.token("mask_token_id")?,
        })
    }

    /// One value under two names: either, and equal where both are given.
    fn agree<T: PartialEq + std::fmt::Display>(
        &self,
        key: &str,
        value: Option<T>,
        other_key: &str,
        other: Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        match (value, other) {
            (Some(a), Some(b)) if a != b => Err(ConfigError::Disagreement {
                key: key.to_owned(),
                value: a.to_string(),
                other_key: other_key.to_owned(),
                other_value: b.to_string(),
            }),
            (a, b) => Ok(a.or(b)),
        }
    }

    fn required(&self, key: &'static str) -> Result<usize, ConfigError> {
        self.count(key)?.ok_or(ConfigError::Missing(key))
    }

    fn count(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        present(self.object, key).map(|value| as_count(key, value)).transpose()
    }

    fn token(&self, key: &str) -> Result<Option<u32>, ConfigError> {
        // Some configs carry the token's text here; only ids have an effect.
        let Some(value) = present(self.object, key).filter(|value| !value.is_string()) else {
            return Ok(None);
        };
        token_id(key, value)
    }

    /// One token or a list of them.
    fn tokens_of(&self, key: &str) -> Result<Vec<u32>, ConfigError> {
        let mut tokens = Vec::new();
        match present(self.object, key) {
            Some(Value::Array(list)) => {
                for value in list {
                    tokens.extend(token_id(key, value)?);
                }
            }
            _ => tokens.extend(self.token(key)?),
        }
        Ok(tokens)
    }

    fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        let number =
            |value: &Value| value.as_f64().ok_or_else(|| wrong_kind(key, value, "a number"));
        present(self.object, key).map(number).transpose()
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        flag(self.object, key)
    }
}

/// The id of a token; -1 is how some libraries write that there is none.
fn token_id(key: &str, value: &Value) -> Result<Option<u32>, ConfigError> {
    if value.as_i64() == Some(-1) {
        return Ok(None);
    }
    let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
    id.map(Some).ok_or_else(|| wrong_kind(key, value, "a token id"))
}

fn present<'a>(object: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    object.get(key).filter(|value| !value.is_null())
}

fn flag(object: &Map<String, Value>, key: &str) -> Result<Option<bool>, ConfigError> {
    let flag =
        |value: &Value| value.as_bool().ok_or_else(|| wrong_kind(key, value, "true or false"));
    present(object, key).map(flag).transpose()
}

fn moe_count(moe: &Map<String, Value>, key: &str) -> Result<Option<usize>, ConfigError> {
    present(moe, key).map(|value| as_count(&format!("moe_config.{key}"), value)).transpose()
}

fn as_count(key: &str, value: &Value) -> Result<usize, ConfigError> {
    let count = value.as_u64().and_then(|count| usize::try_from(count).ok());
    count.ok_or_else(|| wrong_kind(key, value, "a count"))
}

pub(super) fn wrong_kind(key: &str, value: &Value, expected: &str) -> ConfigError {
    ConfigError::Format(format!("`{key}` is {value}; expected {expected}"))
}
