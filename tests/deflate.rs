//! Tests of the deflate encoder: its output is read back by two independent inflaters, and is the same on every
//! machine.
//!
//! ```text
//! UPPERDECK_DEFLATE_SECONDS=3600 UPPERDECK_DEFLATE_SEED=7 cargo test --release --test deflate random_inputs
//! UPPERDECK_DEFLATE_FILES=/usr:/srv cargo test --release --test deflate real_files
//! ```
//!
//! The first runs longer than usual, with another seed; the second reads all files below these directories.

/// Also a fuzz target.
#[path = "fuzz/deflate.rs"]
mod fuzzed;

use std::io::Read;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use fuzzed::reads_back;
use proptest::prelude::*;
use upperdeck::common::digest::Digest;
use upperdeck::layer::deflate::{END, Encoder, store};

const LEVELS: RangeInclusive<u32> = 1..=9;
const BLOCK: usize = 1 << 20;

/// The splitmix64 generator.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, most: u64) -> usize {
        (self.next() % most.max(1)) as usize
    }

    fn noise(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }

    /// Returns `len` bytes of random data, few symbols, runs, repeats of earlier data, and bytes of uneven frequency.
    fn mixture(&mut self, len: usize) -> Vec<u8> {
        let mut data = Vec::with_capacity(len + (64 << 10));
        let alphabet = 1 + self.below(256) as u64;
        while data.len() < len {
            let most = 1 << (1 + self.below(15));
            let count = 1 + self.below(most);
            match self.below(6) {
                0 => data.extend(self.noise(count)),
                1 => data.extend((0..count).map(|_| self.below(alphabet) as u8)),
                2 => data.extend(std::iter::repeat_n(self.next() as u8, count)),
                3 | 4 if !data.is_empty() => {
                    let back = 1 + self.below((data.len() as u64).min(33_000));
                    let from = data.len() - back;
                    for at in from..from + count.min(600) {
                        data.push(data[at]);
                    }
                }
                _ => {
                    data.extend(
                        (0..count).map(|_| (self.next() & self.next() & self.next()) as u8),
                    );
                }
            }
        }
        data.truncate(len);
        data
    }
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    Random(seed).noise(len)
}

/// Compresses `data` in blocks of `size` bytes.
fn packed(encoder: &mut Encoder, data: &[u8], size: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for block in data.chunks(size) {
        let before = out.len();
        encoder.encode(block, &mut out);
        let most = block.len() + 10 * block.len().div_ceil(36 << 10) + 16;
        assert!(out.len() - before <= most, "hardly larger than stored");
    }
    out.extend(END);
    out
}

/// Compresses at every level and reads back; a used encoder produces the same output as a new one.
fn round_trip(data: &[u8], size: usize) {
    for level in LEVELS {
        let mut encoder = Encoder::new(level);
        let out = packed(&mut encoder, data, size);
        reads_back(&out, data, &format!("level {level}"));
        let first = &data[..data.len().min(size)];
        let again = packed(&mut encoder, first, size);
        let anew = packed(&mut Encoder::new(level), first, size);
        assert!(again == anew, "level {level} depends on what was before");
    }
}

#[test]
fn nothing_is_nothing() {
    for level in LEVELS {
        let mut out = vec![7];
        Encoder::new(level).encode(&[], &mut out);
        assert_eq!(out, [7]);
    }
    round_trip(&[], BLOCK);
}

#[test]
fn stored_is_read_back() {
    let data = noise(200_000, 3);
    let mut out = Vec::new();
    store(&data, &mut out);
    assert_eq!(out.len(), data.len() + 4 * 5);
    out.extend(END);
    reads_back(&out, &data, "stored");
}

#[test]
fn every_small_size() {
    let random = noise(700, 1);
    let text: Vec<u8> = b"abcabcabd".iter().copied().cycle().take(700).collect();
    for len in (0..40).chain((40..=700).step_by(61)).chain(255..262) {
        round_trip(&random[..len], BLOCK);
        round_trip(&text[..len], BLOCK);
        round_trip(&vec![0; len], BLOCK);
        round_trip(&text[..len], 100);
    }
}

/// In noise, positions are passed without a look; what follows it is compressed all the same.
#[test]
fn what_repeats_after_noise_is_found() {
    let noise = noise(300_000, 11);
    let text = b"what repeats after noise is found: ".repeat(2000);
    let both = [noise.as_slice(), &text].concat();
    for level in LEVELS {
        let mut encoder = Encoder::new(level);
        let alone = packed(&mut encoder, &text, 4 * BLOCK).len();
        let out = packed(&mut encoder, &both, 4 * BLOCK);
        reads_back(&out, &both, &format!("level {level}"));
        let most = noise.len() + alone + 2000;
        assert!(out.len() < most, "level {level}: {} {most}", out.len());
    }
}

/// Sizes close to the limits of windows, halves, segments and stored blocks.
#[test]
fn sizes_about_the_limits() {
    let mixed = Random(5).mixture((1 << 20) + 64);
    for limit in [64 << 10, (64 << 10) + 320, 128 << 10] {
        for off in [-17i32, -16, -4, -1, 0, 1, 8, 16, 17] {
            let len = (limit + off) as usize;
            round_trip(&mixed[..len], 4 * BLOCK);
            round_trip(&vec![b'x'; len], 4 * BLOCK);
        }
    }
    // The segments of one call may refer to earlier segments.
    for len in [BLOCK - 1, BLOCK + 1, BLOCK + 33] {
        round_trip(&mixed[..len], 4 * BLOCK);
    }
    round_trip(&noise(BLOCK + 70_000, 5), 4 * BLOCK);
    round_trip(&mixed[..300_000], 70_001);
}

/// The largest distances, and those just beyond.
#[test]
fn repeats_about_the_window() {
    for period in [
        1, 2, 3, 4, 5, 8, 16, 257, 258, 259, 32767, 32768, 32769, 65535, 65537,
    ] {
        let once = noise(period, period as u64 + 9);
        let data: Vec<u8> = once.iter().copied().cycle().take(140_000).collect();
        round_trip(&data, BLOCK);
    }
}

/// Matches of given lengths between random data.
#[test]
fn lengths_about_the_limits() {
    let random = noise(40_000, 11);
    for length in [3, 4, 5, 19, 20, 21, 27, 28, 29, 256, 257, 258, 259, 517] {
        let mut data = random[..1000].to_vec();
        for piece in random[1000..].chunks(9) {
            data.extend(piece);
            let from = data.len() - 900;
            data.extend_from_within(from..from + length);
        }
        data.truncate(80_000);
        round_trip(&data, BLOCK);
    }
}

/// Frequencies whose optimal code would exceed the maximum code length of the format.
#[test]
fn frequencies_that_grow_like_fibonacci() {
    let mut data = Vec::new();
    let (mut a, mut b) = (1usize, 1usize);
    for symbol in 0..25u8 {
        data.extend(std::iter::repeat_n(symbol.wrapping_mul(37), a));
        (a, b) = (b, a + b);
    }
    // Shuffled, so that there are hardly any matches.
    let mut random = Random(77);
    for index in 1..data.len() {
        let other = random.below(index as u64 + 1);
        data.swap(index, other);
    }
    round_trip(&data, BLOCK);
    round_trip(&data[..60_000], BLOCK);
}

#[test]
fn two_symbols() {
    for bias in [2, 10, 200] {
        let symbol = |&b: &u8| u8::from(u64::from(b) % bias == 0);
        let data: Vec<u8> = noise(150_000, bias).iter().map(symbol).collect();
        round_trip(&data, BLOCK);
    }
}

/// The compressed bytes are part of what a save guarantees: the same from any build on any machine. A change of them is
/// either intended or a defect.
#[test]
fn the_bytes_of_each_level_are_known() {
    const GOLDEN: [&str; 9] = [
        "sha256:8e7a2433e9ddf3bad895cc17ee4b8daea609a53d6e933c5cda9d04e7b31de76a",
        "sha256:8a539047c0c4ffc1ac072edaad087de022aa43a35d2591ee8601283e710034dd",
        "sha256:1d28ecfc4e25a3fd00b219de42415d5d5aaaf92b5298dd08e1b9001e71e28366",
        "sha256:7a073fe021399dd3970ddeeadf0b6f075922686c3d3a18eaeb66abb291b87f41",
        "sha256:b42d234298098dc2c1f2cb521ad2bfbfe83924665043898159bd9b808281f13e",
        "sha256:2c437d7932cc9f1cd68dd96cdbeb4ddf3074e283fb7f67f5b1fa61c4d2994c3c",
        "sha256:d279837834813fc135da7067c19a34cb5f6ef6581c5166bc4e563caa6f81901f",
        "sha256:84a10db08ab4089388074b9a2bcaffaaf79ecb868c6e47626aaa3783d54a9d8e",
        "sha256:2703a06b29da3e48f1f97d285ce43303ec528e12457a36f664a407970ba55321",
    ];
    let mut data = Random(17).mixture(BLOCK + 300_000);
    data.extend(noise(200_000, 18));
    data.extend(
        "def upperdeck(saves): return saves[-1]\n"
            .repeat(2000)
            .bytes(),
    );
    let digest = |level: u32| Digest::of(packed(&mut Encoder::new(level), &data, 4 * BLOCK));
    let digests: Vec<String> = LEVELS.map(|level| digest(level).to_string()).collect();
    assert_eq!(digests, GOLDEN);
}

#[test]
fn other_levels_are_taken_for_the_nearest() {
    let data = Random(4).mixture(100_000);
    let of = |level| packed(&mut Encoder::new(level), &data, BLOCK);
    assert!(of(0) == of(1) && of(10) == of(9) && of(u32::MAX) == of(9));
}

#[test]
fn random_inputs() {
    let number = |name| -> Option<u64> { std::env::var(name).ok()?.parse().ok() };
    let seconds = number("UPPERDECK_DEFLATE_SECONDS");
    let mut random = Random(number("UPPERDECK_DEFLATE_SEED").unwrap_or(1));
    let until = Instant::now() + Duration::from_secs(seconds.unwrap_or(0));
    // Without a time limit, a fixed number of inputs: the coverage does not depend on the load of the machine.
    let least = if seconds.is_some() { 1 } else { 40 };
    let largest = if seconds.is_some() { 22 } else { 18 };
    let mut encoders: Vec<_> = LEVELS.map(Encoder::new).collect();
    let (mut inputs, mut total) = (0, 0);
    while inputs < least || Instant::now() < until {
        let shift = random.below(largest);
        let len = random.below(1 << shift);
        let data = random.mixture(len);
        let shift = random.below(10) + 12;
        let size = (1 + random.below(1 << shift)).max(data.len() / 50);
        for (level, encoder) in LEVELS.zip(&mut encoders) {
            if level <= 6 || data.len() < 100_000 {
                let out = packed(encoder, &data, size);
                reads_back(&out, &data, &format!("level {level}, input {inputs}"));
                total += data.len();
            }
        }
        inputs += 1;
    }
    println!("{inputs} inputs, {total} bytes held");
}

/// Programs and text, as found in saves: each MiB at every level.
#[test]
fn real_files() -> Result<(), Box<dyn std::error::Error>> {
    let given = std::env::var_os("UPPERDECK_DEFLATE_FILES");
    let most = if given.is_some() { u64::MAX } else { 300_000 };
    let roots: Vec<PathBuf> = match &given {
        Some(given) => std::env::split_paths(given).collect(),
        None => vec![
            std::env::current_exe()?,
            "README.md".into(),
            "src/layer".into(),
        ],
    };
    let mut encoders: Vec<_> = LEVELS.map(Encoder::new).collect();
    let mut total = 0;
    for entry in roots.iter().flat_map(walkdir::WalkDir::new) {
        let entry = entry?;
        if !entry.file_type().is_file() {
            continue;
        }
        let mut file = std::fs::File::open(entry.path())?.take(most);
        let mut data = Vec::with_capacity(BLOCK);
        while file.by_ref().take(BLOCK as u64).read_to_end(&mut data)? > 0 {
            for (level, encoder) in LEVELS.zip(&mut encoders) {
                let what = format!("level {level}, {}", entry.path().display());
                reads_back(&packed(encoder, &data, BLOCK), &data, &what);
                total += data.len();
            }
            data.clear();
        }
    }
    assert!(total > 0);
    println!("{total} bytes held");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn any_bytes(data in prop::collection::vec(any::<u8>(), 0..3000), size in 1usize..4000) {
        round_trip(&data, size);
    }

    #[test]
    fn any_input_of_the_fuzzing(data in prop::collection::vec(any::<u8>(), 0..3000)) {
        fuzzed::run(&data);
    }
}
