//! Numbers of the command line that are checked as they are read.

use std::{fmt::Display, str::FromStr};

/// Layers of the largest model that is built from options: more is a slip of the finger.
const MOST_LAYERS: usize = 10_000;

/// A count that is not zero.
pub fn at_least_one<T>(text: &str) -> Result<T, String>
where
    T: FromStr<Err: Display> + PartialOrd + From<u8>,
{
    let count: T = text.parse().map_err(|error: T::Err| error.to_string())?;
    if count < T::from(1) { Err("it must be at least 1".into()) } else { Ok(count) }
}

/// A count of layers that can be built; whether none is too few is for the model to say.
pub fn layers(text: &str) -> Result<usize, String> {
    let count: usize = text.parse().map_err(|error| format!("{error}"))?;
    if count > MOST_LAYERS { Err(format!("it must be at most {MOST_LAYERS}")) } else { Ok(count) }
}

/// A finite number above zero.
pub fn positive(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|error| format!("{error}"))?;
    let is_positive = number.is_finite() && number > 0.0;
    if is_positive { Ok(number) } else { Err("it must be a number above 0".into()) }
}

/// How many times as large something is as the smallest of its kind: 1 or more.
pub fn ratio(text: &str) -> Result<f64, String> {
    let number = positive(text)?;
    if number < 1.0 { Err("it must be at least 1".into()) } else { Ok(number) }
}

/// A part of a whole, of which something must be left: above 0 and below 1.
pub fn share(text: &str) -> Result<f64, String> {
    let number = positive(text)?;
    if number < 1.0 { Ok(number) } else { Err("it must lie between 0 and 1".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_of_range_is_refused() {
        assert_eq!(at_least_one::<u64>("1"), Ok(1));
        assert!(at_least_one::<usize>("0").is_err() && at_least_one::<usize>("-1").is_err());
        assert_eq!(layers("10000"), Ok(10_000));
        assert!(layers("10001").is_err() && layers("-1").is_err());
        assert_eq!(positive("0.5"), Ok(0.5));
        for text in ["0", "-1", "nan", "inf", "x"] {
            assert!(positive(text).is_err() && ratio(text).is_err(), "{text}");
        }
        assert!(ratio("0.5").is_err());
        assert!(share("0.5").is_ok() && share("1").is_err() && share("0").is_err());
    }
}
