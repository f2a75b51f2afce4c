//! The upper directory of a container, scanned by the rules of a save: for the save itself, and for those who want to
//! know beforehand (`diff`, `inspect`).

use std::os::unix::ffi::OsStrExt;

use super::Error;
use crate::cancel::Cancel;
use crate::container::Container;
use crate::scan::{self, Caps, Exclusions, Scan};

/// What goes into the layer.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// `--exclude` patterns.
    pub exclude: Vec<String>,
    /// Keep credentials (`.ssh`, `.netrc`, ...) in the image.
    pub include_credentials: bool,
    /// Keep caches (`.cache/pip`, `/tmp`, ...) in the image.
    pub include_caches: bool,
    /// Bounds on what the container can make a save do.
    pub caps: Caps,
}

impl Rules {
    /// What must not get in, where `mounts` are mounted.
    pub fn exclusions(&self, mounts: &[Vec<u8>]) -> Result<Exclusions, scan::PatternError> {
        Exclusions::new(scan::Rules {
            mounts,
            user: &self.exclude,
            credentials: !self.include_credentials,
            caches: !self.include_caches,
            gpu: true,
            of_image: false,
        })
    }

    /// Scans the container's upper directory.
    ///
    /// From nothing, or again where there is an earlier scan.
    pub fn scan(
        &self,
        container: &Container,
        earlier: Option<&Scan>,
        jobs: usize,
        cancel: &Cancel,
    ) -> Result<Scan, Error> {
        let mounts: Vec<Vec<u8>> = container
            .mounts
            .iter()
            .map(|mount| mount.destination.as_os_str().as_bytes().to_vec())
            .collect();
        let exclusions = self.exclusions(&mounts)?;
        let overlay = &container.overlay;
        let roots = scan::Roots {
            upper: overlay.upper.clone(),
            lowers: overlay.lowers.clone(),
            data_only: overlay.data_only.clone(),
            lowers_known: true,
            namespace: overlay.namespace,
        };
        let options = scan::Options {
            jobs,
            uid_map: &container.uid_map,
            gid_map: &container.gid_map,
            exclusions: &exclusions,
            caps: self.caps,
            runtime_root_mode: container.runtime_root_mode,
            cancel: cancel.flag(),
        };
        let again = earlier.map(|earlier| Scan::again(earlier, &roots, &options));
        match again.transpose()?.flatten() {
            Some(scan) => Ok(scan),
            None => Ok(Scan::new(&roots, &options)?),
        }
    }
}
