//! Where the language model's tensors are among those of a directory: alone, or beside a vision
//! tower under one of two kinds of names.

use serde_json::Value;

use super::Shards;
use crate::YuanConfig;

/// How a directory names the tensors of the language model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Naming {
    /// A text model: `model.layers.0.…`, `lm_head.weight`.
    Text,
    /// Upstream's multimodal models: `language_model.model.layers.0.…`,
    /// `language_model.lm_head.weight`.
    Multimodal,
    /// What newer versions of the `transformers` library write of them:
    /// `model.language_model.layers.0.…`, `lm_head.weight`.
    NewMultimodal,
}

/// Before every name of a multimodal model.
const OLD: &str = "language_model.";
/// Instead of `model.` in newer ones.
const NEW: &str = "model.language_model.";
/// How names of text models begin, but for the head.
const MODEL: &str = "model.";
/// How names of the image tower and its projector begin in upstream's multimodal models.
const IMAGES: [&str; 3] = ["vision_model.", "imagemlp.", "imagemlp_layernorm."];
/// Tables that upstream's readers skip, too.
const SKIPPED: &str = "rotary_pos_emb";

/// The embedding and the head of a text model.
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

impl Naming {
    /// What the names of a directory tell.
    pub fn of<'a>(mut names: impl Iterator<Item = &'a str>) -> Self {
        let found = names.find_map(|name| match name {
            name if name.starts_with(OLD) => Some(Self::Multimodal),
            name if name.starts_with(NEW) => Some(Self::NewMultimodal),
            _ => None,
        });
        found.unwrap_or(Self::Text)
    }

    /// The name in the directory of a tensor that a text model calls `name`, or upstream's model one
    /// of the image tower.
    pub fn full_name(self, name: &str) -> String {
        match self {
            Self::NewMultimodal if is_of_images(name) => format!("{MODEL}{name}"),
            _ if is_of_images(name) => name.to_owned(),
            Self::Text => name.to_owned(),
            Self::Multimodal => format!("{OLD}{name}"),
            Self::NewMultimodal => match name.strip_prefix(MODEL) {
                Some(rest) => format!("{NEW}{rest}"),
                None => name.to_owned(),
            },
        }
    }

    /// Whether a tensor is one of the image tower or its projector.
    pub fn is_of_images(self, name: &str) -> bool {
        match self {
            Self::Text => false,
            Self::Multimodal => is_of_images(name),
            Self::NewMultimodal => name.strip_prefix(MODEL).is_some_and(is_of_images),
        }
    }

    /// Whether a tensor is none of the language model and yet belongs there.
    fn is_beside_language(self, name: &str) -> bool {
        name.contains(SKIPPED)
            || self.is_of_images(name)
            || (self == Self::NewMultimodal && name.starts_with(MODEL) && !name.starts_with(NEW))
    }
}

fn is_of_images(name: &str) -> bool {
    IMAGES.iter().any(|start| name.starts_with(start))
}

/// A directory's names, and what tells which tensors they are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Names {
    pub naming: Naming,
    /// The image tower is a part of the model, and not just beside it.
    pub has_images: bool,
    /// The configuration says so, and there is no head of its own.
    pub is_tied: bool,
}

impl Names {
    /// What configuration and names of a directory tell.
    pub fn of(config: &YuanConfig, raw_config: &Value, shards: &Shards) -> Self {
        let naming = Naming::of(shards.names());
        let nested = raw_config.get("llm_config").filter(|nested| !nested.is_null());
        let mut configs = [Some(raw_config), nested].into_iter().flatten();
        let says_tied = configs.any(|config| config[TIED] == true);
        let has_head = shards.get(&naming.full_name(HEAD)).is_some();
        Self { naming, has_images: config.images.is_some(), is_tied: says_tied && !has_head }
    }

    /// Whether a tensor is no parameter of the model and yet belongs there.
    pub fn is_extra(self, name: &str) -> bool {
        self.naming.is_beside_language(name) && !(self.has_images && self.naming.is_of_images(name))
    }

    /// The name in the directory of what a text model calls `name`.
    pub fn stored(self, name: &str) -> String {
        let name = if self.is_tied && name == HEAD { EMBEDDING } else { name };
        self.naming.full_name(name)
    }
}

/// The key of `config.json` that says that the head is the embedding.
pub(super) const TIED: &str = "tie_word_embeddings";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_what_kind_of_model_it_is() {
        let layer = "model.layers.0.norm.weight";
        for (naming, full, head) in [
            (Naming::Text, "model.layers.0.norm.weight", "lm_head.weight"),
            (
                Naming::Multimodal,
                "language_model.model.layers.0.norm.weight",
                "language_model.lm_head.weight",
            ),
            (Naming::NewMultimodal, "model.language_model.layers.0.norm.weight", "lm_head.weight"),
        ] {
            assert_eq!(naming.full_name(layer), full);
            assert_eq!(naming.full_name(HEAD), head);
            assert_eq!(Naming::of([head, full].into_iter()), naming);
            assert!(!naming.is_beside_language(full) && !naming.is_beside_language(head));
        }
        let table = "vision_model.embeddings.position_embedding";
        assert!(Naming::NewMultimodal.is_beside_language("model.visual.patch_embed.proj.weight"));
        assert!(Naming::Multimodal.is_beside_language(table));
        assert!(!Naming::Text.is_beside_language(table));
        assert_eq!(Naming::Multimodal.full_name(table), table);
        assert_eq!(Naming::NewMultimodal.full_name(table), format!("model.{table}"));
    }
}
