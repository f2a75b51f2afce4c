//! Fuzzes the deflate encoder: any bytes, compressed at any level in blocks of any size, are read back by two
//! independent inflaters.

use upperdeck::layer::deflate::{END, Encoder};

/// The first byte selects the level and the number of repetitions of the rest, so that short inputs reach all of a
/// window; the next two give the block size.
pub fn run(input: &[u8]) {
    let Some((&[first, low, high], rest)) = input.split_first_chunk::<3>() else {
        return;
    };
    let level = u32::from(first % 9) + 1;
    let data = rest.repeat(1 << (first / 9 % 5));
    let size = (usize::from(u16::from_le_bytes([low, high])) * 4).max(1 + data.len() / 64);
    let mut encoder = Encoder::new(level);
    let mut packed = Vec::new();
    for block in data.chunks(size) {
        encoder.encode(block, &mut packed);
    }
    packed.extend(END);
    reads_back(&packed, &data, &format!("level {level}"));
}

/// Checks that both inflaters read `packed` to its last byte, and return `data`.
pub fn reads_back(packed: &[u8], data: &[u8], what: &str) {
    let mut out = Vec::with_capacity(data.len() + 1);
    let mut inflater = flate2::Decompress::new(false);
    let status = inflater
        .decompress_vec(packed, &mut out, flate2::FlushDecompress::Finish)
        .expect("zlib-rs reads it");
    assert_eq!(status, flate2::Status::StreamEnd, "zlib-rs, {what}");
    assert_eq!(inflater.total_in(), packed.len() as u64, "all is read");
    assert!(out == data, "zlib-rs, {what}");
    let miniz = miniz_oxide::inflate::decompress_to_vec(packed);
    assert!(miniz.is_ok_and(|m| m == data), "miniz_oxide, {what}");
}
