//! Closes inherited descriptors that no setting refers to, because this process and those that it starts must not have
//! access to them.

use std::fs;
use std::io;

/// Closes all descriptors above 2 except `kept`.
pub(super) fn close(kept: &[u32]) -> io::Result<()> {
    let open: Vec<u32> = fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2 && !kept.contains(fd))
        .collect();
    for fd in open {
        // The list includes its own descriptor, which is closed already.
        let _ = nix::unistd::close(fd as i32);
    }
    Ok(())
}

/// Returns the descriptor that a path refers to: `/dev/fd/N`, `/proc/self/fd/N`.
pub(crate) fn from_path(value: &str) -> Option<u32> {
    ["/dev/fd/", "/proc/self/fd/", "/proc/thread-self/fd/"]
        .iter()
        .find_map(|prefix| {
            let at = value.find(prefix)? + prefix.len();
            let digits = value[at..].split(|c: char| !c.is_ascii_digit()).next()?;
            digits.parse().ok()
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_that_are_named_are_found_wherever_they_stand() {
        for (value, expected) in [
            ("/dev/fd/63", Some(63)),
            ("oci-archive:/dev/fd/5:tag", Some(5)),
            ("/proc/self/fd/7", Some(7)),
            ("/dev/fd/", None),
            ("/dev/fdx/7", None),
            ("7", None),
            ("", None),
        ] {
            assert_eq!(from_path(value), expected, "{value}");
        }
    }
}
