//! Readers of untrusted files, fed with damaged ones: they may refuse, but never panic, never
//! allocate more than the file justifies and never read outside it.
//!
//! What is read, and what must hold, is in `targets.rs`, which `scripts/fuzz.sh` searches by
//! coverage. This changes the files of `tests/corpus` and of the fixtures in the ways in which
//! files break, always the same ones for a seed; `YUAN_FUZZ_CASES` and `YUAN_FUZZ_SEED` make it
//! search longer and elsewhere. What fails is added to the corpus.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    io::Read,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Mutex,
};

use peak_alloc::PeakAlloc;
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use targets::Within;

mod targets;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Where upstream's files are.
const FIXTURES: &str = "yuan-model/tests/fixtures";

/// The allocator counts for the whole process, so one reader is measured at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn number_of(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number"))
    })
}

/// Files to start from: the corpus, and the fixtures that fit.
fn seeds(kind: &str, fixtures: &[&str]) -> Vec<Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let corpus = fs::read_dir(root.join("tests/corpus").join(kind)).into_iter().flatten();
    let corpus = corpus.map(|entry| entry.unwrap().path());
    let corpus = corpus.filter(|path| path.file_name().is_some_and(|name| name != FOUND));
    let mut paths: Vec<PathBuf> =
        corpus.chain(fixtures.iter().map(|file| root.join(FIXTURES).join(file))).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// What a search by coverage found (`scripts/corpus.py`): tried as it is.
fn found(kind: &str) -> Vec<Vec<u8>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(kind).join(FOUND);
    let Ok(packed) = fs::read(path) else { return Vec::new() };
    let (mut data, mut found) = (Vec::new(), Vec::new());
    flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut data).unwrap();
    let mut rest = &data[..];
    while let Some((length, more)) = rest.split_first_chunk() {
        let (input, more) = more.split_at(u32::from_le_bytes(*length) as usize);
        found.push(input.to_vec());
        rest = more;
    }
    found
}

/// Name of the file with them.
const FOUND: &str = "found.gz";

/// Tries every seed as it is, then `cases` changed ones; what fails is written to the corpus.
fn fuzz(kind: &str, extension: &str, fixtures: &[&str], cases: u64, target: fn(&[u8], Within<'_>)) {
    let made = targets::seeds(kind);
    let seeds = &[seeds(kind, fixtures), made].concat()[..];
    let read = |input: &[u8]| target(input, &within);
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let cases = number_of("YUAN_FUZZ_CASES", cases);
    let mut rng = StdRng::seed_from_u64(number_of("YUAN_FUZZ_SEED", 0));
    let try_one = |input: &[u8]| {
        if let Err(cause) = catch_unwind(AssertUnwindSafe(|| read(input))) {
            let mut hash = DefaultHasher::new();
            input.hash(&mut hash);
            let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(kind);
            let path = corpus.join(format!("failed-{:016x}.{extension}", hash.finish()));
            fs::create_dir_all(&corpus).unwrap();
            fs::write(&path, input).unwrap();
            eprintln!("this input fails: {}", path.display());
            std::panic::resume_unwind(cause);
        }
    };
    seeds.iter().chain(&found(kind)).for_each(|seed| try_one(seed));
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

/// Does something and checks what it allocated at most.
fn within(allowed: usize, action: &mut dyn FnMut()) {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    action();
    let used = ALLOCATOR.peak_usage().saturating_sub(before);
    assert!(used <= allowed, "{used} bytes, but only {allowed} are allowed");
}

#[test]
fn configurations_are_read_or_refused() {
    let fixtures = ["flash_tiny/config.json", "ultra_tiny/config.json"];
    fuzz("config", "json", &fixtures, 60_000, targets::config);
}

#[test]
fn tensor_files_are_read_or_refused() {
    let fixtures = ["component/rmsnorm.safetensors"];
    fuzz("safetensors", "safetensors", &fixtures, 20_000, targets::safetensors);
}

#[test]
fn checkpoint_directories_are_read_or_refused() {
    for (kind, file, target, cases) in [
        ("directory-config", "config.json", targets::directory_config as fn(&_, Within<'_>), 2_000),
        ("directory-index", "model.safetensors.index.json", targets::directory_index, 2_000),
        (
            "directory-weights",
            "model-00002-of-00002.safetensors",
            targets::directory_weights,
            1_500,
        ),
    ] {
        let fixture = format!("ultra_tiny/sharded/{file}");
        fuzz(kind, file.rsplit('.').next().unwrap(), &[&fixture], cases, target);
    }
}

#[test]
fn plans_are_read_or_refused() {
    fuzz("plan", "json", &[], 20_000, targets::plan);
}

#[test]
fn loads_are_read_or_refused() {
    fuzz("loads", "json", &[], 20_000, targets::loads);
}

#[test]
fn histories_are_drawn_or_refused() {
    fuzz("history", "jsonl", &[], 1_000, targets::history);
}

#[test]
fn settings_of_runs_are_read_or_refused() {
    fuzz("settings", "json", &[], 20_000, targets::settings);
}

#[test]
fn states_of_checkpoints_are_read_or_refused() {
    fuzz("state", "json", &[], 10_000, targets::state);
}

#[test]
fn indexes_of_checkpoints_are_read_or_refused() {
    fuzz("index", "json", &[], 4_000, targets::index);
}

#[test]
#[cfg(feature = "images")]
fn questions_about_images_are_read_or_refused() {
    fuzz("pages", "tar", &[], 4_000, targets::pages);
}

#[test]
#[cfg(feature = "images")]
fn images_are_read_or_refused() {
    let files = [
        "png_rgb8.png",
        "png_p4_adam7.png",
        "png_rgba16.png",
        "jpeg_progressive_420.jpg",
        "jpeg_ycck_patched.jpg",
        "gif_animated.gif",
        "webp_lossy_rgba.webp",
        "webp_lossless.webp",
        "bmp_p8.bmp",
        "tiff_rgb_lzw.tif",
    ];
    let files = files.map(|name| format!("image_files/{name}"));
    fuzz("picture", "image", &files.each_ref().map(String::as_str), 20_000, targets::picture);
}

#[test]
fn checksums_of_checkpoints_are_read_or_refused() {
    fuzz("checksums", "json", &[], 4_000, targets::checksums);
}

#[test]
fn indexes_of_tokens_are_read_or_refused() {
    fuzz("indexed", "idx", &[], 10_000, targets::indexed);
}

#[test]
fn tables_are_read_or_left_out() {
    fuzz("table", "parquet", &[], 4_000, targets::table);
}

#[test]
fn tokenizers_are_read_or_refused() {
    fuzz("tokenizer", "json", &[], 5_000, targets::tokenizer);
}

#[cfg(feature = "chat")]
#[test]
fn templates_render_or_are_refused() {
    fuzz("template", "jinja", &[], 2_000, targets::template);
}
