//! Which parameters learn.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Which parameters learn; the others stay as they are, weight decay included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Learns {
    /// All of them.
    #[default]
    All,
    /// The routers: which expert a token visits, and how much it counts.
    Routers,
    /// The experts.
    Experts,
    /// Attention, with the localized filter before it.
    Attention,
}

impl Learns {
    const ALL: [Self; 4] = [Self::All, Self::Routers, Self::Experts, Self::Attention];

    fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Routers => "routers",
            Self::Experts => "experts",
            Self::Attention => "attention",
        }
    }

    /// Whether a parameter learns, by its dotted path (`blocks.0.moe.router.weight`).
    pub fn includes(self, path: &str) -> bool {
        let mut parts = path.split('.');
        match self {
            Self::All => true,
            Self::Routers => parts.any(|part| part == "router"),
            Self::Experts => parts.any(|part| part == "experts"),
            Self::Attention => parts.any(|part| part == "attention"),
        }
    }
}

impl fmt::Display for Learns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Learns {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|learns| learns.name() == text);
        found.ok_or_else(|| format!("`{text}` is none of all, routers, experts, attention"))
    }
}
