//! The stages of a save for `cargo bench`, by the functions that `upperdeck bench` measures: to see what a change of the
//! code does to one of them. What a node can do, and how near a save comes to it, `upperdeck bench` says.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use tokio_util::sync::CancellationToken;
use upperdeck::bench::stages::{self, Sample, SaveOptions, Setting, Sink, Source};
use upperdeck::bench::tree::Tree;
use upperdeck::layer::{Compression, Plan};
use upperdeck::save::{Rules, cores};

/// Bytes of the generated tree: large enough that no figure is one of starting threads.
const TREE: u64 = 64 << 20;

struct Stage {
    tree: Tree,
    source: Source,
    plan: Plan,
    sample: Sample,
}

/// Made once, before anything is measured.
fn stage() -> &'static Stage {
    static STAGE: OnceLock<Stage> = OnceLock::new();
    STAGE.get_or_init(|| {
        let cancel = CancellationToken::new();
        let made = || -> Result<Stage, upperdeck::bench::Error> {
            let tree = Tree::generate(&std::env::temp_dir(), TREE, &cancel, &|_| ())?;
            let source = Source::Directory(tree.path().to_owned());
            let scan = source.scan(&Rules::default(), cores(), &cancel)?;
            let plan = Plan::new(Arc::new(scan), None);
            let sample = Sample::new(&plan, TREE / 4, &cancel)?;
            Ok(Stage {
                tree,
                source,
                plan,
                sample,
            })
        };
        made().expect("a generated tree")
    })
}

/// 1, 2, 4, ... and all cores.
fn threads() -> Vec<usize> {
    let mut threads: Vec<usize> = std::iter::successors(Some(1), |n| Some(2 * n))
        .take_while(|&n| n < cores())
        .collect();
    threads.push(cores());
    threads
}

/// Codec and level, by threads.
fn settings() -> Vec<(Compression, u32, usize)> {
    let codecs = [
        (Compression::Gzip, 1),
        (Compression::Gzip, 2),
        (Compression::Zstd, 1),
        (Compression::Zstd, 2),
    ];
    let with_threads = |(codec, level)| {
        threads()
            .into_iter()
            .map(move |threads| (codec, level, threads))
    };
    codecs.into_iter().flat_map(with_threads).collect()
}

#[divan::bench]
fn scan(bencher: Bencher) {
    let stage = stage();
    bencher
        .counter(ItemsCount::new(stage.plan.len()))
        .bench(|| {
            stage
                .source
                .scan(&Rules::default(), cores(), &CancellationToken::new())
                .expect("a scan")
        });
}

#[divan::bench]
fn plan(bencher: Bencher) {
    let stage = stage();
    let scan = stage
        .source
        .scan(&Rules::default(), cores(), &CancellationToken::new())
        .expect("a scan");
    let scan = Arc::new(scan);
    bencher
        .counter(ItemsCount::new(stage.plan.len()))
        .bench(|| Plan::new(Arc::clone(&scan), None));
}

#[divan::bench(args = threads(), sample_count = 20)]
fn read(bencher: Bencher, threads: usize) {
    let stage = stage();
    bencher
        .counter(BytesCount::new(stage.plan.tar_size()))
        .bench(|| stages::read(&stage.plan, threads, &CancellationToken::new()).expect("a read"));
}

#[divan::bench(sample_count = 20)]
fn sha256(bencher: Bencher) {
    let stage = stage();
    bencher
        .counter(BytesCount::new(stage.sample.bytes()))
        .bench(|| stage.sample.hash());
}

#[divan::bench(args = settings(), sample_count = 10)]
fn compress(bencher: Bencher, (codec, level, threads): (Compression, u32, usize)) {
    let stage = stage();
    let setting = Setting { codec, level };
    // Several turns where there are many threads: what went in is counted.
    let once = stage
        .sample
        .compress(setting, threads, &CancellationToken::new())
        .expect("a codec");
    bencher.counter(BytesCount::new(once.bytes_in)).bench(|| {
        stage
            .sample
            .compress(setting, threads, &CancellationToken::new())
            .expect("a codec")
    });
}

#[divan::bench(args = ["gzip", "zstd", "none"], sample_count = 10)]
fn save(bencher: Bencher, codec: &str) {
    let stage = stage();
    let codec = match codec {
        "gzip" => Compression::Gzip,
        "zstd" => Compression::Zstd,
        _ => Compression::None,
    };
    let rules = Rules::default();
    let how = SaveOptions {
        rules: &rules,
        setting: Setting {
            codec,
            level: codec.default_level(),
        },
        jobs: cores(),
        timestamp: None,
        layer_size: None,
    };
    bencher
        .counter(BytesCount::new(stage.plan.tar_size()))
        .bench(|| {
            let saved = stages::save(
                &stage.source,
                how,
                &Sink::Nothing,
                &CancellationToken::new(),
            );
            black_box(saved.expect("a save"))
        });
}

fn main() {
    divan::main();
    // A static is never dropped, and the tree is not to stay.
    let root: &Path = stage().tree.path();
    if let Some(made) = root.parent() {
        let _ = std::fs::remove_dir_all(made);
    }
}
