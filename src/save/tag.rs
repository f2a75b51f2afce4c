//! Writes the tag, which makes the image visible, and does what follows it. The save has succeeded once the tag is
//! written, whatever becomes of the rest.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Context, Error, MAX_ATTEMPTS, Made, Of, PAUSE, make, send_again, until_cancelled};
use crate::common::digest::Digest;
use crate::save::event::Event;
use crate::store::destination::{self, Replaceable};

/// Longest time that a cancelled save waits for the answer to the tag that it has sent. An agent gives its child ten
/// seconds to end.
const ANSWER_GRACE: Duration = Duration::from_secs(8);
/// Time limit for everything that is done once the tag is written.
const AFTER_LIMIT: Duration = Duration::from_secs(15);

/// What a save may do with its tag.
pub(super) struct Permit {
    /// The only image that the tag may be taken from. `None`: any.
    rule: Option<Replaceable>,
    /// Whether the rule comes from a gate: then the tag has moved if it names another image.
    asked: bool,
    /// The image that is deleted when it has lost the tag.
    pub(super) to_delete: Option<Digest>,
}

impl Permit {
    /// Passes the gate, if there is one: it opens for the image that the tag names now, and for no other.
    ///
    /// Fails if the destination does not say which image that is.
    pub(super) async fn ask(
        context: &Context,
        of: &Of<'_>,
        made: &Made,
        tag: &str,
    ) -> Result<Self, Error> {
        let (options, destination) = (of.options, of.destination);
        let Some(gate) = &options.gate else {
            let to_delete = if options.delete_replaced {
                tokio::time::timeout(AFTER_LIMIT, destination.tagged(tag)).await
            } else {
                Ok(None)
            };
            return Ok(Self {
                rule: options.replaceable.clone(),
                asked: false,
                to_delete: to_delete.ok().flatten(),
            });
        };
        let found = if destination.is_archive() && options.replaceable.is_none() {
            // The file is replaced, whatever it is.
            None
        } else {
            destination.digest_of(tag).await?
        };
        let new = Digest::of(&made.image.manifest.bytes);
        if let (Some(found), Some(rule)) = (found, &options.replaceable) {
            destination.check_found(tag, rule, found, Some(new)).await?;
        }
        let replaces = found.filter(|&found| found != new);
        context.observer.event(Event::Ready { replaces });
        gate.pass().await?;
        Ok(Self {
            rule: Some(Replaceable {
                digest: found,
                save: None,
            })
            .filter(|_| !destination.is_archive() || options.replaceable.is_some()),
            asked: true,
            to_delete: found.filter(|_| options.delete_replaced),
        })
    }
}

/// Writes the manifest under its tag. Parts of the image that the registry lacks are sent again. Returns the digest of
/// the image.
pub(super) async fn write(
    context: &mut Context,
    of: &Of<'_>,
    mut made: Made,
    tag: &str,
    permit: &Permit,
) -> Result<(Made, Digest), Error> {
    let cancel = context.cancel.clone();
    let mut attempt = 1;
    loop {
        match Box::pin(answered(&cancel, put(of, &made, tag, permit))).await? {
            Err(error) if attempt < MAX_ATTEMPTS && error.may_lack_blobs() => {
                let why = format!(
                    "the destination may lack parts of the image, which are looked for again: {error}"
                );
                context.warn("again", why);
                let completed = Box::pin(complete(context, of, made, attempt));
                made = until_cancelled(&cancel, completed).await?;
                attempt += 1;
            }
            written => return Ok((made, written?)),
        }
    }
}

/// Brings to the destination what it lacks of an image that it did not take.
async fn complete(
    context: &mut Context,
    of: &Of<'_>,
    mut made: Made,
    attempt: u32,
) -> Result<Made, Error> {
    tokio::time::sleep(PAUSE * attempt).await;
    if send_again(context, of, &mut made).await? {
        return Ok(made);
    }
    // The lock on what is kept of the container is taken anew.
    drop(made);
    make(context, of, false).await
}

/// Writes the manifest under the tag, if the tag may be taken from the image that it names now.
async fn put(
    of: &Of<'_>,
    made: &Made,
    tag: &str,
    permit: &Permit,
) -> Result<Digest, destination::Error> {
    let manifest = Bytes::from(made.image.manifest.bytes.clone());
    let (destination, media_type) = (of.destination, made.image.manifest.media_type);
    let Some(rule) = &permit.rule else {
        return destination.put_manifest(manifest, media_type, tag).await;
    };
    let put = destination.put_manifest_replacing(manifest, media_type, tag, rule);
    match put.await {
        Err(destination::Error::TagExists { tag, digest }) if permit.asked => {
            Err(destination::Error::TagMoved { tag, digest })
        }
        put => put,
    }
}

/// Returns the answer to the write of the tag. A cancellation is too late once the request may have been sent: the
/// answer is waited for, and whether the image exists is reported as it is.
async fn answered(
    cancel: &CancellationToken,
    put: impl Future<Output = Result<Digest, destination::Error>>,
) -> Result<Result<Digest, destination::Error>, Error> {
    if cancel.is_cancelled() {
        return Err(Error::Cancelled);
    }
    tokio::pin!(put);
    tokio::select! {
        written = &mut put => return Ok(written),
        () = cancel.cancelled() => {}
    }
    match tokio::time::timeout(ANSWER_GRACE, put).await {
        Ok(Ok(digest)) => Ok(Ok(digest)),
        Ok(Err(_)) | Err(_) => Err(Error::CancelledAtTag),
    }
}

/// Labels the image, and deletes the one that it has replaced. What cannot be done, or not in time, causes a warning.
pub(super) async fn follow_up(
    context: &Context,
    of: &Of<'_>,
    digest: &Digest,
    replaced: Option<&Digest>,
) {
    let until = Instant::now() + AFTER_LIMIT;
    let (destination, labels) = (of.destination, &of.options.harbor_labels);
    let label = async {
        if labels.is_empty() {
            return;
        }
        if let Err(why) = done(context, until, destination.add_labels(digest, labels)).await {
            let what = format!("the image is saved and may lack labels of Harbor: {why}");
            context.warn("labels_missing", what);
        }
    };
    let delete = async {
        let Some(replaced) = replaced else { return };
        if let Err(why) = done(context, until, destination.delete_replaced(replaced)).await {
            let what = format!(
                "the image is saved; the one that had the tag before may stay, without a tag: {why}"
            );
            context.warn("replaced_kept", what);
        }
    };
    tokio::join!(label, delete);
}

/// Waits for work that may be left undone. Returns why it is not known to be done.
async fn done<T>(
    context: &Context,
    until: Instant,
    work: impl Future<Output = Result<T, destination::Error>>,
) -> Result<(), String> {
    tokio::select! {
        biased;
        () = context.cancel.cancelled() => Err("the save was cancelled before that was done".to_owned()),
        done = work => done.map(drop).map_err(|error| error.to_string()),
        () = tokio::time::sleep_until(until) => {
            Err(format!("the registry has not done it within {} s", AFTER_LIMIT.as_secs()))
        }
    }
}
