//! Documents, split by name into training and validation.

use xxhash_rust::xxh3::xxh3_64;

/// One text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Name that orders the documents and decides the split; the same on every machine.
    pub name: String,
    /// Its text.
    pub text: String,
}

/// Which part of the data a document belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Trained on.
    Train,
    /// Only looked at to measure.
    Validation,
}

impl Split {
    /// Of a document by its name alone: about the share `validation` of all documents validates.
    pub fn of(name: &str, validation: f64) -> Self {
        // The upper half of the hash, as a number in [0, 1).
        let drawn = (xxh3_64(name.as_bytes()) >> 11) as f64 / (1_u64 << 53) as f64;
        if drawn < validation { Self::Validation } else { Self::Train }
    }
}

/// Documents of about `bytes` altogether, spread evenly over the list; all of them if they are
/// fewer.
pub fn thin_out(documents: Vec<Document>, bytes: usize) -> Vec<Document> {
    let total: usize = documents.iter().map(|document| document.text.len()).sum();
    let (mut seen, mut kept) = (0, 0);
    let is_due = |document: &Document| {
        seen += document.text.len();
        let due = kept as f64 + document.text.len() as f64 / 2.0
            <= bytes as f64 * seen as f64 / total as f64;
        kept += if due { document.text.len() } else { 0 };
        due
    };
    if total <= bytes { documents } else { documents.into_iter().filter(is_due).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_alone_decide_about_a_share() {
        let validates =
            (0..10_000).filter(|i| Split::of(&format!("{i}.txt"), 0.05) == Split::Validation);
        // 500 on average, with a deviation of 22.
        let count = validates.count();
        assert!((400..600).contains(&count), "{count}");
        assert_eq!(Split::of("a", 0.0), Split::Train);
        assert_eq!(Split::of("a", 1.0), Split::Validation);
    }

    #[test]
    fn thinning_out_keeps_the_size_and_the_spread() {
        let documents: Vec<Document> = (0..100)
            .map(|i| Document { name: i.to_string(), text: "x".repeat(1 + i * 37 % 50) })
            .collect();
        let size = |documents: &[Document]| documents.iter().map(|d| d.text.len()).sum::<usize>();
        let thinned = thin_out(documents.clone(), size(&documents) / 5);
        let share = size(&thinned) as f64 / size(&documents) as f64;
        assert!((share - 0.2).abs() < 0.02, "{share}");
        let late = thinned.iter().filter(|d| d.name.parse::<usize>().unwrap() >= 50).count() as f64;
        assert!((late / thinned.len() as f64 - 0.5).abs() < 0.15);
        assert_eq!(thin_out(documents.clone(), 1 << 20), documents);
    }
}
