//! The gzip codec alone, one core, beside zlib-rs: `cargo bench --bench deflate -- FILE [--rounds N] [--stride N]
//! [ENCODER...]` compresses every Nth MiB of a file, each on its own, with the encoders in turn, and prints medians of
//! processor seconds as a table; speed and size are those of the first encoder. `o1` to `o9` are the levels of this
//! encoder, `z1` to `z9` those of zlib-rs. Figures and what they mean: benches/README.md.
// A measurement ends where it cannot measure.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

use flate2::{Compress, FlushCompress};
use upperdeck::bench::clock;
use upperdeck::layer::deflate::Encoder;

const BLOCK: usize = 1 << 20;

struct Arguments {
    file: String,
    rounds: usize,
    stride: usize,
    encoders: Vec<String>,
}

/// `None` without a file: nothing to measure.
fn arguments() -> Option<Arguments> {
    // Cargo adds `--bench` by itself.
    let mut given = std::env::args().skip(1).filter(|a| a != "--bench");
    let mut arguments = Arguments {
        file: given.next()?,
        rounds: 5,
        stride: 1,
        encoders: Vec::new(),
    };
    while let Some(argument) = given.next() {
        let mut number = || given.next().unwrap().parse().unwrap();
        match argument.as_str() {
            "--rounds" => arguments.rounds = number(),
            "--stride" => arguments.stride = number(),
            _ => arguments.encoders.push(argument),
        }
    }
    if arguments.encoders.is_empty() {
        let all = "z3 z1 z6 o1 o2 o3 o4 o5 o6 o7 o8 o9";
        arguments.encoders = all.split(' ').map(str::to_owned).collect();
    }
    Some(arguments)
}

/// Compresses all blocks; what comes out, in bytes.
fn compress(name: &str, blocks: &[&[u8]]) -> usize {
    let mut out = Vec::with_capacity(2 * BLOCK);
    let level = name[1..].parse().unwrap();
    let mut size = 0;
    match &name[..1] {
        "z" => {
            let mut zlib = Compress::new(flate2::Compression::new(level), false);
            for block in blocks {
                zlib.reset();
                out.clear();
                zlib.compress_vec(block, &mut out, FlushCompress::Sync)
                    .unwrap();
                size += out.len();
            }
        }
        "o" => {
            let mut encoder = Encoder::new(level);
            for block in blocks {
                out.clear();
                encoder.encode(block, &mut out);
                size += out.len();
            }
        }
        _ => panic!("{name}: o1 to o9, z1 to z9"),
    }
    size
}

fn main() {
    let Some(arguments) = arguments() else {
        println!("no file: cargo bench --bench deflate -- FILE");
        return;
    };
    let data = std::fs::read(&arguments.file).unwrap();
    let blocks: Vec<&[u8]> = data.chunks(BLOCK).step_by(arguments.stride).collect();
    let total: usize = blocks.iter().map(|block| block.len()).sum();
    let encoders = &arguments.encoders;
    let mut times = vec![Vec::new(); encoders.len()];
    let mut sizes = vec![0; encoders.len()];
    for _ in 0..arguments.rounds {
        for ((name, times), size) in encoders.iter().zip(&mut times).zip(&mut sizes) {
            let before = clock::thread_cpu_seconds();
            *size = compress(name, &blocks);
            times.push(clock::thread_cpu_seconds() - before);
        }
    }
    let medians: Vec<f64> = times.iter().map(|times| clock::median(times)).collect();
    println!("| encoder | of the tar | MB/s | speed | size |\n| --- | ---: | ---: | ---: | ---: |");
    for ((name, seconds), size) in encoders.iter().zip(&medians).zip(&sizes) {
        println!(
            "| {name} | {:.1} % | {:.0} | {:.2} | {:.3} |",
            100.0 * *size as f64 / total as f64,
            total as f64 / 1e6 / seconds,
            medians[0] / seconds,
            *size as f64 / sizes[0] as f64,
        );
    }
}
