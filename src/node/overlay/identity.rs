//! The rights with which a volume is read: those of the container's process, so that nothing gets into an image that
//! the container could not have read itself.
//!
//! A thread takes on these rights while it reads: file system user and group, supplementary groups, and no capability
//! that bypasses read permissions unless the container has it (`credentials(7)`, `capabilities(7)`). The kernel then
//! decides by mode, access control list or whatever else the file system checks. All of these are attributes of one
//! thread: `setfsuid(2)` and the raw `setgroups` and `capset` calls do not change other threads.

use std::cell::{OnceCell, RefCell};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::unistd::{setfsgid, setfsuid};
use rustix::fs::{Access, AtFlags, CWD};
use rustix::process::{Gid, getgroups};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_thread_groups,
};

use super::id_map::{self, IdMapping};
use super::xattr::proc_path;

/// What a process may read in addition to what modes and access control lists allow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadCapability {
    /// Nothing.
    Nothing,
    /// Everything: `CAP_DAC_OVERRIDE` or `CAP_DAC_READ_SEARCH` in the user namespace of this program.
    All,
    /// Files whose owner and group are mapped in its own user namespace, in which it has one of these capabilities.
    Mapped {
        /// Map of user IDs.
        uids: Vec<IdMapping>,
        /// Map of group IDs.
        gids: Vec<IdMapping>,
    },
}

/// A process's rights to files. IDs are those that this program sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// File system user.
    pub uid: u32,
    /// File system group.
    pub gid: u32,
    /// Supplementary groups, sorted.
    pub groups: Vec<u32>,
    /// What its capabilities add.
    pub read_capability: ReadCapability,
}

/// The identity of a thread before it took on another one.
struct ThreadIdentity {
    uid: nix::unistd::Uid,
    gid: nix::unistd::Gid,
    groups: Vec<Gid>,
    sets: CapabilitySets,
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<Identity>>> = const { RefCell::new(None) };
    static ORIGINAL: OnceCell<ThreadIdentity> = const { OnceCell::new() };
}

/// A guard that restores the thread's previous identity when dropped.
#[must_use = "the thread is what it was before as soon as this is dropped"]
#[derive(Debug)]
#[allow(
    clippy::option_option,
    reason = "two kinds of nothing: nothing changed, and this program's own"
)]
pub struct IdentityGuard {
    /// The previous identity, if it was a different one.
    before: Option<Option<Arc<Identity>>>,
}

/// Makes this thread read as `who`, or as this program if `who` is `None`. Costs nothing if the thread does so already.
///
/// Fails if this program may not take on the identity; nothing is read then. The error is not
/// [`io::ErrorKind::PermissionDenied`], which stands for what the identity itself may not do.
pub fn enter(who: Option<&Arc<Identity>>) -> io::Result<IdentityGuard> {
    let same = CURRENT.with_borrow(|current| match (current, who) {
        (None, None) => true,
        (Some(current), Some(who)) => Arc::ptr_eq(current, who),
        _ => false,
    });
    if same {
        return Ok(IdentityGuard { before: None });
    }
    let before = CURRENT.with_borrow(Clone::clone);
    if let Err(error) = switch_to(who) {
        // A part of the change may have been made.
        let _ = switch_to(before.as_ref());
        let uid = who.map_or(0, |who| who.uid);
        return Err(io::Error::other(format!(
            "reading as user {uid} is not permitted (CAP_SETUID, CAP_SETGID): {error}"
        )));
    }
    CURRENT.set(who.cloned());
    Ok(IdentityGuard {
        before: Some(before),
    })
}

impl Drop for IdentityGuard {
    fn drop(&mut self) {
        if let Some(before) = self.before.take() {
            if let Err(error) = switch_to(before.as_ref()) {
                tracing::error!(%error, "a thread cannot take its own rights back; it goes on with fewer");
            }
            CURRENT.set(before);
        }
    }
}

fn switch_to(who: Option<&Arc<Identity>>) -> io::Result<()> {
    ORIGINAL.with(|own| {
        let own = match own.get() {
            Some(own) => own,
            None => {
                let _ = own.set(ThreadIdentity::now()?);
                own.get().ok_or_else(|| io::Error::other("no identity"))?
            }
        };
        match who {
            Some(who) => own.assume(who),
            None => own.restore(),
        }
    })
}

/// An invalid ID: with it, `setfsuid` changes nothing and returns the current ID.
const INVALID_ID: u32 = u32::MAX;

impl ThreadIdentity {
    fn now() -> io::Result<Self> {
        Ok(Self {
            uid: setfsuid(INVALID_ID.into()),
            gid: setfsgid(INVALID_ID.into()),
            groups: getgroups()?,
            sets: capabilities(None)?,
        })
    }

    fn restore(&self) -> io::Result<()> {
        set_fs_user(self.uid, self.gid)?;
        set_groups(&self.groups)?;
        set_capabilities(None, self.sets)?;
        Ok(())
    }

    fn assume(&self, who: &Identity) -> io::Result<()> {
        let groups: Vec<Gid> = who.groups.iter().map(|&gid| Gid::from_raw(gid)).collect();
        set_groups(&groups)?;
        set_fs_user(who.uid.into(), who.gid.into())?;
        // The change of the user removed some harmless capabilities, and may not have removed all that bypass
        // permissions.
        let reads = who.read_capability != ReadCapability::Nothing;
        set_capabilities(None, self.without(reads))?;
        Ok(())
    }

    fn without(&self, reads: bool) -> CapabilitySets {
        let mut sets = self.sets;
        sets.effective.remove(CapabilitySet::DAC_OVERRIDE);
        if !reads {
            sets.effective.remove(CapabilitySet::DAC_READ_SEARCH);
        }
        sets
    }
}

/// Sets the supplementary groups. Their order does not matter.
fn set_groups(groups: &[Gid]) -> io::Result<()> {
    let sorted = |groups: &[Gid]| {
        let mut raw: Vec<u32> = groups.iter().map(|gid| gid.as_raw()).collect();
        raw.sort_unstable();
        raw
    };
    // If nothing changes, no right to change the groups is needed.
    if sorted(&getgroups()?) != sorted(groups) {
        set_thread_groups(groups)?;
    }
    Ok(())
}

fn set_fs_user(uid: nix::unistd::Uid, gid: nix::unistd::Gid) -> io::Result<()> {
    setfsgid(gid);
    setfsuid(uid);
    // Neither call reports whether it changed anything.
    if setfsgid(INVALID_ID.into()) == gid && setfsuid(INVALID_ID.into()) == uid {
        Ok(())
    } else {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}

impl Identity {
    /// Returns whether the identity may open `fd` for reading, and for a directory also look up names in it. The thread
    /// must have taken on the identity.
    pub fn may_read(&self, fd: impl AsFd, directory: bool) -> io::Result<bool> {
        let access = if directory {
            Access::READ_OK | Access::EXEC_OK
        } else {
            Access::READ_OK
        };
        self.may(fd.as_fd(), access)
    }

    /// Returns whether the identity may look up names in the directory.
    pub(crate) fn may_search(&self, fd: impl AsFd) -> io::Result<bool> {
        self.may(fd.as_fd(), Access::EXEC_OK)
    }

    /// Returns whether the kernel alone cannot decide. Every component of a path is checked then.
    pub(super) fn is_mapped(&self) -> bool {
        matches!(self.read_capability, ReadCapability::Mapped { .. })
    }

    fn may(&self, fd: BorrowedFd<'_>, access: Access) -> io::Result<bool> {
        let ReadCapability::Mapped { uids, gids } = &self.read_capability else {
            return allowed(fd, access);
        };
        // Follows `capable_wrt_inode_uidgid` of the kernel: a capability in a user namespace applies to the IDs that it
        // maps.
        let stat = rustix::fs::fstat(fd)?;
        if id_map::container_id(uids, stat.st_uid).is_some()
            && id_map::container_id(gids, stat.st_gid).is_some()
        {
            return Ok(true);
        }
        set_read_capability(false)?;
        let answer = allowed(fd, access);
        set_read_capability(true)?;
        answer
    }
}

/// Sets or clears the capability to bypass read permissions in this thread.
fn set_read_capability(reads: bool) -> io::Result<()> {
    ORIGINAL.with(|own| match own.get() {
        Some(own) => Ok(set_capabilities(None, own.without(reads))?),
        None => Err(io::ErrorKind::PermissionDenied.into()),
    })
}

fn allowed(fd: BorrowedFd<'_>, access: Access) -> io::Result<bool> {
    use rustix::io::Errno;
    let path = proc_path(fd);
    match rustix::fs::accessat(CWD, path, access, AtFlags::EACCESS) {
        Ok(()) => Ok(true),
        Err(Errno::ACCESS | Errno::PERM) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
