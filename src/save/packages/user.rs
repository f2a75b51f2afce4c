//! The user by which an image is started. A runtime looks for a name in the image's `/etc/passwd`, which a user of the
//! session may have replaced, and starts no container without it.
//!
//! Source: passwd(5); `user.go` of runc, which containerd, CRI-O, Docker and Podman use.

use super::tree::{Place, Tree};
use crate::common::escape;
use crate::image::packages::StartUser;

const PASSWD: &[u8] = b"etc/passwd";
/// Maximum size of an `/etc/passwd` that is read, in bytes.
const MAX_PASSWD: u64 = 1 << 20;
/// Maximum length of a text in bytes.
const MAX_TEXT: usize = 256;

/// Returns the user of `USER[:GROUP]`, which needs an entry in `/etc/passwd` if it is a name. `None` if there is none, or
/// if `/etc/passwd` cannot be read or is too large.
pub(super) fn of(user: &str, now: &Tree) -> Option<StartUser> {
    let name = user.split(':').next().filter(|name| !name.is_empty())?;
    let mut found = StartUser {
        name: escape::limited(name, MAX_TEXT),
        missing: false,
        mounted: false,
        home: None,
        shell: None,
    };
    if name.parse::<u32>().is_ok() {
        return Some(found);
    }
    match now.file(PASSWD).ok()? {
        Place::Mounted => found.mounted = true,
        Place::Nowhere => found.missing = true,
        Place::File(file) => {
            let content = now.read(&file, MAX_PASSWD + 1).ok()??;
            if content.len() as u64 > MAX_PASSWD {
                return None;
            }
            match entry(&content, name) {
                None => found.missing = true,
                Some((home, shell)) => {
                    (found.home, found.shell) = (Some(home), Some(shell));
                }
            }
        }
    }
    Some(found)
}

/// Returns home directory and shell of the first entry of a name.
fn entry(passwd: &[u8], name: &str) -> Option<(String, String)> {
    let lines = passwd.split(|&byte| byte == b'\n');
    let mut fields = lines
        .map(|line| line.trim_ascii().split(|&byte| byte == b':'))
        .find_map(|mut fields| (fields.next()? == name.as_bytes()).then_some(fields))?;
    let text = |field: Option<&[u8]>| {
        let field = escape::path(field.unwrap_or_default());
        escape::limited(&field, MAX_TEXT)
    };
    // After name, password, UID, GID and comment.
    let home = text(fields.nth(4));
    Some((home, text(fields.next())))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::node::overlay::mount::OverlayMount;
    use crate::node::overlay::xattr::Namespace;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    const JOVYAN: &str = "jovyan:x:1000:100:Jo:/home/jovyan:/bin/bash";

    struct Image(tempfile::TempDir);

    impl Image {
        fn new() -> std::io::Result<Self> {
            let it = Self(tempfile::tempdir()?);
            fs::create_dir_all(it.0.path().join("upper/etc"))?;
            fs::create_dir_all(it.0.path().join("lower/etc"))?;
            fs::write(
                it.0.path().join("lower/etc/passwd"),
                format!("root:x:0:0::/root:/bin/sh\n\n{JOVYAN}\nshort\n"),
            )?;
            Ok(it)
        }

        fn upper(&self, path: &str) -> std::path::PathBuf {
            self.0.path().join("upper").join(path)
        }

        fn of(&self, user: &str, mounts: &[&str]) -> std::io::Result<Option<StartUser>> {
            let overlay = OverlayMount {
                upper: self.0.path().join("upper"),
                lowers: vec![self.0.path().join("lower")],
                data_only: Vec::new(),
                id_mapped: Vec::new(),
                namespace: Namespace::User,
                index: false,
            };
            let mounts: BTreeSet<_> = mounts.iter().map(|at| at.as_bytes().to_vec()).collect();
            Ok(of(user, &Tree::new(&overlay, true, mounts)?))
        }
    }

    fn user(name: &str) -> StartUser {
        StartUser {
            name: name.to_owned(),
            missing: false,
            mounted: false,
            home: None,
            shell: None,
        }
    }

    #[test]
    fn a_name_needs_an_entry_and_a_number_none() -> Outcome {
        let it = Image::new()?;
        let there = StartUser {
            home: Some("/home/jovyan".to_owned()),
            shell: Some("/bin/bash".to_owned()),
            ..user("jovyan")
        };
        assert_eq!(it.of("jovyan:users", &[])?, Some(there));
        assert_eq!(it.of("1000:100", &[])?, Some(user("1000")));
        assert_eq!(it.of("", &[])?, None);
        fs::write(it.upper("etc/passwd"), "jovyan2:x:1::/:\n#jovyan:x\n")?;
        let missing = Some(StartUser {
            missing: true,
            ..user("jovyan")
        });
        assert_eq!(it.of("jovyan", &[])?, missing);
        assert_eq!(it.of("1000", &[])?, Some(user("1000")));
        // An entry without all its fields is one.
        fs::write(it.upper("etc/passwd"), "jovyan")?;
        let bare = it.of("jovyan", &[])?.ok_or("no user")?;
        assert_eq!((bare.missing, bare.home), (false, Some(String::new())));
        fs::remove_file(it.upper("etc/passwd"))?;
        fs::create_dir(it.upper("etc/passwd"))?;
        assert_eq!(it.of("jovyan", &[])?, missing);
        Ok(())
    }

    #[test]
    fn what_is_mounted_large_or_linked() -> Outcome {
        let it = Image::new()?;
        let mounted = it.of("jovyan", &["etc/passwd"])?.ok_or("no user")?;
        assert_eq!((mounted.mounted, mounted.missing), (true, false));
        // A link leads into the image, not to the node.
        symlink("/../../usr/passwd", it.upper("etc/passwd"))?;
        assert!(it.of("jovyan", &[])?.is_some_and(|user| user.missing));
        fs::create_dir(it.upper("usr"))?;
        fs::write(it.upper("usr/passwd"), JOVYAN)?;
        assert!(it.of("jovyan", &[])?.is_some_and(|user| !user.missing));
        fs::write(it.upper("usr/passwd"), vec![b'\n'; MAX_PASSWD as usize + 1])?;
        assert_eq!(it.of("jovyan", &[])?, None);
        Ok(())
    }
}
