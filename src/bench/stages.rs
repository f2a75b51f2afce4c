//! The stages of a save, each on its own, using the functions of the save itself. `upperdeck bench` and `cargo bench`
//! measure them.

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use super::Error;
use super::clock::{self, Clock, Elapsed};
use crate::common::cancel::Cancelled;
use crate::layer::block::{self, Scratch};
use crate::layer::codec::{BLOCK, Codec};
use crate::layer::read_ahead::ReadAhead;
use crate::layer::scan::{self, Kind, Scan};
use crate::layer::{self, Compression, Layer, Part, Plan};
use crate::node::container::Container;
use crate::node::overlay::xattr::Namespace;
use crate::save::{self, Rules};
use crate::store::destination;
use crate::store::registry::{Repository, Writer};

/// A codec at a level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Setting {
    /// The codec.
    pub codec: Compression,
    /// The level, within [`Compression::levels`].
    pub level: u32,
}

/// The tree to be saved.
#[derive(Clone, Debug)]
pub enum Source {
    /// A container's upper directory, as in a save.
    Container(Box<Container>),
    /// A plain directory.
    Directory(PathBuf),
}

impl Source {
    /// Runs the first stage, the scan, on `jobs` threads.
    pub fn scan(
        &self,
        rules: &Rules,
        jobs: usize,
        cancel: &CancellationToken,
    ) -> Result<Scan, Error> {
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
                    // Only root can read `trusted.*`, and a plain directory has no such attributes.
                    namespace: if rustix::process::geteuid().is_root() {
                        Namespace::Trusted
                    } else {
                        Namespace::User
                    },
                    volume: None,
                };
                let exclusions = rules.exclusions(&[]).map_err(save::Error::from)?;
                let options = scan::Options {
                    jobs,
                    uid_map: &[],
                    gid_map: &[],
                    exclusions: &exclusions,
                    caps: rules.caps,
                    runtime_root_mode: None,
                    cancel,
                };
                Ok(Scan::new(&roots, &options).map_err(save::Error::from)?)
            }
        }
    }
}

/// Runs `threads` workers, each with its own state, which take numbers below `count` until there are none left. Returns
/// the result of `done` for each state.
fn run_workers<S, T: Send>(
    threads: usize,
    count: u64,
    cancel: &CancellationToken,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, u64) -> Result<(), save::Error> + Sync,
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
            Cancelled::check(cancel)?;
            work(&mut state, number)?;
        }
    };
    thread::scope(|scope| {
        let start = |_| thread::Builder::new().spawn_scoped(scope, one);
        let workers = (0..threads.max(1))
            .map(start)
            .collect::<Result<Vec<_>, _>>();
        workers
            .map_err(|error| save::Error::Layer(crate::layer::Error::Thread(error)))?
            .into_iter()
            .map(|worker| worker.join().map_err(|_| save::Error::Worker)?)
            .collect()
    })
}

fn blocks(plan: &Plan) -> u64 {
    plan.tar_size().div_ceil(BLOCK)
}

/// Fills `tar` with block `number` of the tar.
fn fill(
    ahead: &ReadAhead<'_>,
    number: u64,
    tar: &mut Vec<u8>,
    scratch: &mut Scratch,
) -> Result<(), save::Error> {
    // A container goes on while it is measured: what changes under it does not matter here.
    let mut unstable = Vec::new();
    let (start, end) = (number * BLOCK, (number + 1) * BLOCK);
    block::fill(ahead, start, end, tar, scratch, &mut unstable)
        .map_err(|error| layer::Error::from(error).into())
}

/// Reads every file once into the page cache, so that all rounds start from the same state. A save does not do this.
pub(crate) fn read_first(
    plan: &Plan,
    threads: usize,
    cancel: &CancellationToken,
) -> Result<Elapsed, Error> {
    let scan = plan.scan();
    let clock = Clock::start();
    run_workers(
        threads,
        scan.len() as u64,
        cancel,
        || vec![0_u8; 1 << 20],
        |buffer, number| {
            let entry = &scan.entry(number as u32);
            let path = scan.path(number as u32);
            let (root, path, ino) = match scan.content_location(entry) {
                Some(place) => (place.root, &place.path, place.ino),
                None => (0, &path, entry.ino),
            };
            if entry.kind != Kind::File || entry.size == 0 {
                return Ok(());
            }
            // Files that are missing or unreadable are reported by the measured stages.
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

/// Produces the tar from the plan: files are read and headers written, but nothing is hashed or compressed.
pub fn read(plan: &Plan, threads: usize, cancel: &CancellationToken) -> Result<Elapsed, Error> {
    let ahead = ReadAhead::new(plan);
    let clock = Clock::start();
    run_workers(
        threads,
        blocks(plan),
        cancel,
        || (Vec::new(), Scratch::default()),
        |(tar, scratch), number| fill(&ahead, number, tar, scratch),
        drop,
    )?;
    Ok(clock.spent())
}

/// The time of the workers of a save, in total and by part.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct WorkerTimes {
    /// Total time.
    pub(crate) spent: Elapsed,
    /// CPU time of reading, in seconds.
    pub(crate) read: f64,
    /// CPU time of the checksum, in seconds.
    pub(crate) checksum: f64,
    /// CPU time of the codec, in seconds.
    pub(crate) compress: f64,
    /// Number of compressed bytes.
    pub(crate) bytes: u64,
}

/// Runs the workers' part of a save (read, checksum, compress), without the thread that hashes and delivers.
pub(crate) fn make(
    plan: &Plan,
    setting: Setting,
    threads: usize,
    cancel: &CancellationToken,
) -> Result<WorkerTimes, Error> {
    struct Worker {
        codec: Codec,
        tar: Vec<u8>,
        scratch: Scratch,
        made: WorkerTimes,
    }
    let ahead = ReadAhead::new(plan);
    let clock = Clock::start();
    let parts = run_workers(
        threads,
        blocks(plan),
        cancel,
        || Worker {
            codec: Codec::new(setting.codec, setting.level),
            tar: Vec::new(),
            scratch: Scratch::default(),
            made: WorkerTimes::default(),
        },
        |worker, number| {
            let begun = clock::thread_cpu_seconds();
            fill(&ahead, number, &mut worker.tar, &mut worker.scratch)?;
            let read = clock::thread_cpu_seconds();
            if setting.codec == Compression::Gzip {
                std::hint::black_box(crc32fast::hash(&worker.tar));
            }
            let summed = clock::thread_cpu_seconds();
            let bytes = compressed_size(&mut worker.codec, &worker.tar);
            let made = &mut worker.made;
            made.read += read - begun;
            made.checksum += summed - read;
            made.compress += clock::thread_cpu_seconds() - summed;
            made.bytes += bytes;
            Ok(())
        },
        |worker| worker.made,
    )?;
    let spent = clock.spent();
    Ok(parts.iter().fold(
        WorkerTimes {
            spent,
            ..WorkerTimes::default()
        },
        |sum, part| WorkerTimes {
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

/// A sample of a tar in memory, with blocks evenly distributed over all of it.
pub struct Sample {
    blocks: Vec<Vec<u8>>,
    bytes: u64,
}

impl Sample {
    /// Takes a sample of at most `most` bytes, but at least one block.
    pub fn new(plan: &Plan, most: u64, cancel: &CancellationToken) -> Result<Self, Error> {
        let all = blocks(plan);
        let ahead = ReadAhead::new(plan);
        let taken = (most / BLOCK).clamp(1, all.max(1));
        let mut scratch = Scratch::default();
        let mut sample = Vec::new();
        for number in 0..taken {
            Cancelled::check(cancel)?;
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

    /// Returns the size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Computes SHA-256 over the sample on this thread.
    pub fn hash(&self) -> Elapsed {
        let clock = Clock::start();
        let mut hash = Sha256::new();
        for block in &self.blocks {
            hash.update(block);
        }
        std::hint::black_box(hash.finalize());
        clock.spent()
    }

    /// Compresses the sample, repeatedly until each thread has had several blocks.
    pub fn compress(
        &self,
        setting: Setting,
        threads: usize,
        cancel: &CancellationToken,
    ) -> Result<Compressed, Error> {
        /// Minimum number of blocks per thread. With fewer, the result would be dominated by the wait for the last
        /// thread.
        const BLOCKS_PER_THREAD: u64 = 4;
        let once = self.blocks.len() as u64;
        let turns = (BLOCKS_PER_THREAD * threads as u64)
            .div_ceil(once.max(1))
            .max(1);
        let clock = Clock::start();
        let sizes = run_workers(
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

    /// Returns the compressed blocks, in the pieces in which a save delivers them.
    pub(crate) fn pieces(
        &self,
        setting: Setting,
        cancel: &CancellationToken,
    ) -> Result<Vec<Bytes>, Error> {
        let mut codec = Codec::new(setting.codec, setting.level);
        let pieces = self.blocks.iter().map(|block| {
            Cancelled::check(cancel)?;
            let compressed = codec.compress(block);
            Ok(compressed.map_or_else(|| Bytes::copy_from_slice(block), Bytes::from))
        });
        pieces.collect()
    }
}

/// The result of a compression.
#[derive(Clone, Copy, Debug)]
pub struct Compressed {
    /// Time spent.
    pub spent: Elapsed,
    /// Uncompressed bytes.
    pub bytes_in: u64,
    /// Compressed bytes.
    pub bytes_out: u64,
}

/// A destination for data.
#[derive(Clone)]
pub enum Sink {
    /// Discards the data.
    Nothing,
    /// Writes to an unnamed file in this directory, which is deleted when it is closed.
    File(PathBuf),
    /// Uploads and cancels before the last request, so that no blob is created.
    Registry(Repository, tokio::runtime::Handle),
}

/// A delivery in progress to a [`Sink`].
pub(crate) enum OpenSink {
    /// See [`Sink::Nothing`].
    Nothing,
    /// See [`Sink::File`].
    File(File, PathBuf),
    /// See [`Sink::Registry`].
    Registry(Box<Writer>, tokio::runtime::Handle),
}

impl Sink {
    /// Starts a delivery.
    pub(crate) fn begin(&self) -> Result<OpenSink, Error> {
        Ok(match self {
            Self::Nothing => OpenSink::Nothing,
            Self::File(directory) => {
                let file = tempfile::tempfile_in(directory).map_err(Error::io(directory))?;
                OpenSink::File(file, directory.clone())
            }
            Self::Registry(repository, handle) => {
                let writer = repository.begin_blob(handle.clone());
                OpenSink::Registry(Box::new(writer), handle.clone())
            }
        })
    }
}

impl OpenSink {
    /// Writes bytes. For threads, not for async tasks.
    pub(crate) fn write(&mut self, bytes: Bytes) -> Result<(), Error> {
        match self {
            Self::Nothing => Ok(()),
            Self::File(file, directory) => file.write_all(&bytes).map_err(Error::io(directory)),
            Self::Registry(writer, _) => writer.write(bytes).map_err(registry_error),
        }
    }

    /// Cancels an upload and waits until the registry has been notified.
    fn abort(self) {
        if let Self::Registry(writer, handle) = self {
            handle.block_on(writer.abort());
        }
    }

    /// Waits until all data is on disk or confirmed by the registry. Returns the time of that.
    pub(crate) fn end(self) -> Result<Instant, Error> {
        match self {
            Self::Nothing => Ok(Instant::now()),
            Self::File(file, directory) => {
                file.sync_all().map_err(Error::io(&directory))?;
                Ok(Instant::now())
            }
            Self::Registry(writer, handle) => handle
                .block_on(writer.finish_without_blob())
                .map_err(registry_error),
        }
    }
}

fn registry_error(error: crate::store::registry::Error) -> Error {
    save::Error::from(destination::Error::from(error)).into()
}

/// Delivers `bytes` bytes by repeating `pieces`. Nothing is read, hashed or compressed.
pub(crate) fn deliver(
    place: &Sink,
    pieces: &[Bytes],
    bytes: u64,
    cancel: &CancellationToken,
) -> Result<Elapsed, Error> {
    let clock = Clock::start();
    let mut delivery = place.begin()?;
    let mut left = bytes;
    let mut endless = pieces.iter().filter(|piece| !piece.is_empty()).cycle();
    let mut next = || -> Result<(), Error> {
        while let Some(piece) = endless.next().filter(|_| left > 0) {
            Cancelled::check(cancel)?;
            let len = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            left -= len as u64;
            delivery.write(piece.slice(..len))?;
        }
        Ok(())
    };
    if let Err(error) = next() {
        delivery.abort();
        return Err(error);
    }
    let end = delivery.end()?;
    Ok(clock.spent_until(end))
}

/// Options of a whole save.
#[derive(Clone, Copy, Debug)]
pub struct SaveOptions<'a> {
    /// Rules for the content of the layer.
    pub rules: &'a Rules,
    /// Codec and level.
    pub setting: Setting,
    /// Number of workers.
    pub jobs: usize,
    /// Times later than this are replaced by it.
    pub timestamp: Option<i64>,
    /// Tar bytes after which another layer begins, see [`save::split_plan`].
    pub layer_size: Option<save::LayerSize>,
}

/// The result of a whole save.
#[derive(Clone, Debug)]
pub struct Saved {
    /// Time spent.
    pub spent: Elapsed,
    /// Layers, bottom first.
    pub layers: Vec<Layer>,
}

/// Runs a whole save: scan, plan, stream, deliver.
pub fn save(
    source: &Source,
    how: SaveOptions<'_>,
    place: &Sink,
    cancel: &CancellationToken,
) -> Result<Saved, Error> {
    let clock = Clock::start();
    let scan = source.scan(how.rules, how.jobs, cancel)?;
    let plans = save::split_plan(Plan::new(Arc::new(scan), how.timestamp), how.layer_size);
    let mut deliveries = plans
        .iter()
        .map(|_| place.begin())
        .collect::<Result<Vec<_>, _>>()?;
    let options = layer::Options {
        compression: how.setting.codec,
        level: how.setting.level,
        jobs: how.jobs,
        cancel,
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
            deliveries.into_iter().for_each(OpenSink::abort);
            return Err(layer_error(error));
        }
    };
    let mut end = Instant::now();
    for delivery in deliveries {
        end = end.max(delivery.end()?);
    }
    let spent = clock.spent_until(end);
    Ok(Saved { spent, layers })
}

/// Unwraps an error of the sink.
fn layer_error(error: layer::Error) -> Error {
    match error {
        layer::Error::Sink(source) => match source.downcast::<Error>() {
            Ok(own) => *own,
            Err(source) => save::Error::from(layer::Error::Sink(source)).into(),
        },
        other => save::Error::from(other).into(),
    }
}
