//! The stages of a save, each alone, by the functions that the save itself is made of: what `upperdeck bench` and
//! `cargo bench` measure.

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::Error;
use super::clock::{self, Clock, Spent};
use crate::cancel::Cancel;
use crate::commit::{self, Rules};
use crate::container::Container;
use crate::destination;
use crate::layer::ahead::Ahead;
use crate::layer::block::{self, Scratch};
use crate::layer::codec::Codec;
use crate::layer::stream::BLOCK;
use crate::layer::{self, Compression, Layer, Part, Plan};
use crate::overlay::xattr::Namespace;
use crate::registry::{Repository, Writer};
use crate::scan::{self, Kind, Scan};

/// A codec at a level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Setting {
    /// Which.
    pub codec: Compression,
    /// Within [`Compression::levels`].
    pub level: u32,
}

/// What is saved.
#[derive(Clone, Debug)]
pub enum Source {
    /// A container's upper directory, as a save sees it.
    Container(Box<Container>),
    /// A directory, as it is.
    Directory(PathBuf),
}

impl Source {
    /// The first stage: the walk, on `jobs` threads.
    pub fn scan(&self, rules: &Rules, jobs: usize, cancel: &Cancel) -> Result<Scan, Error> {
        match self {
            Self::Container(container) => Ok(rules.scan(container, &[], None, jobs, cancel)?),
            Self::Directory(directory) => {
                let roots = scan::Roots {
                    upper: directory
                        .canonicalize()
                        .unwrap_or_else(|_| directory.clone()),
                    lowers: Vec::new(),
                    data_only: Vec::new(),
                    id_mapped: Vec::new(),
                    lowers_known: false,
                    // Only root can read `trusted.*`, and a plain directory has none.
                    namespace: if rustix::process::geteuid().is_root() {
                        Namespace::Trusted
                    } else {
                        Namespace::User
                    },
                    volume: None,
                };
                let exclusions = rules.exclusions(&[]).map_err(commit::Error::from)?;
                let options = scan::Options {
                    jobs,
                    uid_map: &[],
                    gid_map: &[],
                    exclusions: &exclusions,
                    caps: rules.caps,
                    runtime_root_mode: None,
                    cancel: cancel.flag(),
                };
                Ok(Scan::new(&roots, &options).map_err(commit::Error::from)?)
            }
        }
    }
}

/// Lets `threads` workers, each with a state of its own, take numbers below `count` until there are no more; gives what
/// `done` makes of each state.
fn side_by_side<S, T: Send>(
    threads: usize,
    count: u64,
    cancel: &Cancel,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, u64) -> Result<(), commit::Error> + Sync,
    done: impl Fn(S) -> T + Sync,
) -> Result<Vec<T>, Error> {
    let next = AtomicU64::new(0);
    let one = || {
        let mut state = state();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return Ok(done(state));
            }
            cancel.check()?;
            work(&mut state, number)?;
        }
    };
    thread::scope(|scope| {
        let start = |_| thread::Builder::new().spawn_scoped(scope, one);
        let workers = (0..threads.max(1))
            .map(start)
            .collect::<Result<Vec<_>, _>>();
        workers
            .map_err(|error| commit::Error::Layer(crate::layer::Error::Thread(error)))?
            .into_iter()
            .map(|worker| worker.join().map_err(|_| commit::Error::Worker)?)
            .collect()
    })
}

fn blocks(plan: &Plan) -> u64 {
    plan.tar_size().div_ceil(BLOCK)
}

/// Makes block `number` of the tar into `tar`.
fn fill(
    ahead: &Ahead<'_>,
    number: u64,
    tar: &mut Vec<u8>,
    scratch: &mut Scratch,
) -> Result<(), commit::Error> {
    // A container goes on while it is measured: what changes under it does not matter here.
    let mut unstable = Vec::new();
    let (start, end) = (number * BLOCK, (number + 1) * BLOCK);
    block::fill(ahead, start, end, tar, scratch, &mut unstable)
        .map_err(|error| layer::Error::from(error).into())
}

/// Reads every file once and leaves it in the page cache, as a save would not: the rounds are to be alike.
pub fn read_first(plan: &Plan, threads: usize, cancel: &Cancel) -> Result<Spent, Error> {
    let scan = plan.scan();
    let clock = Clock::start();
    side_by_side(
        threads,
        scan.len() as u64,
        cancel,
        || vec![0_u8; 1 << 20],
        |buffer, number| {
            let entry = &scan.entry(number as u32);
            let path = scan.path(number as u32);
            let (root, path, ino) = match scan.elsewhere(entry) {
                Some(place) => (place.root, &place.path, place.ino),
                None => (0, &path, entry.ino),
            };
            if entry.kind != Kind::File || entry.size == 0 {
                return Ok(());
            }
            // What is gone or cannot be read, the stages that count will say.
            let Ok(Some(file)) = scan.root(root).open_file(path, ino) else {
                return Ok(());
            };
            let mut at = 0;
            while at < entry.size && !cancel.is_cancelled() {
                match rustix::io::pread(&file, &mut buffer[..], at) {
                    Ok(0) | Err(_) => break,
                    Ok(n) => at += n as u64,
                }
            }
            Ok(())
        },
        drop,
    )?;
    Ok(clock.spent())
}

/// Plan to tar bytes: files are read, headers written, nothing is hashed or compressed.
pub fn read(plan: &Plan, threads: usize, cancel: &Cancel) -> Result<Spent, Error> {
    let ahead = Ahead::new(plan);
    let clock = Clock::start();
    side_by_side(
        threads,
        blocks(plan),
        cancel,
        || (Vec::new(), Scratch::default()),
        |(tar, scratch), number| fill(&ahead, number, tar, scratch),
        drop,
    )?;
    Ok(clock.spent())
}

/// What the workers of a save do, and each part of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Made {
    /// All of it.
    pub spent: Spent,
    /// Processor seconds of reading.
    pub read: f64,
    /// Processor seconds of the checksum.
    pub checksum: f64,
    /// Processor seconds of the codec.
    pub compress: f64,
    /// Bytes that came out.
    pub bytes: u64,
}

/// The workers' part of a save, without the thread that hashes and hands on: read, checksum, compress.
pub fn make(plan: &Plan, setting: Setting, threads: usize, cancel: &Cancel) -> Result<Made, Error> {
    struct Worker {
        codec: Codec,
        tar: Vec<u8>,
        scratch: Scratch,
        made: Made,
    }
    let ahead = Ahead::new(plan);
    let clock = Clock::start();
    let parts = side_by_side(
        threads,
        blocks(plan),
        cancel,
        || Worker {
            codec: Codec::new(setting.codec, setting.level),
            tar: Vec::new(),
            scratch: Scratch::default(),
            made: Made::default(),
        },
        |worker, number| {
            let begun = clock::of_thread();
            fill(&ahead, number, &mut worker.tar, &mut worker.scratch)?;
            let read = clock::of_thread();
            if setting.codec == Compression::Gzip {
                std::hint::black_box(crc32fast::hash(&worker.tar));
            }
            let summed = clock::of_thread();
            let bytes = compressed_size(&mut worker.codec, &worker.tar);
            let made = &mut worker.made;
            made.read += read - begun;
            made.checksum += summed - read;
            made.compress += clock::of_thread() - summed;
            made.bytes += bytes;
            Ok(())
        },
        |worker| worker.made,
    )?;
    let spent = clock.spent();
    Ok(parts.iter().fold(
        Made {
            spent,
            ..Made::default()
        },
        |sum, part| Made {
            read: sum.read + part.read,
            checksum: sum.checksum + part.checksum,
            compress: sum.compress + part.compress,
            bytes: sum.bytes + part.bytes,
            ..sum
        },
    ))
}

fn compressed_size(codec: &mut Codec, tar: &[u8]) -> u64 {
    let compressed = codec.compress(tar);
    compressed.map_or(tar.len(), |bytes| bytes.len()) as u64
}

/// Some of a tar's blocks in memory, evenly from all of it.
pub struct Sample {
    blocks: Vec<Vec<u8>>,
    bytes: u64,
}

impl Sample {
    /// At most `most` bytes of the tar, at least one block.
    pub fn new(plan: &Plan, most: u64, cancel: &Cancel) -> Result<Self, Error> {
        let all = blocks(plan);
        let ahead = Ahead::new(plan);
        let taken = (most / BLOCK).clamp(1, all.max(1));
        let mut scratch = Scratch::default();
        let mut sample = Vec::new();
        for number in 0..taken {
            cancel.check()?;
            let mut tar = Vec::new();
            fill(&ahead, number * all / taken, &mut tar, &mut scratch)?;
            sample.push(tar);
        }
        let bytes = sample.iter().map(|block| block.len() as u64).sum();
        Ok(Self {
            blocks: sample,
            bytes,
        })
    }

    /// How much it is.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// SHA-256 over it, on this thread.
    pub fn hash(&self) -> Spent {
        let clock = Clock::start();
        let mut hash = Sha256::new();
        for block in &self.blocks {
            hash.update(block);
        }
        std::hint::black_box(hash.finalize());
        clock.spent()
    }

    /// Compresses it, and again until each thread has had a few blocks.
    pub fn compress(
        &self,
        setting: Setting,
        threads: usize,
        cancel: &Cancel,
    ) -> Result<Compressed, Error> {
        /// Fewer blocks a thread, and the wait for the last is most of what is measured.
        const EACH: u64 = 4;
        let once = self.blocks.len() as u64;
        let turns = (EACH * threads as u64).div_ceil(once.max(1)).max(1);
        let clock = Clock::start();
        let sizes = side_by_side(
            threads,
            turns * once,
            cancel,
            || (Codec::new(setting.codec, setting.level), 0),
            |(codec, size), number| {
                *size += compressed_size(codec, &self.blocks[(number % once) as usize]);
                Ok(())
            },
            |(_, size)| size,
        )?;
        Ok(Compressed {
            spent: clock.spent(),
            bytes_in: turns * self.bytes,
            bytes_out: sizes.iter().sum(),
        })
    }

    /// The compressed blocks: what a save hands on, in the same pieces.
    pub fn pieces(&self, setting: Setting, cancel: &Cancel) -> Result<Vec<Bytes>, Error> {
        let mut codec = Codec::new(setting.codec, setting.level);
        let pieces = self.blocks.iter().map(|block| {
            cancel.check()?;
            let compressed = codec.compress(block);
            Ok(compressed.map_or_else(|| Bytes::copy_from_slice(block), Bytes::from))
        });
        pieces.collect()
    }
}

/// What a codec did.
#[derive(Clone, Copy, Debug)]
pub struct Compressed {
    /// What it took.
    pub spent: Spent,
    /// Tar bytes.
    pub bytes_in: u64,
    /// Compressed bytes.
    pub bytes_out: u64,
}

/// Where bytes go.
#[derive(Clone)]
pub enum Place {
    /// Nowhere: what is handed on is dropped.
    Nothing,
    /// A file without a name in this directory, gone when it is closed.
    File(PathBuf),
    /// An upload that is cancelled before its last request, so that no blob comes of it.
    Registry(Repository, tokio::runtime::Handle),
}

/// Something on its way to a [`Place`].
pub enum Delivery {
    /// See [`Place::Nothing`].
    Nothing,
    /// See [`Place::File`].
    File(File, PathBuf),
    /// See [`Place::Registry`].
    Registry(Box<Writer>, tokio::runtime::Handle),
}

impl Place {
    /// Opens it.
    pub fn begin(&self) -> Result<Delivery, Error> {
        Ok(match self {
            Self::Nothing => Delivery::Nothing,
            Self::File(directory) => {
                let file = tempfile::tempfile_in(directory).map_err(Error::io(directory))?;
                Delivery::File(file, directory.clone())
            }
            Self::Registry(repository, handle) => {
                let writer = repository.begin_blob(handle.clone());
                Delivery::Registry(Box::new(writer), handle.clone())
            }
        })
    }
}

impl Delivery {
    /// Takes the next bytes. For plain threads.
    pub fn write(&mut self, bytes: Bytes) -> Result<(), Error> {
        match self {
            Self::Nothing => Ok(()),
            Self::File(file, directory) => file.write_all(&bytes).map_err(Error::io(directory)),
            Self::Registry(writer, _) => writer.write(bytes).map_err(of_registry),
        }
    }

    /// Tells a registry that no more will come, and waits until it was told.
    fn give_up(self) {
        if let Self::Registry(writer, handle) = self {
            handle.block_on(writer.abort());
        }
    }

    /// Waits until all of it is there: on the disk, or confirmed by the registry. Returns when it was.
    pub fn end(self) -> Result<Instant, Error> {
        match self {
            Self::Nothing => Ok(Instant::now()),
            Self::File(file, directory) => {
                file.sync_all().map_err(Error::io(&directory))?;
                Ok(Instant::now())
            }
            Self::Registry(writer, handle) => {
                handle.block_on(writer.rehearse()).map_err(of_registry)
            }
        }
    }
}

fn of_registry(error: crate::registry::Error) -> Error {
    commit::Error::from(destination::Error::from(error)).into()
}

/// Hands `bytes` bytes on, from `pieces` over and over: nothing is read, hashed or compressed.
pub fn deliver(
    place: &Place,
    pieces: &[Bytes],
    bytes: u64,
    cancel: &Cancel,
) -> Result<Spent, Error> {
    let clock = Clock::start();
    let mut delivery = place.begin()?;
    let mut left = bytes;
    let mut endless = pieces.iter().filter(|piece| !piece.is_empty()).cycle();
    let mut next = || -> Result<(), Error> {
        while let Some(piece) = endless.next().filter(|_| left > 0) {
            cancel.check()?;
            let len = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            left -= len as u64;
            delivery.write(piece.slice(..len))?;
        }
        Ok(())
    };
    if let Err(error) = next() {
        delivery.give_up();
        return Err(error);
    }
    let end = delivery.end()?;
    Ok(clock.spent_until(end))
}

/// How a whole save is made.
#[derive(Clone, Copy, Debug)]
pub struct How<'a> {
    /// What goes into the layer.
    pub rules: &'a Rules,
    /// Codec and level.
    pub setting: Setting,
    /// Workers.
    pub jobs: usize,
    /// Times later than this become it.
    pub timestamp: Option<i64>,
    /// Tar bytes after which another layer begins, see [`commit::cut`].
    pub layer_size: Option<commit::LayerSize>,
}

/// What a whole save made.
#[derive(Clone, Debug)]
pub struct Saved {
    /// What it took.
    pub spent: Spent,
    /// Bottom first.
    pub layers: Vec<Layer>,
}

/// A whole save: scan, plan, stream, deliver.
pub fn save(source: &Source, how: How<'_>, place: &Place, cancel: &Cancel) -> Result<Saved, Error> {
    let clock = Clock::start();
    let scan = source.scan(how.rules, how.jobs, cancel)?;
    let plans = commit::cut(Plan::new(Arc::new(scan), how.timestamp), how.layer_size);
    let mut deliveries = plans
        .iter()
        .map(|_| place.begin())
        .collect::<Result<Vec<_>, _>>()?;
    let options = layer::Options {
        compression: how.setting.codec,
        level: how.setting.level,
        jobs: how.jobs,
        cancel: cancel.flag(),
    };
    let parts = plans
        .iter()
        .zip(&mut deliveries)
        .map(|(plan, delivery)| Part {
            plan,
            sink: |bytes: Bytes| delivery.write(bytes),
        });
    let made = layer::stream::write_all(parts.collect(), options, &|_| ());
    let layers = match made.into_iter().collect::<Result<Vec<_>, _>>() {
        Ok(layers) => layers,
        Err(error) => {
            deliveries.into_iter().for_each(Delivery::give_up);
            return Err(of_layer(error));
        }
    };
    let mut end = Instant::now();
    for delivery in deliveries {
        end = end.max(delivery.end()?);
    }
    let spent = clock.spent_until(end);
    Ok(Saved { spent, layers })
}

/// What the sink said, where it was the sink.
fn of_layer(error: layer::Error) -> Error {
    match error {
        layer::Error::Sink(source) => match source.downcast::<Error>() {
            Ok(own) => *own,
            Err(source) => commit::Error::from(layer::Error::Sink(source)).into(),
        },
        other => commit::Error::from(other).into(),
    }
}
