//! Scans the upper directory of a container, and its volumes, by the rules of a save: for the save itself, and for
//! previews (`diff`, `inspect`).

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use tokio_util::sync::CancellationToken;

use super::Error;
use crate::layer::scan::{self, Caps, Exclusions, Scan};
use crate::node::container::{Container, Volume};

/// The rules for what goes into the layer.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// `--exclude` patterns.
    pub exclude: Vec<String>,
    /// Keep credentials (`.ssh`, `.netrc`, ...) in the image.
    pub include_credentials: bool,
    /// Keep caches (`.cache/pip`, `/tmp`, ...) in the image.
    pub include_caches: bool,
    /// Limits on what the container can make a save do.
    pub caps: Caps,
}

impl Rules {
    /// Returns what must be left out if `mounts` are mounted.
    pub(crate) fn exclusions(&self, mounts: &[Vec<u8>]) -> Result<Exclusions, scan::PatternError> {
        self.exclusions_but(mounts, &[])
    }

    fn exclusions_but(
        &self,
        mounts: &[Vec<u8>],
        saved: &[Vec<u8>],
    ) -> Result<Exclusions, scan::PatternError> {
        Exclusions::new(scan::Rules {
            mounts,
            saved,
            user: &self.exclude,
            credentials: !self.include_credentials,
            caches: !self.include_caches,
            gpu: true,
            of_image: false,
        })
    }

    /// Scans the container's upper directory while `volumes` are saved too.
    ///
    /// The scan is complete, or a rescan if there is an earlier one.
    pub(crate) fn scan(
        &self,
        container: &Container,
        volumes: &[Volume],
        earlier: Option<&Scan>,
        jobs: usize,
        cancel: &CancellationToken,
    ) -> Result<Scan, Error> {
        let mounts = destinations(container, |_| true);
        let saved: Vec<Vec<u8>> = volumes
            .iter()
            .map(|volume| volume.opened.at().to_vec())
            .collect();
        let exclusions = self.exclusions_but(&mounts, &saved)?;
        self.scan_roots(container, None, &exclusions, earlier, jobs, cancel)
    }

    /// Scans a volume of the container. Mounts inside it are left out.
    pub(crate) fn scan_volume(
        &self,
        container: &Container,
        volume: &Volume,
        earlier: Option<&Scan>,
        jobs: usize,
        cancel: &CancellationToken,
    ) -> Result<Scan, Error> {
        let mounts = destinations(container, |mount| !volume.destination.starts_with(mount));
        let exclusions = self.exclusions(&mounts)?;
        self.scan_roots(container, Some(volume), &exclusions, earlier, jobs, cancel)
    }

    fn scan_roots(
        &self,
        container: &Container,
        volume: Option<&Volume>,
        exclusions: &Exclusions,
        earlier: Option<&Scan>,
        jobs: usize,
        cancel: &CancellationToken,
    ) -> Result<Scan, Error> {
        let overlay = &container.overlay;
        let roots = scan::Roots {
            upper: overlay.upper.clone(),
            lowers: overlay.lowers.clone(),
            data_only: overlay.data_only.clone(),
            id_mapped: overlay.id_mapped.clone(),
            lowers_known: true,
            namespace: overlay.namespace,
            volume: volume.map(|volume| volume.opened.clone()),
        };
        let options = scan::Options {
            jobs,
            uid_map: &container.uid_map,
            gid_map: &container.gid_map,
            exclusions,
            caps: self.caps,
            runtime_root_mode: container.runtime_root_mode,
            cancel,
        };
        let again = earlier.map(|earlier| Scan::rescan(earlier, &roots, &options));
        match again.transpose()?.flatten() {
            Some(scan) => Ok(scan),
            None => Ok(Scan::new(&roots, &options)?),
        }
    }
}

/// Returns the mount points that satisfy `wanted`.
fn destinations(container: &Container, wanted: impl Fn(&Path) -> bool) -> Vec<Vec<u8>> {
    let mounts = container.mounts.iter();
    let destinations = mounts.map(|mount| mount.destination.as_path());
    destinations
        .filter(|destination| wanted(destination))
        .map(|destination| destination.as_os_str().as_bytes().to_vec())
        .collect()
}
