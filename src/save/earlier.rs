//! Finds what this node kept of the last save of a container, decides whether the next one can be made on top of it,
//! and keeps the next one.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use super::trees::Baseline;
use super::{CapturedTrees, Context, Error, Options, Rules, base};
use crate::common::digest::{ChainId, Digest};
use crate::common::waits::WaitReason;
use crate::image::manifest;
use crate::layer::scan::Stored;
use crate::node::container::{Base, BaseLayer, Container, MountPoint, Volume};
use crate::save::state_store::{Description, Layer, Lock, Store, StoredSave, TreeState, Unusable};
use crate::store::destination::{Destination, Target};

/// Polling interval of a save that waits for another save of the same container.
const LOCK_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// An earlier save that can serve as the ground for another.
#[derive(Debug)]
pub(super) struct PreviousSave {
    /// One item per tree.
    pub(super) known: Vec<Baseline>,
    /// The layers above the base, bottom first; all are at the destination.
    pub(super) layers: Vec<Layer>,
    /// The destination of the save that made them.
    where_kept: String,
}

/// What is known of earlier saves, and where this one is to be kept.
#[derive(Debug)]
pub(super) struct Earlier {
    store: Option<Store>,
    /// Held until this save is kept.
    lock: Option<Lock>,
    fingerprint: Digest,
    upper_inode: (u64, u64),
    pub(super) previous: Option<PreviousSave>,
    /// Layers of the last save that the destination lacks.
    missing: Vec<BaseLayer>,
}

/// Looks for the last save of the container. An unusable one never fails the save at hand. With `again`, everything is
/// saved: what was kept has turned out to be unusable.
pub(super) async fn find(
    context: &Context,
    options: &Options,
    container: &Container,
    volumes: &[Volume],
    base: &Base,
    destination: &Destination,
    again: bool,
) -> Result<Earlier, Error> {
    let mut earlier = Earlier {
        store: None,
        lock: None,
        fingerprint: Digest::of(b""),
        upper_inode: (0, 0),
        previous: None,
        missing: Vec::new(),
    };
    // A scan of a container that runs meanwhile is no basis for another save.
    let stands_still = options.pause != super::Pause::None || container.ended().is_some();
    let Some(dir) = options.state_dir.as_ref().filter(|_| stands_still) else {
        return Ok(earlier);
    };
    let store = Store::new(dir);
    earlier.upper_inode = inode_of(container)?;
    let granted = ContentOptions::of(options);
    earlier.fingerprint = fingerprint(&granted, container, volumes, base, earlier.upper_inode)?;
    earlier.lock = lock(context, &store, container).await;
    let last = if options.full || again {
        LastSave::Nothing
    } else {
        LastSave::of(
            &store,
            container,
            base,
            earlier.fingerprint,
            options.max_layers,
        )
    };
    earlier.store = Some(store);
    let full = |why: &str| context.warn("full_save", format!("everything is saved anew: {why}"));
    let kept = match last {
        LastSave::Nothing => return Ok(earlier),
        LastSave::NotUsed(why) => {
            full(&why);
            return Ok(earlier);
        }
        LastSave::Save(kept) => kept,
    };
    let Description {
        layers,
        destination: where_kept,
        ..
    } = kept.description;
    let as_base: Vec<_> = layers
        .iter()
        .map(|layer| as_base(layer, &where_kept))
        .collect();
    let asked = layers
        .iter()
        .map(|layer| destination.has_blob(&layer.digest, Some(layer.size)));
    let there = futures_util::future::try_join_all(asked).await?;
    let lacking = as_base
        .iter()
        .zip(there)
        .filter(|(_, there)| there.is_none());
    for (layer, _) in lacking {
        let mut sources = layer.repositories.iter();
        if layer.local_blob.is_none() && sources.all(|name| destination.is_repository(name)) {
            full("a layer of the last save is not at the destination, and not to be had");
            return Ok(earlier);
        }
        earlier.missing.push(layer.clone());
    }
    context.room.add(destination, &as_base).await?;
    let known = baselines_of_stored(kept.stored);
    earlier.previous = Some(PreviousSave {
        known,
        layers,
        where_kept,
    });
    Ok(earlier)
}

/// What this node has of the last save.
pub(super) enum LastSave {
    /// Nothing was kept, which needs no message.
    Nothing,
    /// Something was kept, but is not used for this reason; or there was a reason not to look.
    NotUsed(String),
    /// A save that the next one can be made on top of.
    Save(Box<StoredSave>),
}

impl LastSave {
    /// Loads the last save and checks that it can be used.
    pub(super) fn of(
        store: &Store,
        container: &Container,
        base: &Base,
        fingerprint: Digest,
        max_layers: usize,
    ) -> Self {
        let kept = match store.load(&container.id) {
            Err(Unusable::Absent) => return Self::Nothing,
            Err(unusable) => return Self::NotUsed(unusable.to_string()),
            Ok(kept) => kept,
        };
        if kept.description.fingerprint != fingerprint {
            let why = "the last save was with other options, or of another base, mount or boot";
            return Self::NotUsed(why.to_owned());
        }
        match chain_too_long(&kept.description.layers, max_layers, base.layers.len()) {
            Some(why) => Self::NotUsed(why),
            None => Self::Save(Box::new(kept)),
        }
    }
}

/// Takes the lock that allows one save of a container at a time. Returns `None` if there is no place for the lock file.
async fn lock(context: &Context, store: &Store, container: &Container) -> Option<Lock> {
    let mut waiting = None;
    loop {
        match store.try_lock(&container.id) {
            Ok(Some(lock)) => return Some(lock),
            Ok(None) => {}
            Err(error) => {
                context.warn(
                    "state_not_kept",
                    format!("nothing is kept for the next save: {error}"),
                );
                return None;
            }
        }
        if waiting.is_none() {
            waiting = Some(context.registries.waits().begin(WaitReason::OtherSave));
            context.warn(
                "waiting",
                "another save of this container is under way: waiting for its end".to_owned(),
            );
        }
        // Cancellation drops this future.
        tokio::time::sleep(LOCK_POLL_INTERVAL).await;
    }
}

/// Returns the reason why a chain of layers must not grow, if there is one.
fn chain_too_long(layers: &[Layer], most: usize, base: usize) -> Option<String> {
    let size = |full: bool| {
        layers
            .iter()
            .filter(|l| l.full == full)
            .map(|l| l.tar_size)
            .sum::<u64>()
    };
    // However many layers a full save was divided into, saving everything anew gives as many.
    let added = layers.iter().filter(|layer| !layer.full).count();
    let counted = added + usize::from(added < layers.len());
    if counted >= most || base + layers.len() >= manifest::MAX_LAYERS {
        return Some(format!(
            "the image has {} above its base by now",
            crate::common::message::count(layers.len(), "layer", "layers")
        ));
    }
    (size(false) * 2 > size(true) && size(false) > SMALL_CHAIN)
        .then(|| "what changed since the last full save is half as much as that".to_owned())
}

/// Size in bytes of tar up to which the changes are acceptable, whatever the size of the full save.
const SMALL_CHAIN: u64 = 16 << 20;

/// Ensures that the layers are at the destination. Returns the reason if they cannot be brought there.
async fn ensure_at_destination(
    context: &Context,
    destination: &Destination,
    layers: &[BaseLayer],
) -> Result<Result<(), String>, Error> {
    let found = base::look_up(destination, layers).await?;
    for (layer, found) in layers.iter().zip(&found) {
        context.expect_or_count(layer, found.as_ref());
    }
    for (layer, found) in layers.iter().zip(found) {
        let found = match found {
            Some(found) => Ok(found),
            None => base::copy(context, destination, layer).await?,
        };
        context.tally.arrived(layer.diff_id);
        match found {
            Ok(found) => context.room.arrived(&found.digest),
            Err(tried) => {
                return Ok(Err(format!(
                    "a layer of the last save is not at the destination, and not to be had: {}",
                    tried.join("; ")
                )));
            }
        }
    }
    Ok(Ok(()))
}

fn as_base(layer: &Layer, where_kept: &str) -> BaseLayer {
    let (mut local_blob, mut repositories) = (None, Vec::new());
    match where_kept.parse::<Target>() {
        Ok(Target::Registry(reference)) => repositories.push(reference.name()),
        Ok(Target::Layout { dir, .. }) => {
            let blob = dir.join("blobs/sha256").join(layer.digest.hex());
            local_blob = blob.exists().then_some(blob);
        }
        _ => {}
    }
    BaseLayer {
        diff_id: layer.diff_id,
        chain_id: ChainId::bottom(layer.diff_id),
        lower: None,
        descriptor: Some(base::descriptor(
            &layer.media_type,
            layer.digest,
            layer.size,
        )),
        size_known: true,
        local_blob,
        repositories,
    }
}

/// Returns what was kept as scans that new ones are compared with.
pub(super) fn baselines_of_stored(stored: Vec<Stored>) -> Vec<Baseline> {
    let known = |stored: Stored| Baseline {
        scan: Arc::new(stored.scan),
        unsure: Arc::new(stored.unsure),
    };
    stored.into_iter().map(known).collect()
}

/// The options of a save that determine what its layers contain.
pub(super) struct ContentOptions<'o> {
    pub(super) rules: &'o Rules,
    pub(super) timestamp: Option<i64>,
}

impl<'o> ContentOptions<'o> {
    fn of(options: &'o Options) -> Self {
        Self {
            rules: &options.rules,
            timestamp: options.timestamp,
        }
    }
}

pub(super) fn inode_of(container: &Container) -> Result<(u64, u64), Error> {
    use std::os::unix::fs::MetadataExt as _;
    let upper = &container.overlay.upper;
    let meta = std::fs::metadata(upper).map_err(|source| unreadable(upper, source))?;
    Ok((meta.dev(), meta.ino()))
}

fn unreadable(path: &Path, source: std::io::Error) -> Error {
    Error::Scan(crate::layer::scan::Error::Read {
        path: path.display().to_string(),
        source,
    })
}

/// Returns the mount points without those below a mount of the runtime, which hides them in any case. Of those, the
/// kernel's list has more than the runtime's record, by which a container is saved that has ended.
fn outermost(container: &Container) -> Vec<&Path> {
    let hides = |outer: &MountPoint, inner: &Path| {
        !outer.volume && inner != outer.destination && inner.starts_with(&outer.destination)
    };
    let all = container.mounts.iter();
    let points = all.map(|mount| mount.destination.as_path());
    points
        .filter(|inner| !container.mounts.iter().any(|outer| hides(outer, inner)))
        .collect()
}

/// Returns a digest over everything that a scan and its layers depend on.
#[allow(
    clippy::unnecessary_debug_formatting,
    reason = "quotes and escapes keep the parts apart"
)]
pub(super) fn fingerprint(
    granted: &ContentOptions<'_>,
    container: &Container,
    volumes: &[Volume],
    base: &Base,
    upper: (u64, u64),
) -> Result<Digest, Error> {
    // The boot is included because after a crash the time stamps of data that was not yet on disk may be lost while
    // later data is not.
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let overlay = &container.overlay;
    let rules = granted.rules;
    let diff_ids: Vec<_> = base.layers.iter().map(|layer| layer.diff_id).collect();
    let mounts = outermost(container);
    // A different directory may have been mounted at the same path.
    let volume = |volume: &Volume| {
        let stat = volume.opened.root().stat(volume.opened.at());
        let stat = stat.map_err(|source| unreadable(&volume.destination, source))?;
        let inode = stat.map(|stat| (stat.st_dev, stat.st_ino));
        Ok(format!(
            "{:?} {} {inode:?} {:?}",
            volume.destination,
            volume.kind,
            volume.opened.root().identity()
        ))
    };
    let volumes: Vec<_> = volumes
        .iter()
        .map(volume)
        .collect::<Result<Vec<String>, Error>>()?;
    let text = format!(
        "{boot:?} {upper:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?} {mounts:?} {:?} {:?} {:?} {diff_ids:?} {:?} {volumes:?}",
        overlay.upper,
        overlay.lowers,
        (&overlay.data_only, &overlay.id_mapped),
        overlay.namespace,
        container.uid_map,
        container.gid_map,
        container.runtime_root_mode,
        rules.exclude,
        (rules.include_credentials, rules.include_caches),
        granted.timestamp,
        Digest::of(&base.config),
    );
    let mut hasher = Sha256::new();
    hasher.update(text.as_bytes());
    Ok(Digest::finish(hasher))
}

impl Earlier {
    /// Copies the layers of the last save that the destination lacks. Returns the reason if that is not possible.
    pub(super) async fn bring(
        &self,
        context: &Context,
        destination: &Destination,
    ) -> Result<Result<(), String>, Error> {
        ensure_at_destination(context, destination, &self.missing).await
    }

    /// Ensures once more that the layers of earlier saves are at the destination. Returns whether they are.
    pub(super) async fn bring_again(
        &self,
        context: &Context,
        destination: &Destination,
    ) -> Result<bool, Error> {
        let Some(previous) = &self.previous else {
            return Ok(true);
        };
        let layers = previous.layers.iter();
        let layers: Vec<_> = layers.map(|l| as_base(l, &previous.where_kept)).collect();
        Ok(ensure_at_destination(context, destination, &layers)
            .await?
            .is_ok())
    }

    /// Returns the layers of the image above the base: those of the earlier saves that this one builds on, then its
    /// own.
    pub(super) fn layers(&self, taken: &CapturedTrees) -> Vec<Layer> {
        let under = self
            .previous
            .iter()
            .filter(|_| taken.on_top)
            .flat_map(|under| under.layers.clone());
        let new = taken.layers.iter().map(|layer| Layer {
            digest: layer.digest,
            diff_id: layer.diff_id,
            size: layer.size,
            media_type: layer.media_type.to_owned(),
            tar_size: layer.tar_size,
            index: layer.index,
            full: !taken.on_top,
        });
        under.chain(new).collect()
    }

    /// Keeps a save that is at its destination. A failure causes a warning, and the next save takes longer.
    pub(super) fn keep(
        &self,
        context: &Context,
        container: &Container,
        target: &Target,
        taken: &CapturedTrees,
    ) {
        let Some(store) = &self.store else { return };
        let kept = match &taken.baselines {
            Some(known) => {
                let description = Description {
                    fingerprint: self.fingerprint,
                    upper: container.overlay.upper.clone(),
                    upper_inode: self.upper_inode,
                    destination: target.to_string(),
                    layers: self.layers(taken),
                };
                let mut scans = Vec::with_capacity(known.len());
                for Baseline { scan, unsure } in known {
                    scans.push(TreeState { scan, unsure });
                }
                store.keep(&container.id, &description, &scans)
            }
            None => store.forget(&container.id),
        };
        if let Err(error) = kept {
            // What was kept before belongs to an older image and is still usable for the next save.
            context.warn(
                "state_not_kept",
                format!("nothing is kept for the next save: {error}"),
            );
        }
    }
}

/// Returns the layers as a manifest lists them.
pub(super) fn to_manifest_layers(layers: &[Layer]) -> Vec<manifest::NewLayer> {
    let listed = |layer: &Layer| manifest::NewLayer {
        layer: manifest::Layer {
            descriptor: base::indexed(
                base::descriptor(&layer.media_type, layer.digest, layer.size),
                layer.index.as_ref(),
            ),
            diff_id: layer.diff_id,
        },
        created_by: None,
    };
    layers.iter().map(listed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::digest::DiffId;

    #[test]
    fn the_manifest_says_where_the_index_of_a_kept_layer_is() {
        let place = Some(format!("9+4 {}", Digest::of(b"index")));
        let digest = Digest::of(b"layer");
        let layer = Layer {
            digest,
            diff_id: DiffId(digest),
            size: 13,
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
            tar_size: 7,
            index: place.as_ref().and_then(|place| place.parse().ok()),
            full: true,
        };
        // What is kept for the next save has it, too.
        let kept = serde_json::to_string(&layer).unwrap();
        let kept: Layer = serde_json::from_str(&kept).unwrap();
        assert_eq!(kept, layer);
        let listed = to_manifest_layers(&[kept]).remove(0).layer.descriptor;
        let annotations = listed.annotations().clone().unwrap_or_default();
        assert_eq!(annotations.get("upperdeck.index"), place.as_ref());
        let without = to_manifest_layers(&[Layer {
            index: None,
            ..layer
        }])
        .remove(0);
        assert_eq!(*without.layer.descriptor.annotations(), None);
    }

    #[test]
    fn a_full_save_counts_as_one_layer_however_it_is_divided() {
        let layer = |full| {
            let digest = Digest::of(b"");
            Layer {
                digest,
                diff_id: DiffId(digest),
                size: 0,
                media_type: String::new(),
                tar_size: 0,
                index: None,
                full,
            }
        };
        let chain = |parts: usize, added: usize| {
            let parts = std::iter::repeat_with(|| layer(true)).take(parts);
            let added = std::iter::repeat_with(|| layer(false)).take(added);
            parts.chain(added).collect::<Vec<_>>()
        };
        for parts in [1, 4, 40] {
            assert_eq!(chain_too_long(&chain(parts, 0), 16, 2), None, "{parts}");
            assert_eq!(chain_too_long(&chain(parts, 14), 16, 2), None, "{parts}");
            assert!(
                chain_too_long(&chain(parts, 15), 16, 2).is_some(),
                "{parts}"
            );
        }
        assert_eq!(chain_too_long(&chain(0, 0), 1, 2), None);
        assert!(chain_too_long(&chain(1, 0), 1, 2).is_some());
        // No image may have more, whatever they hold.
        let most = manifest::MAX_LAYERS;
        assert!(chain_too_long(&chain(most - 2, 0), 16, 2).is_some());
        assert_eq!(chain_too_long(&chain(most - 3, 0), 16, 2), None);
    }
}
