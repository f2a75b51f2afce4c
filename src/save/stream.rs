//! Makes layers and passes them to the destination as they are made; makes those again whose upload failed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::{Context, Error};
use crate::layer::{self, Compression, Layer, Part, Plan};
use crate::store::destination::{BlobWriter, Destination};

/// Finishes the blobs of layers that have been read completely.
pub(super) async fn finish(
    context: &Context,
    made: Vec<(Layer, BlobWriter)>,
) -> Result<Vec<Layer>, Error> {
    let size = made.iter().map(|(layer, _)| layer.size).sum();
    context.room.check_exactly(size).await?;
    let finish = |(layer, writer): (Layer, BlobWriter)| async move {
        writer.finish(&layer.digest, layer.size).await?;
        Ok::<_, Error>(layer)
    };
    let layers = futures_util::future::try_join_all(made.into_iter().map(finish)).await?;
    context.room.spend(size);
    Ok(layers)
}

/// Makes the layers and passes them on as they are made. The returned layers are read completely but not finished: a
/// frozen container may be thawed before [`finish`].
///
/// Fails if the container, which is frozen meanwhile, would have to stay frozen for longer than `bound`.
pub(super) async fn stream(
    context: &Context,
    codec: (Compression, u32),
    plans: Vec<Plan>,
    destination: &Destination,
    bound: Option<Duration>,
) -> Result<Vec<(Layer, BlobWriter)>, Error> {
    stream_with_retries(context, codec, plans, destination, bound, FinishTime::Later).await
}

/// Like `stream`, for sources that can be read repeatedly. Also finishes the blobs.
pub(super) async fn deliver(
    context: &Context,
    codec: (Compression, u32),
    plans: Vec<Plan>,
    destination: &Destination,
) -> Result<Vec<Layer>, Error> {
    let made = stream_with_retries(
        context,
        codec,
        plans,
        destination,
        None,
        FinishTime::Immediately,
    )
    .await?;
    Ok(made.into_iter().map(|(layer, _)| layer).collect())
}

/// When the destination is asked to finish a blob.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum FinishTime {
    /// As soon as it is complete: a blob that fails then is made again.
    Immediately,
    /// By the caller, after the container is thawed.
    Later,
}

/// Makes layers again from their plans if their upload failed in a way that may pass.
pub(super) async fn stream_with_retries(
    context: &Context,
    codec: (Compression, u32),
    plans: Vec<Plan>,
    destination: &Destination,
    bound: Option<Duration>,
    ends: FinishTime,
) -> Result<Vec<(Layer, BlobWriter)>, Error> {
    let until = bound.map(|bound| (Instant::now() + bound, bound));
    let plans = Arc::new(plans);
    let mut made: Vec<Option<(Layer, BlobWriter)>> = plans.iter().map(|_| None).collect();
    let handle = tokio::runtime::Handle::current();
    let begin = |n| Ok((n, destination.begin_blob(handle.clone())?));
    let mut missing = (0..plans.len())
        .map(begin)
        .collect::<Result<Vec<_>, Error>>()?;
    while !missing.is_empty() {
        let mut failed = None;
        let outcomes = stream_once(context, codec, &plans, missing, until).await?;
        if ends == FinishTime::Immediately {
            let whole = outcomes
                .iter()
                .filter_map(|(_, made, _)| made.as_ref().ok());
            let size = whole.map(|layer| layer.size).sum();
            context.room.check_exactly(size).await?;
        }
        let ended = outcomes
            .into_iter()
            .map(|(number, outcome, mut writer)| async move {
                let outcome = match outcome {
                    Ok(layer) if ends == FinishTime::Immediately => {
                        match writer.try_finish(&layer.digest, layer.size).await {
                            Ok(()) => {
                                context.room.spend(layer.size);
                                Ok(layer)
                            }
                            Err(error) => Err(error.into()),
                        }
                    }
                    outcome => outcome,
                };
                (number, outcome, writer)
            });
        missing = Vec::new();
        for (number, outcome, writer) in futures_util::future::join_all(ended).await {
            match outcome {
                Ok(layer) => made[number] = Some((layer, writer)),
                // A layer that was cancelled because another failed for good does not carry the reason.
                Err(Error::Cancelled) if failed.is_some() => {}
                Err(Error::Destination(error)) if error.retryable() => {
                    let said = error.to_string();
                    match writer.retry(error).await {
                        Ok(writer) => {
                            context.warn("again", format!("a layer is made again: {said}"));
                            missing.push((number, writer));
                        }
                        Err(error) => failed = Some(error.into()),
                    }
                }
                Err(error) => failed = Some(error),
            }
        }
        if let Some(error) = failed {
            return Err(error);
        }
    }
    Ok(made.into_iter().flatten().collect())
}

pub(super) type LayerResult = Result<Layer, Error>;

/// Makes each of the named plans once, concurrently, each into its own writer.
pub(super) async fn stream_once(
    context: &Context,
    (compression, level): (Compression, u32),
    plans: &Arc<Vec<Plan>>,
    parts: Vec<(usize, BlobWriter)>,
    until: Option<(Instant, Duration)>,
) -> Result<Vec<(usize, LayerResult, BlobWriter)>, Error> {
    let (numbers, mut writers): (Vec<usize>, Vec<BlobWriter>) = parts.into_iter().unzip();
    let observer = Arc::clone(&context.observer);
    let (jobs, cancel, plans) = (context.jobs, context.cancel.clone(), Arc::clone(plans));
    let (room, tally) = (Arc::clone(&context.room), Arc::clone(&context.tally));
    let made = tokio::task::spawn_blocking(move || {
        let (sent, done) = (AtomicU64::new(0), AtomicU64::new(0));
        let planned = |n: &usize| &plans[*n];
        let bytes_total: u64 = numbers.iter().map(planned).map(Plan::tar_size).sum();
        let entries_total = numbers.iter().map(planned).map(Plan::len).sum::<usize>() as u64;
        tally.begin(bytes_total, entries_total);
        let options = layer::Options {
            compression,
            level,
            jobs,
            cancel: &cancel,
        };
        let given_up = AtomicBool::new(false);
        let parts = numbers.iter().map(planned).zip(&mut writers);
        let parts = parts.map(|(plan, writer)| {
            let (given_up, sent, done, room) = (&given_up, &sent, &done, &room);
            let sink = move |bytes: Bytes| {
                if given_up.load(Ordering::Relaxed) {
                    return Err(Error::Cancelled);
                }
                let size = bytes.len() as u64;
                let sent = sent.fetch_add(size, Ordering::Relaxed) + size;
                let fits = room.check_sent(sent, done.load(Ordering::Relaxed), bytes_total);
                let written = match until.filter(|(until, _)| Instant::now() > *until) {
                    Some((_, bound)) => Err(Error::PausedTooLong {
                        limit_ms: bound.as_secs_f64() * 1000.0,
                    }),
                    None => fits.and_then(|()| Ok(writer.write(bytes)?)),
                };
                if written
                    .as_ref()
                    .is_err_and(|e| !e.is_transient_at_destination())
                {
                    given_up.store(true, Ordering::Relaxed);
                }
                written
            };
            Part { plan, sink }
        });
        let layers = layer::stream::write_all(parts.collect(), options, &|at| {
            done.store(at.tar_bytes, Ordering::Relaxed);
            tally.advance(at.tar_bytes, at.sent_bytes);
            tally.report(observer.as_ref());
        });
        let layers = layers
            .into_iter()
            .map(|layer| layer.map_err(unwrap_sink_error));
        let parts = numbers.into_iter().zip(layers).zip(writers);
        parts
            .map(|((n, layer), writer)| (n, layer, writer))
            .collect()
    });
    made.await.map_err(|_| Error::Worker)
}

/// Returns the sink's own error, which the stream passed through.
pub(super) fn unwrap_sink_error(error: layer::Error) -> Error {
    match error {
        layer::Error::Sink(source) => match source.downcast::<Error>() {
            Ok(own) => *own,
            Err(source) => layer::Error::Sink(source).into(),
        },
        other => other.into(),
    }
}
