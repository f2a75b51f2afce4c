//! Decides for each extended attribute whether it is one of the kernel's marks, belongs to the host, or goes into the
//! image, in a single table.
//!
//! Invariants: a mark of the mount's own namespace never reaches a layer; what the container itself could see under a
//! name that collides with a mark (kernels escape it) reaches the layer unescaped; what only the host gives meaning to
//! never reaches a layer.

use std::borrow::Cow;
use std::os::fd::{AsRawFd as _, BorrowedFd};

/// The namespace in which an overlay stores its marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Namespace {
    /// `trusted.overlay.*`, the default; readable with CAP_SYS_ADMIN only.
    Trusted,
    /// `user.overlay.*`, mounts with `userxattr`.
    User,
}

impl Namespace {
    /// Returns the prefix of every mark, with its trailing dot.
    pub(crate) fn prefix(self) -> &'static str {
        match self {
            Self::Trusted => "trusted.overlay.",
            Self::User => "user.overlay.",
        }
    }

    /// Returns the full name of a mark, e.g. `trusted.overlay.opaque`.
    pub fn name(self, mark: &str) -> String {
        format!("{}{mark}", self.prefix())
    }
}

/// A mark that changes the meaning of an entry. The others (`origin`, `impure`, ...) only matter to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// `y`: the contents of this directory in the lowers are hidden. `x`: it may contain whiteouts that are regular
    /// files.
    Opaque,
    /// The lowers have this directory (or a metacopy file's data) under another name.
    Redirect,
    /// The data of this file is in a lower.
    Metacopy,
    /// This empty regular file is a whiteout, if its directory is marked `opaque=x`.
    Whiteout,
    /// Hard link count of an indexed file, relative to the upper's or the lower's.
    Nlink,
    /// The file is immutable or append-only (`chattr +i`, `+a`) in the container.
    Protected,
    /// For the kernel alone: `origin`, `impure`, `uuid`, and any future mark.
    Kernel,
}

/// The mark of immutable and append-only files (Linux 5.13 and later).
pub(crate) const PROTECTED: &str = "protattr";

/// What happens to an extended attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum XattrAction<'a> {
    /// It goes into the layer, under this name.
    Keep(Cow<'a, [u8]>),
    /// It is one of the overlay's own marks.
    Mark(Mark),
    /// It belongs to the host, or cannot be represented in a layer.
    Drop,
}

/// Returns the fate of the attribute `name` on an overlay with marks in `namespace`.
pub fn classify(name: &[u8], namespace: Namespace) -> XattrAction<'_> {
    if let Some(mark) = name.strip_prefix(namespace.prefix().as_bytes()) {
        return match mark {
            _ if is_invalid_pax_name(mark) => XattrAction::Drop,
            b"opaque" => XattrAction::Mark(Mark::Opaque),
            b"redirect" => XattrAction::Mark(Mark::Redirect),
            b"metacopy" => XattrAction::Mark(Mark::Metacopy),
            b"whiteout" => XattrAction::Mark(Mark::Whiteout),
            b"nlink" => XattrAction::Mark(Mark::Nlink),
            _ if mark == PROTECTED.as_bytes() => XattrAction::Mark(Mark::Protected),
            // A mark of a nested overlay, escaped by the kernel (6.7 and later).
            _ => match mark.strip_prefix(b"overlay.") {
                Some(inner) => {
                    XattrAction::Keep(Cow::Owned([namespace.prefix().as_bytes(), inner].concat()))
                }
                None => XattrAction::Mark(Mark::Kernel),
            },
        };
    }
    classify_plain(name)
}

/// Returns whether a name cannot be written to a pax record, whose keyword ends at the first `=`: the attribute would
/// become another one.
pub(crate) fn is_invalid_pax_name(name: &[u8]) -> bool {
    name.contains(&b'=')
}

/// Returns the fate of an attribute on a file system that is not an overlay and therefore has no marks.
pub fn classify_plain(name: &[u8]) -> XattrAction<'_> {
    let keep = name == b"security.capability"
        || name.starts_with(b"user.")
        || name == b"system.posix_acl_access"
        || name == b"system.posix_acl_default";
    let keep = keep && !is_invalid_pax_name(name);
    // All others belong to the host: trusted.*, security.{selinux,ima,evm,...}, system.nfs4_acl, and those of single
    // file systems.
    if keep {
        XattrAction::Keep(Cow::Borrowed(name))
    } else {
        XattrAction::Drop
    }
}

/// An attribute whose value cannot be carried into the image.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ValueError {
    /// An ID in it lies outside the container's ID map.
    #[error("the {what} names {id}, which is outside the container's id map")]
    Unmapped {
        /// `ACL` or `file capability`.
        what: &'static str,
        /// The host's ID.
        id: u32,
    },
    /// The value does not have the kernel's format.
    #[error("the {0} has a malformed value")]
    Malformed(&'static str),
}

/// Revision and flags word of `struct vfs_ns_cap_data` (`include/uapi/linux/capability.h`).
const CAP_REVISION_MASK: u32 = 0xff00_0000;
const CAP_REVISION_2: u32 = 0x0200_0000;
const CAP_REVISION_3: u32 = 0x0300_0000;

/// Translates `security.capability` from the host's view to the container's.
///
/// A version 3 value carries the ID of the root of the user namespace that set it. If that is the container's own root,
/// its meaning inside is that of version 2, so version 2 is written, which all unpackers accept.
pub fn capability_inside(
    value: &[u8],
    map_uid: impl Fn(u32) -> Option<u32>,
) -> Result<Vec<u8>, ValueError> {
    let word = |at: usize| {
        value
            .get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .map(u32::from_le_bytes)
    };
    let magic = word(0).ok_or(ValueError::Malformed("file capability"))?;
    match (magic & CAP_REVISION_MASK, value.len()) {
        (CAP_REVISION_3, 24) => {
            let outside = word(20).ok_or(ValueError::Malformed("file capability"))?;
            let root = map_uid(outside).ok_or(ValueError::Unmapped {
                what: "file capability",
                id: outside,
            })?;
            let mut inside = value.to_vec();
            if root == 0 {
                inside.truncate(20);
                inside[..4]
                    .copy_from_slice(&(magic & !CAP_REVISION_MASK | CAP_REVISION_2).to_le_bytes());
            } else {
                inside[20..].copy_from_slice(&root.to_le_bytes());
            }
            Ok(inside)
        }
        (CAP_REVISION_2, 20) | (0x0100_0000, 12) => Ok(value.to_vec()),
        _ => Err(ValueError::Malformed("file capability")),
    }
}

/// Translates the ids in a POSIX ACL (`struct posix_acl_xattr_header` and entries, little endian, version 2).
pub fn acl_inside(
    value: &[u8],
    map_uid: impl Fn(u32) -> Option<u32>,
    map_gid: impl Fn(u32) -> Option<u32>,
) -> Result<Vec<u8>, ValueError> {
    const USER: u16 = 0x02;
    const GROUP: u16 = 0x08;
    let malformed = ValueError::Malformed("ACL");
    if value.len() < 4 || !(value.len() - 4).is_multiple_of(8) || value[..4] != 2u32.to_le_bytes() {
        return Err(malformed);
    }
    let mut inside = value.to_vec();
    for entry in inside[4..].chunks_exact_mut(8) {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        let id = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
        let mapped = match tag {
            USER => map_uid(id),
            GROUP => map_gid(id),
            _ => continue,
        };
        let mapped = mapped.ok_or(ValueError::Unmapped { what: "ACL", id })?;
        entry[4..].copy_from_slice(&mapped.to_le_bytes());
    }
    Ok(inside)
}

/// Returns a path through which the `*xattr` calls, which fail on `O_PATH` descriptors, reach the inode of a
/// descriptor.
pub(crate) fn proc_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table() {
        use Namespace::{Trusted, User};
        let keep = |name: &'static str| XattrAction::Keep(Cow::Borrowed(name.as_bytes()));
        for (namespace, name, expected) in [
            (
                Trusted,
                "trusted.overlay.opaque",
                XattrAction::Mark(Mark::Opaque),
            ),
            (
                Trusted,
                "trusted.overlay.redirect",
                XattrAction::Mark(Mark::Redirect),
            ),
            (
                Trusted,
                "trusted.overlay.metacopy",
                XattrAction::Mark(Mark::Metacopy),
            ),
            (
                Trusted,
                "trusted.overlay.origin",
                XattrAction::Mark(Mark::Kernel),
            ),
            (
                Trusted,
                "trusted.overlay.uuid",
                XattrAction::Mark(Mark::Kernel),
            ),
            (
                Trusted,
                "trusted.overlay.overlay.opaque",
                keep("trusted.overlay.opaque"),
            ),
            (User, "user.overlay.opaque", XattrAction::Mark(Mark::Opaque)),
            (
                User,
                "user.overlay.overlay.redirect",
                keep("user.overlay.redirect"),
            ),
            // The namespace of other overlays is data: rootless containers inside this one keep their marks there.
            (Trusted, "user.overlay.opaque", keep("user.overlay.opaque")),
            (User, "trusted.overlay.opaque", XattrAction::Drop),
            (Trusted, "user.note", keep("user.note")),
            (Trusted, "security.capability", keep("security.capability")),
            (
                Trusted,
                "system.posix_acl_default",
                keep("system.posix_acl_default"),
            ),
            (Trusted, "user.a=b", XattrAction::Drop),
            (User, "user.overlay.overlay.a=b", XattrAction::Drop),
            (
                Trusted,
                "trusted.overlay.protattr",
                XattrAction::Mark(Mark::Protected),
            ),
            (Trusted, "security.selinux", XattrAction::Drop),
            (Trusted, "security.ima", XattrAction::Drop),
            (Trusted, "system.nfs4_acl", XattrAction::Drop),
            (Trusted, "trusted.other", XattrAction::Drop),
            (Trusted, "btrfs.compression", XattrAction::Drop),
        ] {
            assert_eq!(classify(name.as_bytes(), namespace), expected, "{name}");
        }
    }

    #[test]
    fn capability_of_the_containers_root_becomes_version_2() {
        let mut v3 = Vec::new();
        for word in [0x0300_0001u32, 0x400, 0, 0, 0, 100_000] {
            v3.extend(word.to_le_bytes());
        }
        let inside = capability_inside(&v3, |id| id.checked_sub(100_000));
        let mut v2 = v3[..20].to_vec();
        v2[3] = 2;
        assert_eq!(inside, Ok(v2.clone()));
        assert_eq!(capability_inside(&v2, Some), Ok(v2));
        assert_eq!(
            capability_inside(&v3, |_| None),
            Err(ValueError::Unmapped {
                what: "file capability",
                id: 100_000
            })
        );
        assert_eq!(
            capability_inside(&v3[..7], Some),
            Err(ValueError::Malformed("file capability"))
        );
    }

    #[test]
    fn acl_ids_are_mapped_and_the_rest_stays() {
        let mut acl = 2u32.to_le_bytes().to_vec();
        for (tag, perm, id) in [
            (1u16, 7u16, u32::MAX),
            (2, 6, 100_033),
            (8, 4, 100_050),
            (0x20, 5, u32::MAX),
        ] {
            acl.extend(tag.to_le_bytes());
            acl.extend(perm.to_le_bytes());
            acl.extend(id.to_le_bytes());
        }
        let mapped = acl_inside(
            &acl,
            |id| id.checked_sub(100_000),
            |id| id.checked_sub(100_000),
        );
        let mut expected = acl.clone();
        expected[16..20].copy_from_slice(&33u32.to_le_bytes());
        expected[24..28].copy_from_slice(&50u32.to_le_bytes());
        assert_eq!(mapped, Ok(expected));
        assert!(acl_inside(&acl[..5], Some, Some).is_err());
    }
}
