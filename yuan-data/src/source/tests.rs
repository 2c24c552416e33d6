use std::{fs, io::Write, path::Path};

use super::*;

fn names(corpus: &Corpus) -> Vec<&str> {
    corpus.documents.iter().map(|document| document.name.as_str()).collect()
}

/// A document of many sizes, with characters of one to four bytes.
fn text(words: usize) -> String {
    let word = |i: usize| format!("{}{}", ["wörd", "token", "漢字", "😀"][i % 4], i * i % 97);
    let words = (0..words).map(word);
    words.enumerate().map(|(i, word)| word + if i % 9 == 8 { "\n" } else { " " }).collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn utf16(text: &str) -> Vec<u8> {
    let units = text.encode_utf16().flat_map(u16::to_le_bytes);
    [0xff, 0xfe].into_iter().chain(units).collect()
}

/// A table of texts, the middle one missing, in groups of two rows.
fn write_table(path: &Path, texts: &[Option<&str>]) {
    use ::parquet::{
        data_type::ByteArrayType,
        file::{properties::WriterProperties, writer::SerializedFileWriter},
        schema::parser::parse_message_type,
    };
    let schema = "message schema { REQUIRED INT32 id; OPTIONAL BYTE_ARRAY text (UTF8); }";
    let schema = std::sync::Arc::new(parse_message_type(schema).unwrap());
    let compression = ::parquet::basic::Compression::SNAPPY;
    let properties = WriterProperties::builder().set_compression(compression).build();
    let file = fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, properties.into()).unwrap();
    for rows in texts.chunks(2) {
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let ids: Vec<i32> = (0..rows.len() as i32).collect();
        column.typed::<::parquet::data_type::Int32Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let levels: Vec<i16> = rows.iter().map(|row| row.is_some().into()).collect();
        let values: Vec<_> = rows.iter().flatten().map(|row| (*row).into()).collect();
        column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}

/// A directory with every kind of file.
fn every_kind(directory: &Path) {
    let write = |name: &str, bytes: &[u8]| fs::write(directory.join(name), bytes).unwrap();
    let long = text(90_000);
    let lines = format!(
        "{{\"text\": \"one\"}}\n\n\"two\"\n{{\"body\": \"three\"}}\n{{\n{}\n",
        serde_json::json!({"text": long, "id": 7})
    );
    write("a.txt", b"\xef\xbb\xbftext");
    write("blank", b" \n");
    write("image", b"\x89PNG\0");
    write("latin1.txt", b"na\xefve");
    write("lines.jsonl", lines.as_bytes());
    write("lines2.jsonl.gz", &[gzip(b"\"first\"\n"), gzip(b"\"second\"")].concat());
    write("long.md", long.as_bytes());
    write("long.txt.zst", &zstd::encode_all(long.as_bytes(), 1).unwrap());
    write("long16.txt", &utf16(&long));
    write("nul.txt", b"a\0b");
    write("table.parquet.gz", &gzip(b"anything"));
    write("utf16.txt", &utf16("naïve"));
    write_table(
        &directory.join("table.parquet"),
        &[Some("row one"), None, Some(&long), Some(" "), Some("row five")],
    );
    write("untrue.parquet", b"PAR1 it is not");
    write("untrue.txt.gz", b"no gzip");
}

#[test]
fn texts_are_read_and_the_rest_is_named() {
    let temp = tempfile::tempdir().unwrap();
    every_kind(temp.path());
    let corpus = Corpus::read(temp.path()).unwrap();
    let expected = [
        "a.txt",
        "lines.jsonl:1",
        "lines.jsonl:3",
        "lines.jsonl:6",
        "lines2.jsonl.gz:1",
        "lines2.jsonl.gz:2",
        "long.md",
        "long.txt.zst",
        "long16.txt",
        "table.parquet:1",
        "table.parquet:3",
        "table.parquet:5",
        "utf16.txt",
    ];
    assert_eq!(names(&corpus), expected);
    let text_of = |name: &str| &corpus.documents[expected.iter().position(|n| *n == name).unwrap()];
    assert_eq!(text_of("a.txt").text, "text");
    assert_eq!(text_of("utf16.txt").text, "naïve");
    assert_eq!(text_of("lines2.jsonl.gz:2").text, "second");
    assert_eq!(text_of("table.parquet:5").text, "row five");
    let long = text(90_000);
    assert!(long.len() > 2 * Part::LONGEST);
    for name in ["lines.jsonl:6", "long.md", "long.txt.zst", "long16.txt", "table.parquet:3"] {
        assert!(text_of(name).text == long, "{name}");
    }
    let summary = corpus.skipped.summary().unwrap();
    let begin = "skipped 7 files: blank (empty), image (neither UTF-8 nor UTF-16), latin1.txt \
                 (neither UTF-8 nor UTF-16), nul.txt (not a text), table.parquet.gz (a .parquet file \
                 is compressed within, not as a whole) and 2 more; left out 4 records: \
                 lines.jsonl (lines without a `text`; the first is line 4), table.parquet (rows \
                 without a `text`; the first is row 2)";
    assert_eq!(summary, begin);
    let error = Corpus::read(&temp.path().join("blank")).unwrap_err().to_string();
    assert!(error.ends_with("blank holds no text: skipped blank (empty)"), "{error}");
    let error = Corpus::read(&temp.path().join("nowhere")).unwrap_err().to_string();
    assert!(error.starts_with("cannot read "), "{error}");
}

#[test]
fn reading_goes_on_from_any_place() {
    let temp = tempfile::tempdir().unwrap();
    every_kind(temp.path());
    let sources = Sources::find(&[temp.path().to_path_buf()], "text").unwrap();
    let mut reading = sources.read_from(Place::default());
    let (mut items, mut places) = (Vec::new(), vec![Place::default()]);
    while let Some(item) = reading.next() {
        // Within a long line or row there is no place to go on at.
        let is_within =
            matches!(&item, Item::Part(part) if !part.is_last && part.name.contains(':'));
        items.push(item);
        places.push(if is_within { *places.last().unwrap() } else { reading.place() });
    }
    assert_eq!(reading.bytes_read(), sources.bytes());
    for (at, &place) in places.iter().enumerate() {
        if at > 0 && places[at - 1] == place {
            continue;
        }
        let rest: Vec<Item> = sources.read_from(place).collect();
        assert!(rest == items[at..], "after {at} items, at {place:?}");
    }
}

#[test]
fn a_column_or_field_can_be_named_and_must_be_there() {
    let temp = tempfile::tempdir().unwrap();
    write_table(&temp.path().join("table.parquet"), &[Some("one")]);
    fs::write(temp.path().join("lines.jsonl"), "{\"body\": \"three\"}").unwrap();
    let read = |field: &str| {
        let sources = Sources::find(&[temp.path().to_path_buf()], field).unwrap();
        let items: Vec<Item> = sources.read_from(Place::default()).collect();
        items
            .into_iter()
            .map(|item| match item {
                Item::Part(part) => part.text,
                Item::Skipped { file, .. } => file.to_string(),
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(read("body"), ["three", "table.parquet (it has no column `body`, but id, text)"]);
    assert_eq!(read("text"), ["lines.jsonl (lines without a `text`; the first is line 1)", "one"]);
    assert_eq!(read("id")[1], "table.parquet (its column `id` holds no texts)");
}

#[test]
fn long_texts_are_cut_between_words() {
    assert_eq!(&"some words\nand more"[..text::cut_at("some words\nand more", 14)], "some words");
    assert_eq!(&"some words and more"[..text::cut_at("some words and more", 12)], "some words");
    // Never within a character, and always a step ahead.
    assert_eq!(text::cut_at("äää", 3), 2);
    assert_eq!(text::cut_at("word", 2), 2);
}

#[cfg(unix)]
#[test]
fn links_are_followed_once() {
    use std::os::unix::fs::symlink;

    let temp = tempfile::tempdir().unwrap();
    let [texts, links] = ["texts", "links"].map(|name| temp.path().join(name));
    fs::create_dir(&texts).unwrap();
    fs::create_dir(&links).unwrap();
    fs::write(texts.join("a.txt"), "text").unwrap();
    fs::write(texts.join("c.txt"), "another").unwrap();
    symlink(texts.join("a.txt"), links.join("b.txt")).unwrap();
    symlink(&texts, links.join("texts")).unwrap();
    symlink(&links, links.join("itself")).unwrap();
    symlink("nowhere", links.join("dangling")).unwrap();
    let corpus = Corpus::read(&links).unwrap();
    assert_eq!(names(&corpus), ["b.txt", "texts/c.txt"]);
    let skipped = "skipped dangling (its link leads nowhere)";
    assert_eq!(corpus.skipped.summary().unwrap(), skipped);
}
