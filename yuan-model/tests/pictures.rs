//! Image files of every kind against what Pillow 13 makes of them (`fixtures/image_files`, written by
//! `fixtures/make_image_files.py`).

use std::{
    fs,
    path::{Path, PathBuf},
};

use yuan_model::vision::{Picture, PictureError};

fn files() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/image_files")
}

/// Pillow cuts 16-bit grey off at 255, which makes it white; the upper eight bits are kept here.
const SIXTEEN_BITS: [&str; 3] =
    ["png_grey16.png", "png_grey16_adam7.png", "png_grey16_small_values.png"];
/// The first picture is smaller than the canvas, whose rest is black here and of some colour there.
const SMALLER_THAN_CANVAS: [&str; 2] = ["gif_offset_frame.gif", "gif_offset_frame_transparent.gif"];
/// Damaged files that Pillow reads as far as it can, and that are refused here.
const LENIENT: [&str; 4] = [
    "bad_png_idat_crc.png",
    "bad_png_missing_rows.png",
    "edge_png_cut_in_adler.png",
    "edge_png_no_iend.png",
];
/// The other way round: all pixels are there.
const STRICT: [&str; 1] = ["edge_png_bad_adler.png"];

#[test]
fn files_of_every_kind_are_what_pillow_makes_of_them() {
    let bytes = fs::read(files().join("expected.safetensors")).unwrap();
    let expected = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (mut compared, mut refused) = (0, 0);
    for entry in fs::read_dir(files()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if [".py", ".safetensors"].iter().any(|other| name.ends_with(other)) {
            continue;
        }
        let ours = Picture::open(&path);
        let theirs = expected.tensor(name).ok().filter(|_| !LENIENT.contains(&name));
        let (ours, theirs) = match (ours, theirs) {
            (Ok(ours), Some(theirs)) => (ours, theirs),
            (Err(error), None) => {
                let text = error.to_string();
                let is_sentence = text.starts_with(&format!("{}: it ", path.display()));
                assert!(is_sentence && !text.contains('\n'), "{text}");
                refused += 1;
                continue;
            }
            (Ok(_), None) => {
                assert!(STRICT.contains(&name), "{name} is read");
                continue;
            }
            (Err(error), Some(_)) => panic!("{error}"),
        };
        assert_eq!(theirs.shape(), [ours.height(), ours.width(), 3], "{name}");
        assert_eq!(Picture::size_of(&path).unwrap(), [ours.width(), ours.height()], "{name}");
        if SMALLER_THAN_CANVAS.contains(&name) {
            // The same but for the canvas.
            let pairs =
                ours.values().as_chunks::<3>().0.iter().zip(theirs.data().as_chunks::<3>().0);
            assert!(
                pairs.clone().all(|(ours, theirs)| ours == theirs || *ours == [0; 3]),
                "{name}"
            );
            assert!(pairs.filter(|(ours, theirs)| ours == theirs).count() > 20, "{name}");
            continue;
        }
        if SIXTEEN_BITS.contains(&name) {
            continue;
        }
        let differences = ours.values().iter().zip(theirs.data()).map(|(a, b)| a.abs_diff(*b));
        let worst = differences.clone().max().unwrap();
        let mean = differences.map(f64::from).sum::<f64>() / theirs.data().len() as f64;
        // Decoders of JPEG may round otherwise; everything else has one right result.
        let allowed = if name.ends_with(".jpg") { (4, 0.5) } else { (0, 0.0) };
        assert!(worst <= allowed.0 && mean <= allowed.1, "{name}: worst {worst}, mean {mean}");
        compared += 1;
    }
    assert!(compared >= 60 && refused >= 20, "{compared} compared, {refused} refused");
}

#[test]
fn what_is_no_picture_is_a_sentence() {
    let reason = |name: &str| Picture::open(&files().join(name)).unwrap_err().reason;
    assert_eq!(reason("page.png"), "it is no image: expected PNG, JPEG, WebP, GIF, BMP or TIFF");
    assert_eq!(
        reason("bad_png_bomb_60000.png"),
        "it has 60000 x 60000 pixels, more than 178956970: make it smaller"
    );
    // Few bytes, few pixels, and a side so long that resizing would take gigabytes.
    let mut png = fs::read(files().join("bad_png_bomb_60000.png")).unwrap();
    png[16..24].copy_from_slice(&[0, 1, 0, 0, 0, 0, 0, 1]);
    let sum = crc32(&png[12..29]).to_be_bytes();
    png[29..33].copy_from_slice(&sum);
    assert_eq!(
        Picture::size_in(&png).unwrap_err().reason,
        "it has 65536 x 1 pixels, more than 65535 on a side: make it smaller"
    );
    let cut = "it is damaged or cut off: its end is missing";
    assert_eq!(reason("bad_jpeg_truncated_in_scan.jpg"), cut);
    assert_eq!(reason("edge_jpeg_no_eoi.jpg"), cut);
    assert!(reason("absent.png").starts_with("cannot read it: "));
    assert_eq!(Picture::open(&files()).unwrap_err().reason, "it is no file");
    if cfg!(unix) {
        let error: PictureError = Picture::open(Path::new("/dev/zero")).unwrap_err();
        assert_eq!(error.to_string(), "/dev/zero: it is no file");
    }
}

/// The checksum of a part of a PNG file.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |sum: u32| if sum & 1 == 1 { sum >> 1 ^ 0xedb8_8320 } else { sum >> 1 };
    let of = |sum, &byte: &u8| (0..8).fold(sum ^ u32::from(byte), |sum, _| step(sum));
    !bytes.iter().fold(u32::MAX, of)
}

/// What follows the end of a JPEG file, a film for instance, has no say in whether it is whole.
#[test]
fn whatever_follows_a_jpeg_file_is_passed_over() {
    let whole = fs::read(files().join("jpeg_progressive_420.jpg")).unwrap();
    let picture = Picture::decode(&whole).unwrap();
    for more in [&b"\xff\xda film"[..], b"\xff\xd9", b"\xff\xd8\xff\xda"] {
        assert_eq!(Picture::decode(&[&whole[..], more].concat()).unwrap(), picture);
    }
    for length in [whole.len() - 2, whole.len() - 40, whole.len() / 2] {
        assert!(Picture::decode(&whole[..length]).is_err(), "{length} bytes");
    }
}

/// The upper eight bits of 16-bit grey, which is the same in red, green and blue.
#[test]
fn sixteen_bits_become_the_upper_eight() {
    let picture = Picture::open(&files().join("png_grey16_small_values.png")).unwrap();
    // All its values are below 1,024.
    assert!(picture.values().iter().all(|&value| value < 4));
    let picture = Picture::open(&files().join("png_grey16.png")).unwrap();
    let (pixels, _) = picture.values().as_chunks::<3>();
    assert!(pixels.iter().all(|[red, green, blue]| red == green && green == blue));
    let values: std::collections::BTreeSet<u8> = pixels.iter().map(|pixel| pixel[0]).collect();
    assert!(values.len() > 50, "{} greys", values.len());
}

#[test]
fn pages_of_odd_shapes_have_tiles() {
    for (name, tiles) in [("png_20000x3.png", 10), ("png_1x1.png", 1)] {
        let picture = Picture::open(&files().join(name)).unwrap();
        assert_eq!(picture.tiles(28, 9).len(), tiles, "{name}");
    }
}
