//! Mixtures of token files, against plain lists.

use std::{collections::BTreeMap, path::Path};

use proptest::prelude::*;
use yuan_data::{Mixture, MixtureRow, TokenFile, TokenType, TokenWriter};

const ROW: usize = 4;

/// A file whose tokens count upwards from `first`.
fn file(directory: &Path, name: &str, first: u32, tokens: u32) -> TokenFile {
    let name = directory.join(name);
    let mut writer = TokenWriter::create(&name, TokenType::I32).unwrap();
    writer.push(&(first..first + tokens).collect::<Vec<_>>()).unwrap();
    writer.end_document().unwrap();
    writer.finish().unwrap();
    TokenFile::open(&name).unwrap()
}

fn mixture(directory: &Path, rows: &[u32], weights: &[f64], seed: Option<u64>) -> Mixture {
    let names: Vec<String> = (0..rows.len()).map(|set| format!("set{set}")).collect();
    let sets = rows.iter().zip(weights).zip(&names).enumerate();
    let sets = sets.map(|(set, ((rows, weight), name))| {
        let tokens = file(directory, name, set as u32 * 1_000_000, rows * ROW as u32 + 1);
        (name.as_str(), *weight, tokens)
    });
    Mixture::new(ROW, seed, sets.collect()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn every_row_of_a_set_once_an_epoch_and_any_place_without_those_before(
        rows in prop::collection::vec(1_u32..40, 1..4),
        weights in prop::collection::vec(0.05_f64..1.0, 3),
        seed in any::<u64>(),
        batches in prop::collection::vec(1_u64..9, 1..30),
    ) {
        let temp = tempfile::tempdir().unwrap();
        let mixture = mixture(temp.path(), &rows, &weights[..rows.len()], Some(seed));
        let list: Vec<MixtureRow> = (0..400).map(|place| mixture.row(place).unwrap()).collect();
        let mut seen: Vec<BTreeMap<u32, u32>> = vec![BTreeMap::new(); rows.len()];
        for row in &list {
            // Rows are whole, of one set, and begin where rows begin.
            let first = row.tokens[0] - row.set as u32 * 1_000_000;
            prop_assert!(row.tokens.iter().zip(row.tokens[0]..).all(|(a, b)| *a == b));
            prop_assert_eq!((first % ROW as u32, row.tokens.len()), (0, ROW + 1));
            let counts = &mut seen[row.set];
            let before: u32 = counts.values().sum();
            // How often any row was seen differs by one at most, so an epoch has each once.
            let count = counts.entry(first / ROW as u32).or_default();
            prop_assert_eq!(*count, before / rows[row.set]);
            *count += 1;
        }
        // Read in batches of any size on any number of ranks, it is the same list.
        let mut place = 0;
        for batch in batches {
            let ranks = batch.min(3);
            let mut own: Vec<(u64, MixtureRow)> = Vec::new();
            for rank in 0..ranks {
                for at in (rank..batch).step_by(ranks as usize) {
                    own.push((place + at, mixture.row(place + at).unwrap()));
                }
            }
            for (at, row) in own {
                prop_assert_eq!(&row, &list[at as usize]);
            }
            place += batch;
        }
    }
}

#[test]
fn epochs_and_seeds_have_orders_of_their_own() {
    let temp = tempfile::tempdir().unwrap();
    let firsts = |mixture: &Mixture, from: u64| -> Vec<u32> {
        (from..from + 30).map(|place| mixture.row(place).unwrap().tokens[0]).collect()
    };
    let plain = mixture(temp.path(), &[30], &[1.0], None);
    assert!(firsts(&plain, 0).into_iter().eq((0..30).map(|row| row * ROW as u32)));
    assert_eq!(firsts(&plain, 0), firsts(&plain, 30));
    let one = mixture(temp.path(), &[30], &[1.0], Some(1));
    let other = mixture(temp.path(), &[30], &[1.0], Some(2));
    let orders = [firsts(&plain, 0), firsts(&one, 0), firsts(&one, 30), firsts(&other, 0)];
    for (at, order) in orders.iter().enumerate() {
        assert!(orders[..at].iter().all(|before| before != order), "{at}");
    }
}

#[test]
fn what_cannot_be_mixed_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let small = || file(temp.path(), "small", 0, 4);
    let refused = |sets| Mixture::new(ROW, None, sets).unwrap_err().to_string();
    let error = refused(vec![("a", 1.0, small())]);
    assert!(error.ends_with("small.bin: 4 tokens are too few for one row of 4"), "{error}");
    let file = || file(temp.path(), "file", 0, 9);
    let error = refused(vec![("a", 1.0, file()), ("a", 1.0, file())]);
    assert_eq!(error, "two data sets are called `a`");
    let error = refused(vec![("a", 0.0, file())]);
    assert_eq!(error, "the weight 0 of a data set must be a positive number");
    assert_eq!(refused(Vec::new()), "a mixture needs at least one data set");
}
