//! The traced system calls: their possible errors, and which arguments identify the object of a call.

use nix::errno::Errno;

/// The object of a call, by the arguments that identify it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CallObject {
    /// A descriptor.
    Fd(usize),
    /// A directory descriptor, and a path relative to it.
    At(usize, usize),
    /// A path.
    Path(usize),
    /// No named object: memory, a new process, a new descriptor.
    Process,
}

/// One system call.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    pub number: i64,
    pub name: &'static str,
    pub about: CallObject,
    pub errors: &'static [Errno],
    /// The argument with the length, which the kernel may not use in full.
    pub length: Option<usize>,
}

macro_rules! calls {
    ($($name:ident $number:ident $about:expr, $errors:expr, $length:expr;)*) => {
        &[$(Call { number: libc::$number, name: stringify!($name), about: $about, errors: $errors, length: $length }),*]
    };
}

use CallObject::{At, Fd, Path, Process};
use Errno::{
    EAGAIN, ECONNREFUSED, EINTR, EIO, EMFILE, ENOLCK, ENOMEM, ENOSPC, EOPNOTSUPP, EPERM, ERANGE,
    ETIMEDOUT,
};

const OPEN: &[Errno] = &[EIO, EMFILE, ENOMEM, EINTR];
const READ: &[Errno] = &[EIO, EINTR, ENOMEM];
const WRITE: &[Errno] = &[EIO, ENOSPC, EINTR];
const LOOK: &[Errno] = &[EIO, ENOMEM];
const MAKE: &[Errno] = &[EIO, ENOSPC];
const DESCRIPTOR: &[Errno] = &[EMFILE, ENOMEM];
const INTERRUPTED: &[Errno] = &[EINTR];
/// The C library reports the same error for every reason why a thread cannot be started.
const BEGIN: &[Errno] = &[EAGAIN];

/// All traced calls. The errors of a descriptor that is a socket or a pipe are determined where it is known to be one.
pub const CALLS: &[Call] = calls! {
    open SYS_open Path(0), OPEN, None;
    openat SYS_openat At(0, 1), OPEN, None;
    openat2 SYS_openat2 At(0, 1), OPEN, None;
    read SYS_read Fd(0), READ, Some(2);
    pread64 SYS_pread64 Fd(0), READ, Some(2);
    readv SYS_readv Fd(0), READ, None;
    preadv SYS_preadv Fd(0), READ, None;
    preadv2 SYS_preadv2 Fd(0), READ, None;
    write SYS_write Fd(0), WRITE, Some(2);
    pwrite64 SYS_pwrite64 Fd(0), WRITE, Some(2);
    writev SYS_writev Fd(0), WRITE, Some(2);
    sendto SYS_sendto Fd(0), WRITE, Some(2);
    sendmsg SYS_sendmsg Fd(0), WRITE, None;
    recvfrom SYS_recvfrom Fd(0), READ, Some(2);
    recvmsg SYS_recvmsg Fd(0), READ, None;
    copy_file_range SYS_copy_file_range Fd(2), WRITE, Some(4);
    sendfile SYS_sendfile Fd(0), WRITE, Some(3);
    ioctl SYS_ioctl Fd(0), &[EIO, ENOSPC, EOPNOTSUPP, EINTR, ENOMEM], None;
    getdents64 SYS_getdents64 Fd(0), LOOK, Some(2);
    newfstatat SYS_newfstatat At(0, 1), LOOK, None;
    statx SYS_statx At(0, 1), LOOK, None;
    stat SYS_stat Path(0), LOOK, None;
    lstat SYS_lstat Path(0), LOOK, None;
    fstat SYS_fstat Fd(0), LOOK, None;
    statfs SYS_statfs Path(0), LOOK, None;
    fstatfs SYS_fstatfs Fd(0), LOOK, None;
    name_to_handle_at SYS_name_to_handle_at At(0, 1), LOOK, None;
    readlink SYS_readlink Path(0), LOOK, None;
    readlinkat SYS_readlinkat At(0, 1), LOOK, None;
    getxattr SYS_getxattr Path(0), &[EIO, ENOMEM, ERANGE], None;
    lgetxattr SYS_lgetxattr Path(0), &[EIO, ENOMEM, ERANGE], None;
    fgetxattr SYS_fgetxattr Fd(0), &[EIO, ENOMEM, ERANGE], None;
    listxattr SYS_listxattr Path(0), &[EIO, ENOMEM, ERANGE], None;
    llistxattr SYS_llistxattr Path(0), &[EIO, ENOMEM, ERANGE], None;
    flistxattr SYS_flistxattr Fd(0), &[EIO, ENOMEM, ERANGE], None;
    mmap SYS_mmap Process, &[ENOMEM], None;
    rename SYS_rename Path(1), MAKE, None;
    renameat SYS_renameat At(2, 3), MAKE, None;
    renameat2 SYS_renameat2 At(2, 3), MAKE, None;
    link SYS_link Path(1), MAKE, None;
    linkat SYS_linkat At(2, 3), MAKE, None;
    unlink SYS_unlink Path(0), LOOK, None;
    unlinkat SYS_unlinkat At(0, 1), LOOK, None;
    rmdir SYS_rmdir Path(0), LOOK, None;
    mkdir SYS_mkdir Path(0), MAKE, None;
    mkdirat SYS_mkdirat At(0, 1), MAKE, None;
    fsync SYS_fsync Fd(0), MAKE, None;
    fdatasync SYS_fdatasync Fd(0), MAKE, None;
    syncfs SYS_syncfs Fd(0), MAKE, None;
    sync_file_range SYS_sync_file_range Fd(0), MAKE, None;
    ftruncate SYS_ftruncate Fd(0), WRITE, None;
    fallocate SYS_fallocate Fd(0), WRITE, None;
    lseek SYS_lseek Fd(0), &[EIO], None;
    flock SYS_flock Fd(0), &[EINTR, ENOLCK], None;
    fcntl SYS_fcntl Fd(0), &[EAGAIN, ENOMEM], None;
    fchmod SYS_fchmod Fd(0), &[EIO, EPERM], None;
    chmod SYS_chmod Path(0), &[EIO, EPERM], None;
    fchmodat SYS_fchmodat At(0, 1), &[EIO, EPERM], None;
    fchown SYS_fchown Fd(0), &[EIO, EPERM], None;
    utimensat SYS_utimensat At(0, 1), &[EIO, EPERM], None;
    socket SYS_socket Process, DESCRIPTOR, None;
    connect SYS_connect Fd(0), &[ECONNREFUSED, ETIMEDOUT], None;
    setsockopt SYS_setsockopt Fd(0), &[ENOMEM], None;
    clone SYS_clone Process, BEGIN, None;
    clone3 SYS_clone3 Process, BEGIN, None;
    fork SYS_fork Process, BEGIN, None;
    vfork SYS_vfork Process, BEGIN, None;
    execve SYS_execve Path(0), &[ENOMEM, EIO], None;
    wait4 SYS_wait4 Process, INTERRUPTED, None;
    waitid SYS_waitid Process, INTERRUPTED, None;
    epoll_create1 SYS_epoll_create1 Process, DESCRIPTOR, None;
    epoll_ctl SYS_epoll_ctl Process, &[ENOMEM], None;
    epoll_wait SYS_epoll_wait Process, INTERRUPTED, None;
    epoll_pwait SYS_epoll_pwait Process, INTERRUPTED, None;
    poll SYS_poll Process, INTERRUPTED, None;
    ppoll SYS_ppoll Process, INTERRUPTED, None;
    eventfd2 SYS_eventfd2 Process, DESCRIPTOR, None;
    pipe2 SYS_pipe2 Process, DESCRIPTOR, None;
    // Not socketpair: tokio panics if its own fails. `cli::signals` makes several beforehand, which `few_descriptors` covers.
    memfd_create SYS_memfd_create Process, DESCRIPTOR, None;
    pidfd_open SYS_pidfd_open Process, DESCRIPTOR, None;
    timerfd_create SYS_timerfd_create Process, DESCRIPTOR, None;
    inotify_init1 SYS_inotify_init1 Process, DESCRIPTOR, None;
    open_tree SYS_open_tree At(0, 1), &[ENOMEM, EMFILE, EPERM], None;
    mount SYS_mount Path(1), &[ENOMEM, EPERM], None;
};

/// Returns the call with this number.
pub fn of(number: i64) -> Option<&'static Call> {
    CALLS.iter().find(|call| call.number == number)
}
