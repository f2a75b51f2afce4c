//! The kernel's own view of overlay directories, for comparison.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};
use upperdeck::image::verify::tree::Tree;
use upperdeck::node::overlay::xattr::Namespace;

/// A detached read-only overlay mount, which is unmounted when dropped.
pub struct View(OwnedFd);

impl View {
    /// Mounts `lowers`, topmost first. `empty` is an empty directory, because the kernel requires two layers.
    pub fn new(
        lowers: &[PathBuf],
        data: &[PathBuf],
        empty: &Path,
        namespace: Namespace,
    ) -> Result<Self> {
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).context("fsopen overlay")?;
        let fs = context.as_fd();
        fsconfig_set_string(fs, "source", "upperdeck-test")?;
        match namespace {
            Namespace::User => fsconfig_set_flag(fs, "userxattr")?,
            Namespace::Trusted => {
                fsconfig_set_string(fs, "redirect_dir", "follow")?;
                fsconfig_set_string(fs, "metacopy", "on")?;
            }
        }
        for lower in lowers.iter().map(PathBuf::as_path).chain([empty]) {
            fsconfig_set_string(fs, "lowerdir+", lower)?;
        }
        for lower in data {
            fsconfig_set_string(fs, "datadir+", lower)?;
        }
        fsconfig_create(fs).context("mounting the overlay (see dmesg)")?;
        Ok(Self(fsmount(
            fs,
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::MOUNT_ATTR_RDONLY,
        )?))
    }

    /// Returns its merged tree.
    pub fn tree(&self) -> Result<Tree> {
        let path = format!("/proc/self/fd/{}/.", self.0.as_raw_fd());
        Ok(Tree::from_directory(Path::new(&path), false)?)
    }
}
