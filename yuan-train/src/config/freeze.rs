//! Parts of a multimodal model that stay as they are.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Parts of a multimodal model that do not learn, so that the projector between them learns first, as
/// in upstream's stages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freeze {
    /// The image tower.
    pub vision: bool,
    /// The language model.
    pub language: bool,
}

impl Freeze {
    /// Whether a parameter stays as it is, by its dotted path (`images.tower.patch.weight`).
    pub fn includes(self, path: &str) -> bool {
        let mut parts = path.split('.');
        match (parts.next(), parts.next()) {
            (Some("images"), Some("tower")) => self.vision,
            (Some("images"), _) => false,
            _ => self.language,
        }
    }
}

impl fmt::Display for Freeze {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [("vision", self.vision), ("language", self.language)];
        let frozen: Vec<&str> =
            names.into_iter().filter(|(_, frozen)| *frozen).map(|(name, _)| name).collect();
        f.write_str(&frozen.join(","))
    }
}

impl FromStr for Freeze {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut freeze = Self::default();
        for part in text.split(',') {
            match part.trim() {
                "vision" => freeze.vision = true,
                "language" => freeze.language = true,
                other => return Err(format!("`{other}` is neither vision nor language")),
            }
        }
        Ok(freeze)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_frozen_by_the_paths_of_their_parameters() {
        let freeze: Freeze = "vision, language".parse().unwrap();
        assert_eq!(freeze.to_string(), "vision,language");
        assert!(freeze.includes("images.tower.blocks.0.qkv.weight"));
        assert!(freeze.includes("blocks.0.moe.router.weight"));
        assert!(!freeze.includes("images.projector.up.weight"));
        assert!(!Freeze::default().includes("embedding.weight"));
        assert_eq!(
            "tower".parse::<Freeze>().unwrap_err(),
            "`tower` is neither vision nor language"
        );
    }
}
