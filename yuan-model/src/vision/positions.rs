//! Where images stand among the tokens of a text.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The positions of the tokens of images.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImagePositions {
    /// Every token of a prompt has the next position, as upstream serves its models.
    #[default]
    Increasing,
    /// All tokens up to the last image have position 0, and counting begins behind it: as upstream
    /// trains its models, and as [`masks`](crate::masks::image_row_position_ids) numbers training rows.
    Together,
}

impl FromStr for ImagePositions {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "increasing" => Ok(Self::Increasing),
            "together" => Ok(Self::Together),
            other => Err(format!("`{other}` is neither increasing nor together")),
        }
    }
}
