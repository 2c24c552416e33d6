//! A number for all layers, or one for each.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A limit that holds for every layer, or differs from layer to layer.
///
/// As text and in JSON: `0.4` or `"inf"` for all layers, `0.2,0.4,inf` or `[0.2, 0.4, "inf"]` for
/// each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "Repr", into = "Repr")]
pub enum PerLayer {
    /// The same for every layer.
    All(f64),
    /// One for each layer, the first layer's first.
    Each(Vec<f64>),
}

impl PerLayer {
    /// The value of one layer; a layer beyond a list has the list's last value (or, of an empty
    /// one, NaN).
    pub fn at(&self, layer: usize) -> f64 {
        match self {
            Self::All(value) => *value,
            Self::Each(values) => values.get(layer).or(values.last()).copied().unwrap_or(f64::NAN),
        }
    }

    /// All values that are written down.
    pub fn values(&self) -> &[f64] {
        match self {
            Self::All(value) => std::slice::from_ref(value),
            Self::Each(values) => values,
        }
    }
}

impl From<f64> for PerLayer {
    fn from(value: f64) -> Self {
        Self::All(value)
    }
}

impl FromStr for PerLayer {
    type Err = std::num::ParseFloatError;

    /// Reads a number, or numbers with commas between them.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let numbers: Vec<f64> =
            text.split(',').map(|number| number.trim().parse()).collect::<Result<_, _>>()?;
        Ok(if let [all] = numbers[..] { Self::All(all) } else { Self::Each(numbers) })
    }
}

impl fmt::Display for PerLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers: Vec<String> = self.values().iter().map(f64::to_string).collect();
        f.write_str(&numbers.join(","))
    }
}

/// JSON has no infinity: it is the text "inf".
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Repr {
    All(Number),
    Each(Vec<Number>),
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Number {
    Finite(f64),
    Infinite(Infinite),
}

#[derive(Serialize, Deserialize)]
enum Infinite {
    #[serde(rename = "inf")]
    Positive,
}

impl From<f64> for Number {
    fn from(value: f64) -> Self {
        if value.is_infinite() { Self::Infinite(Infinite::Positive) } else { Self::Finite(value) }
    }
}

impl From<Number> for f64 {
    fn from(number: Number) -> Self {
        match number {
            Number::Finite(value) => value,
            Number::Infinite(Infinite::Positive) => Self::INFINITY,
        }
    }
}

impl From<PerLayer> for Repr {
    fn from(value: PerLayer) -> Self {
        match value {
            PerLayer::All(value) => Self::All(value.into()),
            PerLayer::Each(values) => Self::Each(values.into_iter().map(Into::into).collect()),
        }
    }
}

impl From<Repr> for PerLayer {
    fn from(repr: Repr) -> Self {
        match repr {
            Repr::All(value) => Self::All(value.into()),
            Repr::Each(values) => Self::Each(values.into_iter().map(Into::into).collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_json_carry_one_number_or_many() {
        for (text, json) in [
            ("0.4", "0.4"),
            ("inf", "\"inf\""),
            ("0.2,inf", "[0.2,\"inf\"]"),
            ("1,2,3", "[1.0,2.0,3.0]"),
        ] {
            let value: PerLayer = text.parse().unwrap();
            assert_eq!(value.to_string(), text);
            assert_eq!(serde_json::to_string(&value).unwrap(), json);
            assert_eq!(serde_json::from_str::<PerLayer>(json).unwrap(), value);
        }
        assert!("0.2,much".parse::<PerLayer>().is_err());
        assert!(serde_json::from_str::<PerLayer>("\"much\"").is_err());
    }

    #[test]
    fn a_list_answers_layer_by_layer() {
        let each = PerLayer::Each(vec![0.2, 0.4]);
        assert_eq!([each.at(0), each.at(1)], [0.2, 0.4]);
        assert_eq!(PerLayer::All(0.3).at(7), 0.3);
    }
}
