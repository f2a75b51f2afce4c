//! Parses the options of an overlay mount as `/proc/PID/mountinfo` shows them, and finds its upper and lower
//! directories.
//!
//! Sources: `proc_pid_mountinfo(5)` for the lines; `fs/overlayfs/params.c` of the kernel for the options and their two
//! layers of escapes (octal by `seq_show_option`, backslashes by the mounter); each was verified on Linux 6.18.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::xattr::Namespace;
use crate::node::procfs::{Malformed, unescape_octal};

/// Maximum number of layers that the kernel stacks (`OVL_MAX_STACK`).
const MAX_LAYERS: usize = 500;

/// An overlay mount. Paths are the node's and already include a `--host-root` prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverlayMount {
    /// The upper directory.
    pub upper: PathBuf,
    /// The merged lower directories, topmost first (in the kernel's order).
    pub lowers: Vec<PathBuf>,
    /// Data-only lowers (`::`, `datadir+`), topmost first. They are never merged; only metacopy files refer to them.
    pub data_only: Vec<PathBuf>,
    /// Those of the lowers that were mounted ID-mapped: the IDs in them are the container's, not the node's.
    pub id_mapped: Vec<PathBuf>,
    /// The namespace of the kernel's marks: `trusted.overlay.*`, or `user.overlay.*` with `userxattr`.
    pub namespace: Namespace,
    /// `index=on`: hard links of lower files survive copy-up.
    pub index: bool,
}

/// The reason why a mount cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The text does not have the kernel's format.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// There is no upper directory, so nothing can have been written.
    #[error(
        "the overlay is mounted read-only, without an upper directory: there is nothing to save"
    )]
    NoUpper,
    /// A directory that the mount names does not exist.
    #[error(
        "the mount's {role} directory {} is not there (looked for {}); \
         is --host-root right, and is the container still running?",
        path.display(),
        paths(tried)
    )]
    Missing {
        /// `lower`, `upper`, `data-only lower`.
        role: &'static str,
        /// The path in the mount option.
        path: PathBuf,
        /// All paths that were tried.
        tried: Vec<PathBuf>,
    },
    /// A relative or doubly escaped name matches several directories.
    #[error("the mount's {role} directory {} can be any of {}; guessing would be wrong", path.display(), paths(found))]
    Ambiguous {
        /// `lower` or `upper`.
        role: &'static str,
        /// The path in the mount option.
        path: PathBuf,
        /// The directories that it matches.
        found: Vec<PathBuf>,
    },
    /// A directory could not be examined.
    #[error("{}: {source}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// The error of the kernel.
        source: io::Error,
    },
}

fn paths(paths: &[PathBuf]) -> String {
    paths
        .iter()
        .map(|p| p.display().to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

/// An overlay's options before its directories are located.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverlayOptions {
    /// Topmost first. They may be relative to a directory that the kernel does not reveal.
    pub lowers: Vec<PathBuf>,
    /// Data-only lowers, topmost first.
    pub data_only: Vec<PathBuf>,
    /// The upper directory as text and, if backslashes allow a second reading, that reading.
    pub upper: Vec<PathBuf>,
    /// `userxattr` was given.
    pub user_xattr: bool,
    /// The value of `index=`. The kernel shows it only if it differs from the module's default.
    pub index: Option<bool>,
}

impl OverlayOptions {
    /// Parses the file system options of an overlay's mountinfo line.
    pub fn parse(super_options: &[u8]) -> Result<Self, MountError> {
        let malformed = |text: &[u8], expected| {
            MountError::Malformed(Malformed {
                text: OsString::from_vec(text.to_vec()),
                expected,
            })
        };
        let mut options = Self {
            lowers: Vec::new(),
            data_only: Vec::new(),
            upper: Vec::new(),
            user_xattr: false,
            index: None,
        };
        // A comma inside a value is escaped in octal, so every comma is a separator.
        for option in super_options.split(|&b| b == b',') {
            let equals = option.iter().position(|&b| b == b'=');
            let (name, value) = match equals {
                Some(at) => (&option[..at], unescape_octal(&option[at + 1..])),
                None => (option, Vec::new()),
            };
            match name {
                b"lowerdir" => {
                    let (lowers, data_only) = split_lowerdir(&value).ok_or_else(|| {
                        malformed(
                            option,
                            "directories between : or, before data-only ones, ::",
                        )
                    })?;
                    options.lowers.extend(lowers);
                    options.data_only.extend(data_only);
                }
                // Only these two are shown as they are on disk.
                b"lowerdir+" => options.lowers.push(path(value)),
                b"datadir+" => options.data_only.push(path(value)),
                // If the path was given as text, the kernel removed backslashes from it; if it was given as a
                // descriptor, the kernel shows the plain path.
                b"upperdir" => {
                    let plain = unescape_backslash(&value);
                    if plain != value {
                        options.upper.push(path(plain));
                    }
                    options.upper.push(path(value));
                }
                b"userxattr" => options.user_xattr = true,
                b"index" => options.index = Some(value == b"on"),
                _ => {}
            }
            if options.lowers.len() + options.data_only.len() > MAX_LAYERS {
                return Err(malformed(name, "no more than 500 layers"));
            }
        }
        if options.lowers.is_empty() {
            return Err(malformed(super_options, "at least one lowerdir"));
        }
        if options.upper.is_empty() {
            return Err(MountError::NoUpper);
        }
        Ok(options)
    }

    /// Finds the upper directory. `locate` translates a path of the mount to one of this program and fails with
    /// [`io::ErrorKind::NotFound`] if it does not exist.
    pub fn locate_upper(
        &self,
        bases: &[PathBuf],
        locate: &dyn Fn(&Path) -> io::Result<PathBuf>,
    ) -> Result<PathBuf, MountError> {
        let mut tried = Vec::new();
        let mut found: Vec<PathBuf> = Vec::new();
        for upper in &self.upper {
            let candidates = if upper.is_absolute() {
                vec![upper.clone()]
            } else {
                bases.iter().map(|b| b.join(upper)).collect()
            };
            for candidate in candidates {
                match look(locate, &candidate)? {
                    Some(path) if found.contains(&path) => {}
                    Some(path) => found.push(path),
                    None => tried.push(candidate),
                }
            }
        }
        let named = self.upper[0].clone();
        match found.len() {
            0 => Err(MountError::Missing {
                role: "upper",
                path: named,
                tried,
            }),
            1 => Ok(found.remove(0)),
            _ => Err(MountError::Ambiguous {
                role: "upper",
                path: named,
                found,
            }),
        }
    }

    /// Finds the lower and data-only directories. Relative ones are searched in `bases` (directories from which the
    /// runtime may have mounted); all must exist in one and the same base, and only in that one.
    pub fn locate_lowers(
        &self,
        bases: &[PathBuf],
        locate: &dyn Fn(&Path) -> io::Result<PathBuf>,
    ) -> Result<(Vec<PathBuf>, Vec<PathBuf>), MountError> {
        let all: Vec<&PathBuf> = self.lowers.iter().chain(&self.data_only).collect();
        let (mut missing, mut tried) = (0, Vec::new());
        let mut found: Vec<Vec<PathBuf>> = Vec::new();
        let any_relative = all.iter().any(|p| p.is_relative());
        let here = [PathBuf::from("/")];
        for base in if any_relative { bases } else { &here } {
            let mut set = Vec::with_capacity(all.len());
            for (at, lower) in all.iter().enumerate() {
                let candidate = base.join(lower);
                let Some(path) = look(locate, &candidate)? else {
                    missing = missing.max(at);
                    tried.push(candidate);
                    break;
                };
                set.push(path);
            }
            if set.len() == all.len() && !found.contains(&set) {
                found.push(set);
            }
        }
        match found.len() {
            0 => {
                let role = if missing < self.lowers.len() {
                    "lower"
                } else {
                    "data-only lower"
                };
                Err(MountError::Missing {
                    role,
                    path: all[missing].clone(),
                    tried,
                })
            }
            1 => {
                let mut lowers = found.remove(0);
                let data_only = lowers.split_off(self.lowers.len());
                Ok((lowers, data_only))
            }
            _ => {
                let at = all.iter().position(|p| p.is_relative()).unwrap_or(0);
                let found = found
                    .into_iter()
                    .map(|mut set| set.swap_remove(at))
                    .collect();
                Err(MountError::Ambiguous {
                    role: "lower",
                    path: all[at].clone(),
                    found,
                })
            }
        }
    }

    /// Returns the mount with its directories located: `bases` are searched first, then the ancestors of the upper
    /// directory (never the upper itself, which belongs to the container). `index_default` is the module's parameter.
    pub fn resolve(
        &self,
        bases: &[PathBuf],
        index_default: bool,
        locate: &dyn Fn(&Path) -> io::Result<PathBuf>,
    ) -> Result<OverlayMount, MountError> {
        let upper = self.locate_upper(bases, locate)?;
        let mut bases = bases.to_vec();
        for named in self.upper.iter().filter(|u| u.is_absolute()) {
            bases.extend(named.ancestors().skip(1).map(Path::to_path_buf));
        }
        let (lowers, data_only) = self.locate_lowers(&bases, locate)?;
        Ok(self.mount(upper, lowers, data_only, index_default))
    }

    /// Returns the mount with directories that the caller has located.
    pub(crate) fn mount(
        &self,
        upper: PathBuf,
        lowers: Vec<PathBuf>,
        data_only: Vec<PathBuf>,
        index_default: bool,
    ) -> OverlayMount {
        OverlayMount {
            upper,
            lowers,
            data_only,
            id_mapped: Vec::new(),
            namespace: if self.user_xattr {
                Namespace::User
            } else {
                Namespace::Trusted
            },
            index: self.index.unwrap_or(index_default),
        }
    }
}

fn look(
    locate: &dyn Fn(&Path) -> io::Result<PathBuf>,
    path: &Path,
) -> Result<Option<PathBuf>, MountError> {
    match locate(path) {
        Ok(found) => Ok(Some(found)),
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(source) => Err(MountError::Io {
            path: path.to_path_buf(),
            source,
        }),
    }
}

/// Splits `a:b::c::d` into merged [a, b] and data-only [c, d]. A backslash makes the next byte literal.
fn split_lowerdir(value: &[u8]) -> Option<(Vec<PathBuf>, Vec<PathBuf>)> {
    let (mut merged, mut data_only) = (Vec::new(), Vec::new());
    let mut current = Vec::new();
    let mut in_data = false;
    let mut bytes = value.iter().copied().peekable();
    loop {
        let end_of_part = match bytes.next() {
            Some(b'\\') => {
                current.push(bytes.next().unwrap_or(b'\\'));
                continue;
            }
            Some(b':') => {
                let double = bytes.next_if_eq(&b':').is_some();
                // Only data-only directories may follow the first one.
                if in_data && !double {
                    return None;
                }
                Some(double)
            }
            Some(other) => {
                current.push(other);
                continue;
            }
            None => None,
        };
        if current.is_empty() {
            return None;
        }
        let part = path(std::mem::take(&mut current));
        if in_data {
            data_only.push(part);
        } else {
            merged.push(part);
        }
        match end_of_part {
            Some(double) => in_data |= double,
            None => return Some((merged, data_only)),
        }
    }
}

/// Replaces `\:` by `:`, as the kernel does before it looks a path up.
fn unescape_backslash(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut bytes = bytes.iter().copied();
    while let Some(byte) = bytes.next() {
        out.push(if byte == b'\\' {
            bytes.next().unwrap_or(byte)
        } else {
            byte
        });
    }
    out
}

fn path(bytes: Vec<u8>) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(paths: &[PathBuf]) -> Vec<&str> {
        paths.iter().map(|p| p.to_str().unwrap()).collect()
    }

    /// Lines as Linux 6.18 wrote them for real mounts of directories with these names.
    #[test]
    fn names_survive_both_layers_of_escapes() {
        let cases: &[(&str, &[&str], &[&str], &str)] = &[
            (
                "rw,lowerdir=/w/l1:/w/l2,upperdir=/w/u,workdir=/w/wk,uuid=on",
                &["/w/l1", "/w/l2"],
                &[],
                "/w/u",
            ),
            (
                "rw,lowerdir=/w/a\\134:b:/w/l2,upperdir=/w/u\\134:1",
                &["/w/a:b", "/w/l2"],
                &[],
                "/w/u:1",
            ),
            (
                "rw,lowerdir=/w/c\\134\\054d:/w/l2,upperdir=/w/u\\134\\0542",
                &["/w/c,d", "/w/l2"],
                &[],
                "/w/u,2",
            ),
            (
                "rw,lowerdir=/w/e\\040f:/w/l2,upperdir=/w/u\\0404",
                &["/w/e f", "/w/l2"],
                &[],
                "/w/u 4",
            ),
            (
                "rw,lowerdir=/w/g\\134\\134h:/w/l2,upperdir=/w/u\\134\\1343",
                &["/w/g\\h", "/w/l2"],
                &[],
                "/w/u\\3",
            ),
            (
                "rw,lowerdir=/w/n\\012l:/w/l2,upperdir=/w/u=5",
                &["/w/n\nl", "/w/l2"],
                &[],
                "/w/u=5",
            ),
            (
                "rw,lowerdir=/w/l2,upperdir=/w/u:1",
                &["/w/l2"],
                &[],
                "/w/u:1",
            ),
            (
                "rw,lowerdir=/w/l1:/w/l2::/w/d1::/w/d2,upperdir=/w/u",
                &["/w/l1", "/w/l2"],
                &["/w/d1", "/w/d2"],
                "/w/u",
            ),
            (
                "rw,lowerdir+=/w/a:b,lowerdir+=/w/c\\054d,lowerdir+=/w/g\\134h,datadir+=/w/d1,upperdir=/w/u",
                &["/w/a:b", "/w/c,d", "/w/g\\h"],
                &["/w/d1"],
                "/w/u",
            ),
        ];
        for (line, lowers, data_only, upper) in cases {
            let options = OverlayOptions::parse(line.as_bytes()).unwrap();
            assert_eq!(strings(&options.lowers), *lowers, "{line}");
            assert_eq!(strings(&options.data_only), *data_only, "{line}");
            assert_eq!(strings(&options.upper)[0], *upper, "{line}");
        }
    }

    #[test]
    fn flags_are_read_and_defaults_are_the_modules() {
        let line = b"rw,lowerdir=/a,upperdir=/u,redirect_dir=nofollow,index=on,uuid=on,userxattr";
        let options = OverlayOptions::parse(line).unwrap();
        assert_eq!((options.user_xattr, options.index), (true, Some(true)));
        let plain = OverlayOptions::parse(b"rw,lowerdir=/a,upperdir=/u").unwrap();
        assert_eq!((plain.user_xattr, plain.index), (false, None));
        let here = |p: &Path| Ok(p.to_path_buf());
        assert!(plain.resolve(&[], true, &here).unwrap().index);
        assert!(!plain.resolve(&[], false, &here).unwrap().index);
    }

    #[test]
    fn an_overlay_without_upper_and_nonsense_are_refused() {
        assert!(matches!(
            OverlayOptions::parse(b"ro,lowerdir=/a:/b,redirect_dir=on"),
            Err(MountError::NoUpper)
        ));
        let many = format!("lowerdir={},upperdir=/u", vec!["/a"; 501].join(":"));
        for bad in [
            "rw",
            "upperdir=/u",
            "lowerdir=,upperdir=/u",
            "lowerdir=/a:::/b,upperdir=/u",
            "lowerdir=/a::/b:/c,upperdir=/u",
            "lowerdir=:/a,upperdir=/u",
            "lowerdir=/a:,upperdir=/u",
            &many,
        ] {
            assert!(
                matches!(
                    OverlayOptions::parse(bad.as_bytes()),
                    Err(MountError::Malformed { .. })
                ),
                "{bad}"
            );
        }
    }

    fn only(there: &'static [&'static str]) -> impl Fn(&Path) -> io::Result<PathBuf> {
        move |p| {
            let is_there = there.contains(&p.to_str().unwrap());
            if is_there {
                Ok(p.to_path_buf())
            } else {
                Err(io::ErrorKind::NotFound.into())
            }
        }
    }

    /// containerd and Docker shorten long options and mount from their own directory.
    #[test]
    fn relative_lowers_are_found_above_the_upper_and_nowhere_by_guess() {
        let options = OverlayOptions::parse(b"lowerdir=2/fs:1/fs,upperdir=/s/5/fs").unwrap();
        let mount = options
            .resolve(
                &[],
                false,
                &only(&["/s/5/fs", "/s/2/fs", "/s/1/fs", "/2/fs"]),
            )
            .unwrap();
        assert_eq!(strings(&mount.lowers), ["/s/2/fs", "/s/1/fs"]);
        // One of them is in another directory, so this base does not match.
        let e = options
            .resolve(&[], false, &only(&["/s/5/fs", "/s/2/fs", "/1/fs"]))
            .unwrap_err();
        assert!(
            matches!(&e, MountError::Missing { role: "lower", path, .. } if path == Path::new("1/fs")),
            "{e}"
        );
        // Inside the upper, the container may have created anything.
        let e = options
            .resolve(
                &[],
                false,
                &only(&["/s/5/fs", "/s/5/fs/2/fs", "/s/5/fs/1/fs"]),
            )
            .unwrap_err();
        assert!(matches!(e, MountError::Missing { .. }), "{e}");
        let twice = only(&["/s/5/fs", "/s/2/fs", "/s/1/fs", "/r/2/fs", "/r/1/fs"]);
        let e = options.resolve(&["/r".into()], false, &twice).unwrap_err();
        assert!(
            matches!(&e, MountError::Ambiguous { found, .. } if found.len() == 2),
            "{e}"
        );
    }

    #[test]
    fn an_upper_with_two_readings_is_not_guessed() {
        let options = OverlayOptions::parse(b"lowerdir=/a,upperdir=/u\\134:1").unwrap();
        assert_eq!(strings(&options.upper), ["/u:1", "/u\\:1"]);
        assert_eq!(
            options
                .resolve(&[], false, &only(&["/a", "/u\\:1"]))
                .unwrap()
                .upper,
            Path::new("/u\\:1")
        );
        let e = options
            .resolve(&[], false, &only(&["/a", "/u\\:1", "/u:1"]))
            .unwrap_err();
        assert!(
            matches!(e, MountError::Ambiguous { role: "upper", .. }),
            "{e}"
        );
    }
}
