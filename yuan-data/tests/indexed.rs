//! Token files against those that megatron-core wrote (`fixtures/megatron_indexed`, or the
//! directories of the same layout below `YUAN_REFERENCE`).

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use yuan_data::{TokenFile, TokenType, TokenWriter};

/// The directory of files that megatron-core wrote.
fn reference() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    std::env::var_os("YUAN_REFERENCE").map_or(own, PathBuf::from).join("megatron_indexed")
}

fn numbers(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|number| number.as_u64().unwrap() as u32).collect()
}

/// Name, type and documents of every file.
fn contents() -> Vec<(String, TokenType, Vec<Vec<Vec<u32>>>)> {
    let text = fs::read_to_string(reference().join("contents.json")).unwrap();
    let contents: Value = serde_json::from_str(&text).unwrap();
    let of = |(name, file): (&String, &Value)| {
        let kind = match file["dtype"].as_str().unwrap() {
            "u16" => TokenType::U16,
            "i32" => TokenType::I32,
            other => panic!("tokens of type {other}"),
        };
        let documents = file["documents"].as_array().unwrap().iter();
        let documents =
            documents.map(|document| document.as_array().unwrap().iter().map(numbers).collect());
        (name.clone(), kind, documents.collect())
    };
    contents.as_object().unwrap().iter().map(of).collect()
}

fn write(name: &Path, kind: TokenType, documents: &[Vec<Vec<u32>>]) {
    let mut writer = TokenWriter::create(name, kind).unwrap();
    for document in documents {
        for (at, sequence) in document.iter().enumerate() {
            writer.push(sequence).unwrap();
            if at + 1 < document.len() {
                writer.end_sequence().unwrap();
            }
        }
        writer.end_document().unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn files_of_megatron_are_read_and_written_byte_for_byte() {
    let temp = tempfile::tempdir().unwrap();
    for (name, kind, documents) in contents() {
        let file = TokenFile::open(&reference().join(&name)).unwrap();
        assert_eq!((file.token_type(), file.num_documents()), (kind, documents.len()));
        for (number, document) in documents.iter().enumerate() {
            let read: Vec<Vec<u32>> = file
                .document(number)
                .unwrap()
                .map(|sequence| {
                    let range = file.sequence(sequence).unwrap();
                    file.read(range.start, (range.end - range.start) as usize).unwrap()
                })
                .collect();
            assert_eq!(&read, document, "document {number} of {name}");
        }
        let all: Vec<u32> = documents.concat().concat();
        assert_eq!(file.read(0, all.len()).unwrap(), all, "all documents in a row");

        write(&temp.path().join(&name), kind, &documents);
        for ending in ["bin", "idx"] {
            let theirs = fs::read(reference().join(&name).with_extension(ending)).unwrap();
            let written = fs::read(temp.path().join(&name).with_extension(ending)).unwrap();
            assert!(written == theirs, "{name}.{ending}");
        }
    }
}

/// Runs where `YUAN_MEGATRON` names a Python with `numpy` and megatron-core, as in CI.
#[test]
fn megatron_reads_what_is_written() {
    let Some(python) = std::env::var_os("YUAN_MEGATRON") else {
        eprintln!("not run: YUAN_MEGATRON names no Python with megatron-core");
        return;
    };
    let temp = tempfile::tempdir().unwrap();
    let wide: Vec<u32> = (0..300).map(|i| i * 7_000_003 % 2_147_483_647).collect();
    for (kind, last) in [(TokenType::U16, vec![60_000; 300]), (TokenType::I32, wide)] {
        let documents = vec![vec![vec![1, 2, 3], vec![4]], vec![last], vec![vec![5], vec![6, 7]]];
        let name = temp.path().join(format!("{kind:?}"));
        write(&name, kind, &documents);
        let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/read_with_megatron.py");
        let output = Command::new(&python).arg(program).arg(&name).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        let read: Vec<Vec<Vec<u32>>> = serde_json::from_str(text.trim()).unwrap();
        assert_eq!(read, documents);
    }
}

#[test]
fn damaged_files_are_refused_by_name() {
    let temp = tempfile::tempdir().unwrap();
    let name = temp.path().join("tokens");
    let documents = vec![vec![vec![1, 2, 3]], vec![vec![4, 5]]];
    let whole = || write(&name, TokenType::U16, &documents);
    let [bin, idx] = ["bin", "idx"].map(|ending| name.with_extension(ending));
    let refused = |path: &Path, reason: &str| {
        let error = TokenFile::open(&name).unwrap_err().to_string();
        assert_eq!(error, format!("{}: {reason}", path.display()));
    };
    whole();
    fs::write(&bin, [0; 8]).unwrap();
    refused(&bin, "it has 8 bytes, but the index ends at 10: one was cut");
    whole();
    let index = fs::read(&idx).unwrap();
    fs::write(&idx, &index[..index.len() - 1]).unwrap();
    let cut = "it has 81 bytes, which 2 sequences of 2 documents do not take: it was cut, or is still \
               being written";
    refused(&idx, cut);
    fs::write(&idx, b"something else that is longer than a header").unwrap();
    refused(&idx, "it is no index of tokens (Megatron's MMIDIDX)");
    let changed = |at: usize, byte: u8| {
        let mut index = index.clone();
        index[at] = byte;
        fs::write(&idx, index).unwrap();
    };
    changed(9, 2);
    refused(&idx, "version 2 is not known, only 1");
    changed(17, 7);
    refused(&idx, "its tokens are of type 7, no integer");
    // Impossible numbers of sequences.
    changed(25, 0xff);
    assert!(TokenFile::open(&name).is_err());
    // Inside, a damage is found where it is read.
    changed(34, 200);
    let file = TokenFile::open(&name).unwrap();
    assert!(
        file.sequence(0)
            .unwrap_err()
            .to_string()
            .ends_with("sequence 0 lies outside of the tokens")
    );
    fs::write(&idx, &index).unwrap();
    let file = TokenFile::open(&name).unwrap().with_vocabulary(5);
    assert_eq!(file.read(0, 4).unwrap(), [1, 2, 3, 4]);
    let error = file.read(3, 2).unwrap_err().to_string();
    assert!(error.contains("it holds the token 5, but the model has only 5"), "{error}");
}
