//! Blocks in order: workers make and compress them, one thread hashes and hands them on, memory is bounded.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, bounded};
use sha2::{Digest as _, Sha256};

use super::block::{self, ReadError, Scratch, Unstable};
use super::codec::{Codec, CodecError, Compression};
use super::plan::Plan;
use crate::digest::{DiffId, Digest};

/// Tar bytes of a block. Part of the format that `--jobs` must not change: the same plan gives the same bytes.
pub const BLOCK: u64 = 1 << 20;

/// How to make the layer.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Codec.
    pub compression: Compression,
    /// Its level, within [`Compression::levels`].
    pub level: u32,
    /// Worker threads; the bytes do not depend on it.
    pub jobs: usize,
    /// Set to stop early with [`Error::Cancelled`].
    pub cancel: &'a AtomicBool,
}

/// How far the stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Tar bytes made, hashed and handed on.
    pub tar_bytes: u64,
    /// Compressed bytes handed on.
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
    /// Files that changed while they were read, sorted, each once.
    pub unstable: Vec<Unstable>,
}

/// Why there is no layer. None of these leaves a digest behind.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The compressor failed.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// Whoever takes the bytes failed.
    #[error("the layer could not be delivered")]
    Sink(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A worker panicked: a defect of this program.
    #[error("a worker died; this is a defect of upperdeck")]
    Worker,
    /// Somebody asked to stop.
    #[error("cancelled")]
    Cancelled,
}

struct Block {
    tar: Vec<u8>,
    /// `None`: as the tar.
    compressed: Option<Vec<u8>>,
    crc: crc32fast::Hasher,
    unstable: Vec<Unstable>,
}

type Made = Result<Block, Error>;

/// Makes the layer and hands its bytes, in order, to `sink`. It may be called again: the plan gives the same blocks.
pub fn write<E>(
    plan: &Plan,
    options: Options<'_>,
    mut sink: impl FnMut(Bytes) -> Result<(), E>,
    progress: &dyn Fn(Progress),
) -> Result<Layer, Error>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let blocks = plan.tar_size().div_ceil(BLOCK);
    let jobs = options
        .jobs
        .clamp(1, usize::try_from(blocks).unwrap_or(usize::MAX).max(1));
    // In order: a place for each block's result, put there before the block is given out.
    let (order_in, order) = bounded::<Receiver<Made>>(2 * jobs);
    let (work_in, work) = bounded::<(u64, Sender<Made>)>(2 * jobs);
    // Tar buffers come back from here.
    let (spare_in, spare) = bounded::<Vec<u8>>(2 * jobs + 2);
    thread::scope(|scope| {
        scope.spawn(move || {
            for number in 0..blocks {
                let (result_in, result) = bounded(1);
                // Either fails only when the other side gave up, and it knows why.
                if order_in.send(result).is_err() || work_in.send((number, result_in)).is_err() {
                    return;
                }
            }
        });
        for _ in 0..jobs {
            let (work, spare) = (work.clone(), spare.clone());
            scope.spawn(move || {
                let mut codec = Codec::new(options.compression, options.level);
                let mut scratch = Scratch::default();
                for (number, result) in work {
                    let tar = spare.try_recv().unwrap_or_default();
                    let made = make(plan, number, tar, &mut codec, &mut scratch);
                    // The receiver is gone only when the stream was given up.
                    result.send(made).ok();
                }
            });
        }
        drop(work);
        // `order` goes with it: when it gives up early, whoever fills the queue has to hear of it, or waits for ever.
        collect(plan, options, order, &spare_in, &mut sink, progress)
    })
}

fn make(
    plan: &Plan,
    number: u64,
    mut tar: Vec<u8>,
    codec: &mut Codec,
    scratch: &mut Scratch,
) -> Made {
    let mut unstable = Vec::new();
    tar.clear();
    block::fill(
        plan,
        number * BLOCK,
        (number + 1) * BLOCK,
        &mut tar,
        scratch,
        &mut unstable,
    )?;
    let compressed = codec.compress(&tar)?;
    let mut crc = crc32fast::Hasher::new();
    if matches!(codec, Codec::Gzip(_)) {
        crc.update(&tar);
    }
    Ok(Block {
        tar,
        compressed,
        crc,
        unstable,
    })
}

fn collect<E>(
    plan: &Plan,
    options: Options<'_>,
    order: Receiver<Receiver<Made>>,
    spare: &Sender<Vec<u8>>,
    sink: &mut impl FnMut(Bytes) -> Result<(), E>,
    progress: &dyn Fn(Progress),
) -> Result<Layer, Error>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let compression = options.compression;
    let mut tar_hash = Sha256::new();
    let mut hash = Sha256::new();
    let mut crc = crc32fast::Hasher::new();
    let mut at = Progress {
        tar_bytes: 0,
        sent_bytes: 0,
    };
    let mut unstable = Vec::new();
    let mut send = |bytes: Bytes, at: &mut Progress| -> Result<(), Error> {
        hash.update(&bytes);
        at.sent_bytes += bytes.len() as u64;
        if bytes.is_empty() {
            Ok(())
        } else {
            sink(bytes).map_err(|e| Error::Sink(e.into()))
        }
    };
    send(Bytes::from_static(compression.head()), &mut at)?;
    for result in order {
        if options.cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        let block = result.recv().map_err(|_| Error::Worker)??;
        tar_hash.update(&block.tar);
        crc.combine(&block.crc);
        at.tar_bytes += block.tar.len() as u64;
        unstable.extend(block.unstable);
        match block.compressed {
            Some(compressed) => {
                send(compressed.into(), &mut at)?;
                spare.try_send(block.tar).ok();
            }
            None => send(block.tar.into(), &mut at)?,
        }
        progress(at);
    }
    if at.tar_bytes != plan.tar_size() {
        return Err(Error::Worker);
    }
    send(compression.tail(&crc, at.tar_bytes).into(), &mut at)?;
    unstable.sort();
    unstable.dedup_by(|a, b| a.path == b.path);
    Ok(Layer {
        digest: Digest::finish(hash),
        diff_id: DiffId(Digest::finish(tar_hash)),
        size: at.sent_bytes,
        tar_size: at.tar_bytes,
        entries: plan.len(),
        media_type: compression.media_type(),
        unstable,
    })
}
