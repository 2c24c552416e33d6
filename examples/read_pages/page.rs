//! Pages that the program draws itself: a small price list, in the font of the crate `font8x8`.

use font8x8::legacy::BASIC_LEGACY;
use image::{GrayImage, Luma};
use rand::{RngExt, rngs::StdRng, seq::SliceRandom};

/// Pixels of a page's side: six lines of six characters.
pub const SIDE: u32 = 48;
const CHARACTER: u32 = 8;

const GOODS: [&str; 10] = ["TEA", "OIL", "EGG", "JAM", "NUT", "RYE", "HAM", "PIE", "FIG", "SOY"];

/// A list of three prices, and what is asked about it.
pub struct Page {
    pub picture: GrayImage,
    /// All that is written on it.
    pub list: String,
    pub question: String,
    pub answer: String,
}

impl Page {
    /// The next page of a generator.
    pub fn draw(rng: &mut StdRng) -> Self {
        let mut goods: Vec<usize> = (0..GOODS.len()).collect();
        goods.shuffle(rng);
        // Paper and ink differ from page to page.
        let (paper, ink) = (rng.random_range(190..=255), rng.random_range(0..=70));
        let mut picture = GrayImage::from_pixel(SIDE, SIDE, Luma([paper]));
        let (mut prices, mut list) = (Vec::new(), String::new());
        for (&good, line) in goods.iter().zip([0, 2, 4]) {
            let price = rng.random_range(10..100);
            write(&mut picture, line, &format!("{} {price}", GOODS[good]), ink);
            prices.push((GOODS[good], price));
            list += &format!("{} {price}\n", GOODS[good]);
        }
        let (good, price) = prices[rng.random_range(0..prices.len())];
        let question = format!("What does {good} cost?");
        Self { picture, list, question, answer: price.to_string() }
    }
}

/// Writes a line of characters.
fn write(picture: &mut GrayImage, line: u32, text: &str, ink: u8) {
    for (column, character) in text.bytes().enumerate() {
        let rows = BASIC_LEGACY[usize::from(character)];
        for (y, row) in rows.into_iter().enumerate() {
            for x in (0..CHARACTER).filter(|x| row >> x & 1 == 1) {
                let left = column as u32 * CHARACTER;
                picture.put_pixel(left + x, line * CHARACTER + y as u32, Luma([ink]));
            }
        }
    }
}
