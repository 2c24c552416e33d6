//! Readers of untrusted files, fed with damaged ones: they may refuse, but never panic, never
//! allocate more than the file justifies and never read outside it.
//!
//! A coverage-guided fuzzer would need a nightly compiler and Burn built anew with it. This one
//! changes the files of `tests/corpus` and of the fixtures in the ways in which files break, always
//! the same ones for a seed; `YUAN_FUZZ_CASES` and `YUAN_FUZZ_SEED` make it search longer and
//! elsewhere. What fails is added to the corpus.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Mutex,
};

use peak_alloc::PeakAlloc;
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use tempfile::TempDir;
use yuan::model::{
    YuanConfig,
    hf::{HfCheckpoint, Shards},
    storage::TensorFile,
};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Where upstream's files are.
const FIXTURES: &str = "yuan-model/tests/fixtures";

/// The allocator counts for the whole process, so one reader is measured at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Memory that a reader may use: a fixed part, and so many times the files' size for names and JSON
/// values.
fn allowance(file_bytes: usize) -> usize {
    (1 << 20) + 150 * file_bytes
}

fn number_of(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number"))
    })
}

/// Files to start from: the corpus, and the fixtures that fit.
fn seeds(kind: &str, fixtures: &[&str]) -> Vec<Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let corpus = fs::read_dir(root.join("tests/corpus").join(kind))
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> =
        corpus.chain(fixtures.iter().map(|file| root.join(FIXTURES).join(file))).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// Tries every seed as it is, then `cases` changed ones; what fails is written to the corpus.
fn fuzz(kind: &str, extension: &str, seeds: &[Vec<u8>], cases: u64, read: impl Fn(&[u8])) {
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let cases = number_of("YUAN_FUZZ_CASES", cases);
    let mut rng = StdRng::seed_from_u64(number_of("YUAN_FUZZ_SEED", 0));
    let try_one = |input: &[u8]| {
        if let Err(cause) = catch_unwind(AssertUnwindSafe(|| read(input))) {
            let mut hash = DefaultHasher::new();
            input.hash(&mut hash);
            let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(kind);
            let path = corpus.join(format!("failed-{:016x}.{extension}", hash.finish()));
            fs::write(&path, input).unwrap();
            eprintln!("this input fails: {}", path.display());
            std::panic::resume_unwind(cause);
        }
    };
    seeds.iter().for_each(|seed| try_one(seed));
    for _ in 0..cases {
        let mut input = seeds[rng.random_range(0..seeds.len())].clone();
        for _ in 0..rng.random_range(1..5) {
            mutate(&mut input, extension == "safetensors", seeds, &mut rng);
        }
        try_one(&input);
    }
}

/// Breaks a file a little.
fn mutate(input: &mut Vec<u8>, has_header: bool, seeds: &[Vec<u8>], rng: &mut StdRng) {
    // Damage to the header is more telling than damage to numbers.
    let has_header = has_header && input.len() > 8;
    let text = if has_header { 8..(input.len().min(4096)) } else { 0..input.len() };
    if text.len() < 2 {
        return input.extend(rng.next_u64().to_le_bytes());
    }
    let at = rng.random_range(text.clone());
    let end = (at + rng.random_range(1..40_usize)).min(text.end);
    match rng.random_range(0..9) {
        0 => input[at] ^= 1 << rng.random_range(0..8),
        1 => input[at] = *pick(b"\0\xff\"{}[]:,-.0129 \\\n", rng),
        2 => drop(input.drain(at..end)),
        3 => {
            let part = input[at..end].to_vec();
            input.splice(at..at, part.repeat(rng.random_range(1..4)));
        }
        4 => input.truncate(at),
        5 => replace_number(input, at, rng),
        6 => {
            let other = &seeds[rng.random_range(0..seeds.len())];
            let from = rng.random_range(0..other.len());
            let part = &other[from..(from + 60).min(other.len())];
            input.splice(at..end, part.iter().copied());
        }
        7 if has_header => {
            let sizes = [
                0,
                1,
                8,
                input.len() as u64 - 8,
                input.len() as u64,
                1 << 40,
                u64::MAX,
                u64::MAX - 7,
            ];
            input[..8].copy_from_slice(&pick(&sizes, rng).to_le_bytes());
        }
        // A header that changed its length, and says so.
        _ if has_header => {
            let end =
                input.windows(2).position(|pair| pair == b"}}").map_or(input.len(), |end| end + 2);
            input[..8].copy_from_slice(&(end as u64 - 8).to_le_bytes());
        }
        _ => input.extend(b"]}]}"),
    }
}

fn pick<'a, T>(list: &'a [T], rng: &mut StdRng) -> &'a T {
    &list[rng.random_range(0..list.len())]
}

/// Replaces the number after `at` by one at an edge.
fn replace_number(input: &mut Vec<u8>, at: usize, rng: &mut StdRng) {
    const EDGES: [&str; 16] = [
        "0",
        "1",
        "-1",
        "2",
        "3",
        "7",
        "255",
        "65536",
        "4294967295",
        "4294967296",
        "1e308",
        "1e-320",
        "9007199254740993",
        "9223372036854775807",
        "18446744073709551615",
        "18446744073709551616",
    ];
    let Some(start) = input[at..].iter().position(u8::is_ascii_digit).map(|start| at + start)
    else {
        return;
    };
    let length = input[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    input.splice(start..start + length, pick(&EDGES, rng).bytes());
}

/// Runs a reader and checks what it allocated at most.
fn measured<T>(file_bytes: usize, read: impl FnOnce() -> T) -> T {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let result = read();
    let used = ALLOCATOR.peak_usage().saturating_sub(before);
    assert!(used <= allowance(file_bytes), "{used} bytes for files of {file_bytes}");
    result
}

#[test]
fn configurations_are_read_or_refused() {
    let seeds = seeds("config", &["flash_tiny/config.json", "ultra_tiny/config.json"]);
    fuzz("config", "json", &seeds, 60_000, |input| {
        let text = String::from_utf8_lossy(input);
        let Ok(config) = measured(text.len(), || YuanConfig::from_json(&text)) else { return };
        // What is accepted can be used, and written and read again.
        config.validate().unwrap();
        assert!(config.head_dim() > 0 && config.rotary_width() > 0);
        assert!(config.parameter_count().total() > 0);
        assert_eq!(YuanConfig::from_json(&config.to_json()).unwrap(), config);
    });
}

#[test]
fn tensor_files_are_read_or_refused() {
    let temp = TempDir::new().unwrap();
    let path = temp.path().join("input.safetensors");
    let seeds = seeds("safetensors", &["component/rmsnorm.safetensors"]);
    fuzz("safetensors", "safetensors", &seeds, 20_000, |input| {
        fs::write(&path, input).unwrap();
        let Ok(file) = measured(input.len(), || TensorFile::open(&path)) else { return };
        // The format's own reader must not find fault with what we accept.
        let theirs = safetensors::SafeTensors::deserialize(input).unwrap();
        assert_eq!(theirs.len(), file.tensors().len());
        for (name, tensor) in file.tensors() {
            let bytes = measured(input.len(), || file.map(name)).unwrap();
            let expected = theirs.tensor(name).unwrap();
            assert_eq!(
                (tensor.dtype, tensor.shape.as_slice()),
                (expected.dtype(), expected.shape())
            );
            assert_eq!(bytes.as_ref(), expected.data(), "every byte of the file, and none beyond");
        }
    });
}

#[test]
fn checkpoint_directories_are_read_or_refused() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join(FIXTURES).join("ultra_tiny/sharded");
    let files = ["config.json", "model.safetensors.index.json", "model-00002-of-00002.safetensors"];
    for (file, cases) in files.into_iter().zip([2_000, 2_000, 1_500]) {
        let temp = TempDir::new().unwrap();
        let mut size = 0;
        for entry in fs::read_dir(&fixtures).unwrap() {
            let path = entry.unwrap().path();
            let bytes = fs::read(&path).unwrap();
            size += bytes.len();
            fs::write(temp.path().join(path.file_name().unwrap()), bytes).unwrap();
        }
        let seed = fs::read(fixtures.join(file)).unwrap();
        let extension = file.rsplit('.').next().unwrap();
        fuzz("directory", extension, &[seed], cases, |input| {
            fs::write(temp.path().join(file), input).unwrap();
            drop(measured(size + input.len(), || Shards::open_headers(temp.path())));
            let Ok(checkpoint) = measured(size + input.len(), || HfCheckpoint::open(temp.path()))
            else {
                return;
            };
            for source in checkpoint.config().parameter_sources() {
                let data = checkpoint.read(&source, None).unwrap();
                assert_eq!(data.shape()[..], source.parameter_shape());
            }
        });
    }
}
