//! Produces layers from blocks: workers fill and compress blocks; for each layer one thread orders them and hashes the
//! tar, and another hashes the compressed bytes and delivers them. Memory is bounded.
//!
//! All layers that are produced in parallel share the workers, which wait for nothing but work: a layer whose
//! destination is slow, or accepts one blob at a time, does not delay the others.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use super::block::{self, Scratch};
use super::codec::{BLOCK, Codec, Compression};
use super::content::{ReadError, Unstable};
use super::index::{self, Blocks, Place};
use super::plan::Plan;
use super::read_ahead::ReadAhead;
use crate::common::digest::{DiffId, Digest};

/// Layers produced at once: a registry serialises any more (see [`write_all`]).
const MAX_PARALLEL_LAYERS: usize = 4;
/// Compressed blocks per layer that wait for the destination.
const MAX_READY_BLOCKS: usize = 2;
/// Threads that read uncached files ahead: a disk, and even more a network disk, delivers many files at once nearly as
/// fast as one.
const READ_AHEAD_THREADS: usize = 8;
/// How many blocks the read-ahead is in front of the workers.
const READ_AHEAD_BLOCKS: u64 = 16;

/// How to produce the layer.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Codec.
    pub compression: Compression,
    /// Compression level, within [`Compression::levels`].
    pub level: u32,
    /// Worker threads; the output does not depend on the number.
    pub jobs: usize,
    /// Set to stop early with [`Error::Cancelled`].
    pub cancel: &'a CancellationToken,
}

/// A layer to be produced, and the sink of its bytes.
pub struct Part<'a, S> {
    /// Its layout.
    pub plan: &'a Plan,
    /// Called with the compressed bytes, in order, from one thread.
    pub sink: S,
}

/// Progress of the stream, over all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Tar bytes produced, hashed and delivered.
    pub tar_bytes: u64,
    /// Compressed bytes delivered.
    pub sent_bytes: u64,
}

/// A finished layer.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Digest of the compressed bytes.
    pub digest: Digest,
    /// Digest of the tar.
    pub diff_id: DiffId,
    /// Compressed size in bytes.
    pub size: u64,
    /// Size of the tar in bytes.
    pub tar_size: u64,
    /// Number of entries.
    pub entries: usize,
    /// Media type of the compressed bytes.
    pub media_type: &'static str,
    /// Where its index is, if it has one.
    pub index: Option<Place>,
    /// Files that changed while they were read, sorted by path, without duplicates.
    pub unstable: Vec<Unstable>,
}

/// Why a layer could not be produced. No digest exists in any of these cases.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The sink of the bytes failed.
    #[error("the layer could not be delivered")]
    Sink(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The kernel has no more threads for this process (`pids.max`, `RLIMIT_NPROC`).
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
    /// A worker panicked: a defect of this program.
    #[error("a worker died; this is a defect of upperdeck")]
    Worker,
    /// The operation was cancelled.
    #[error("cancelled")]
    Cancelled,
}

struct Block {
    tar: Vec<u8>,
    /// `None` if the block is not compressed.
    compressed: Option<Vec<u8>>,
    crc: crc32fast::Hasher,
    /// Digest of the bytes that are delivered, if the layer may get an index.
    digest: Option<Digest>,
    unstable: Vec<Unstable>,
}

type BlockResult = Result<Block, Error>;

/// A block to be produced, and the channel of its result.
struct BlockTask<'a> {
    ahead: &'a ReadAhead<'a>,
    number: u64,
    /// Whether the layer may get an index.
    indexed: bool,
    result: Sender<BlockResult>,
}

/// Channels through which a layer's blocks are distributed.
#[derive(Clone)]
struct Senders<'a> {
    work: Sender<BlockTask<'a>>,
    /// Blocks whose files are to be read ahead.
    fetch: Sender<(&'a ReadAhead<'a>, u64)>,
    /// Tar buffers for reuse.
    spare: Sender<Vec<u8>>,
}

/// State shared by all layers of a call.
struct Shared<'a> {
    options: Options<'a>,
    /// Maximum number of blocks of one layer that are in work or waiting for their turn.
    in_flight: usize,
    tar_bytes: AtomicU64,
    sent_bytes: AtomicU64,
    progress: &'a (dyn Fn(Progress) + Sync),
}

/// Produces one layer and passes its compressed bytes, in order, to `sink`. It may be called again: the plan gives the
/// same blocks.
pub fn write<E>(
    plan: &Plan,
    options: Options<'_>,
    sink: impl FnMut(Bytes) -> Result<(), E> + Send,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Layer, Error>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut layers = write_all(vec![Part { plan, sink }], options, progress);
    layers.pop().unwrap_or(Err(Error::Worker))
}

/// Produces several layers in parallel, four at a time, with one set of workers. Returns the results in the order of
/// the parts. A failure does not affect the other parts, and a failed part may be retried.
pub fn write_all<E, S>(
    parts: Vec<Part<'_, S>>,
    options: Options<'_>,
    progress: &(dyn Fn(Progress) + Sync),
) -> Vec<Result<Layer, Error>>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
    S: FnMut(Bytes) -> Result<(), E> + Send,
{
    let blocks = |part: &Part<'_, S>| part.plan.tar_size().div_ceil(BLOCK);
    let blocks = usize::try_from(parts.iter().map(blocks).sum::<u64>()).unwrap_or(usize::MAX);
    let jobs = options.jobs.clamp(1, blocks.max(1));
    let lanes = parts.len().min(MAX_PARALLEL_LAYERS);
    let shared = Shared {
        options,
        in_flight: (2 * jobs).div_ceil(lanes.max(1)).max(2),
        tar_bytes: AtomicU64::new(0),
        sent_bytes: AtomicU64::new(0),
        progress,
    };
    let read_aheads: Vec<_> = parts.iter().map(|part| ReadAhead::new(part.plan)).collect();
    // Bounded by the blocks that each layer may have in work.
    let (work_in, work) = unbounded::<BlockTask<'_>>();
    let (fetch_in, fetch) = unbounded();
    let (spare_in, spare) = bounded::<Vec<u8>>(2 * jobs + 2);
    let senders = Senders {
        work: work_in,
        fetch: fetch_in,
        spare: spare_in,
    };
    let mut layers: Vec<_> = parts.iter().map(|_| Err(Error::Worker)).collect();
    let waiting = Mutex::new(parts.into_iter().zip(&read_aheads).zip(&mut layers));
    let take = || {
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.next()
    };
    thread::scope(|scope| {
        let start = || thread::Builder::new();
        let mut refused = None;
        let mut workers = 0;
        for _ in 0..jobs {
            let (work, spare) = (work.clone(), spare.clone());
            let started = start().spawn_scoped(scope, move || {
                let mut codec = Codec::new(options.compression, options.level);
                let mut scratch = Scratch::default();
                for given in work {
                    let tar = spare.try_recv().unwrap_or_default();
                    let made = build_block(&given, tar, &mut codec, &mut scratch);
                    // The receiver is gone only if the layer was abandoned.
                    given.result.send(made).ok();
                }
            });
            match started {
                Ok(_) => workers += 1,
                Err(error) => refused = Some(error),
            }
        }
        // With fewer threads it is slower; with none there would be no progress at all.
        if let (0, Some(error)) = (workers, refused) {
            while let Some((_, layer)) = take() {
                *layer = Err(Error::Thread(error.kind().into()));
            }
            return;
        }
        for _ in 0..READ_AHEAD_THREADS.min(blocks) {
            let fetch = fetch.clone();
            // What is not read ahead is waited for when it is read.
            let _ = start().spawn_scoped(scope, move || {
                let mut path = Vec::new();
                for (ahead, number) in fetch {
                    let ahead: &ReadAhead<'_> = ahead;
                    ahead.fetch(number * BLOCK, (number + 1) * BLOCK, &mut path);
                }
            });
        }
        drop((work, fetch));
        for _ in 1..lanes {
            let (senders, shared, take) = (senders.clone(), &shared, &take);
            let lane = move || {
                while let Some(((part, ahead), layer)) = take() {
                    *layer = write_layer(part.sink, ahead, shared, &senders);
                }
            };
            let _ = start().spawn_scoped(scope, lane);
        }
        // The current thread handles the remaining layers.
        while let Some(((part, ahead), layer)) = take() {
            *layer = write_layer(part.sink, ahead, &shared, &senders);
        }
        // Workers and fetchers end with the last layer thread.
        drop(senders);
    });
    layers
}

fn build_block(
    task: &BlockTask<'_>,
    mut tar: Vec<u8>,
    codec: &mut Codec,
    scratch: &mut Scratch,
) -> BlockResult {
    let (ahead, number) = (task.ahead, task.number);
    let mut unstable = Vec::new();
    block::fill(
        ahead,
        number * BLOCK,
        (number + 1) * BLOCK,
        &mut tar,
        scratch,
        &mut unstable,
    )?;
    let compressed = codec.compress(&tar);
    let mut crc = crc32fast::Hasher::new();
    if matches!(codec, Codec::Gzip(_)) {
        crc.update(&tar);
    }
    let digest = task
        .indexed
        .then(|| Digest::of(compressed.as_deref().unwrap_or(&tar)));
    Ok(Block {
        tar,
        compressed,
        crc,
        digest,
        unstable,
    })
}

fn write_layer<'a, E, S>(
    sink: S,
    ahead: &'a ReadAhead<'a>,
    shared: &Shared<'_>,
    senders: &Senders<'a>,
) -> Result<Layer, Error>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
    S: FnMut(Bytes) -> Result<(), E> + Send,
{
    let (ready_in, ready) = bounded(MAX_READY_BLOCKS);
    thread::scope(|scope| {
        let delivery = thread::Builder::new()
            .spawn_scoped(scope, move || deliver(ready, sink, &shared.sent_bytes))
            .map_err(Error::Thread)?;
        // Consumes the sender: its drop ends the delivery.
        let tar = assemble(ahead, shared, senders, ready_in);
        // If the destination failed, that is why the ordering stopped: report that error first.
        let (digest, size) = delivery.join().map_err(|_| Error::Worker)??;
        let tar = tar?;
        Ok(Layer {
            digest,
            diff_id: tar.diff_id,
            size,
            tar_size: tar.size,
            entries: ahead.plan().len(),
            media_type: shared.options.compression.media_type(),
            index: tar.index,
            unstable: tar.unstable,
        })
    })
}

/// Summary of a complete tar.
struct Tar {
    diff_id: DiffId,
    size: u64,
    index: Option<Place>,
    unstable: Vec<Unstable>,
}

/// Distributes the plan's blocks, collects them in order, hashes the tar and sends the compressed bytes to `ready`.
#[allow(
    clippy::needless_pass_by_value,
    reason = "its end, with this function's, tells that nothing more comes"
)]
fn assemble<'a>(
    ahead: &'a ReadAhead<'a>,
    shared: &Shared<'_>,
    senders: &Senders<'a>,
    ready: Sender<Bytes>,
) -> Result<Tar, Error> {
    let plan = ahead.plan();
    let compression = shared.options.compression;
    let mut stored = 0;
    let mut send = move |bytes: Bytes| -> Result<u64, Error> {
        stored += bytes.len() as u64;
        // Fails only if the delivery has ended; its own error says why.
        ready.send(bytes).map_err(|_| Error::Worker)?;
        Ok(stored)
    };
    let mut hash = Sha256::new();
    let mut crc = crc32fast::Hasher::new();
    let mut size = 0;
    let mut unstable = Vec::new();
    let indexed = index::is_worth(compression, plan.tar_size());
    let (mut listing, mut stored_blocks) = (None, Blocks::default());
    let blocks = plan.tar_size().div_ceil(BLOCK);
    let mut numbers = 0..blocks;
    let mut fetched = 0;
    let mut in_flight: VecDeque<Receiver<BlockResult>> = VecDeque::with_capacity(shared.in_flight);
    send(Bytes::from_static(compression.head()))?;
    loop {
        while in_flight.len() < shared.in_flight
            && let Some(number) = numbers.next()
        {
            let (result, made) = bounded(1);
            let given = BlockTask {
                ahead,
                number,
                indexed,
                result,
            };
            ahead.set_taken_end((number + 1) * BLOCK);
            senders.work.send(given).map_err(|_| Error::Worker)?;
            in_flight.push_back(made);
        }
        if ahead.is_enabled() {
            let until = blocks.min(numbers.start + READ_AHEAD_BLOCKS);
            for number in fetched.max(numbers.start)..until {
                senders
                    .fetch
                    .send((ahead, number))
                    .map_err(|_| Error::Worker)?;
            }
            fetched = until;
        }
        // While the workers make the first blocks.
        if indexed && listing.is_none() {
            listing = Some(plan.list());
        }
        let Some(made) = in_flight.pop_front() else {
            break;
        };
        if shared.options.cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let block = made.recv().map_err(|_| Error::Worker)??;
        let len = block.tar.len() as u64;
        hash.update(&block.tar);
        crc.combine(&block.crc);
        size += len;
        unstable.extend(block.unstable);
        if let Some(digest) = &block.digest {
            let stored = block.compressed.as_ref().unwrap_or(&block.tar).len();
            stored_blocks.push(stored as u64, digest);
        }
        match block.compressed {
            Some(compressed) => {
                send(compressed.into())?;
                senders.spare.try_send(block.tar).ok();
            }
            None => {
                send(block.tar.into())?;
            }
        }
        (shared.progress)(Progress {
            tar_bytes: shared.tar_bytes.fetch_add(len, Ordering::Relaxed) + len,
            sent_bytes: shared.sent_bytes.load(Ordering::Relaxed),
        });
    }
    if size != plan.tar_size() {
        return Err(Error::Worker);
    }
    let stored = send(compression.tail(&crc, size).into())?;
    let index = listing
        .and_then(|listing| index::append(listing, &stored_blocks, size, compression, stored));
    let index = match index {
        Some((bytes, place)) => {
            send(bytes.into())?;
            Some(place)
        }
        None => None,
    };
    unstable.sort();
    unstable.dedup_by(|a, b| a.path == b.path);
    Ok(Tar {
        diff_id: DiffId(Digest::finish(hash)),
        size,
        index,
        unstable,
    })
}

/// Hashes the compressed bytes and delivers them. Returns digest and size in bytes; they are those of a whole layer
/// only if the tar is complete.
fn deliver<E>(
    ready: Receiver<Bytes>,
    mut sink: impl FnMut(Bytes) -> Result<(), E>,
    sent_bytes: &AtomicU64,
) -> Result<(Digest, u64), Error>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut hash = Sha256::new();
    let mut size = 0;
    for bytes in ready {
        if bytes.is_empty() {
            continue;
        }
        hash.update(&bytes);
        let len = bytes.len() as u64;
        sink(bytes).map_err(|e| Error::Sink(e.into()))?;
        size += len;
        sent_bytes.fetch_add(len, Ordering::Relaxed);
    }
    Ok((Digest::finish(hash), size))
}
