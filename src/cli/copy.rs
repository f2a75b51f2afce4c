//! `image cp`: copies a file or a directory out of an image.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use rustix::fs::{Mode, OFlags};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::args::{Format, ImageCp};
use super::exit::Usage;
use super::print::print;
use super::reading::{self, Layers};
use super::{Stdout, text};
use crate::common::digest::Digest;
use crate::common::escape;
use crate::common::message::{count, size};
use crate::image::extract::{self, Extracted};
use crate::image::verify::tree::Kind;
use crate::save;
use crate::save::copy_out::{self, Written};
use crate::save::indexed;
use crate::store::destination::Target;

/// Output of `image cp`.
#[derive(Serialize)]
struct CopyView {
    image: String,
    digest: Digest,
    path: String,
    destination: String,
    #[serde(flatten)]
    written: Written,
    layers: usize,
    layers_read: usize,
    image_bytes: u64,
    bytes_read: u64,
}

pub(super) fn run(args: &ImageCp) -> anyhow::Result<()> {
    let (image, path) = split(&args.source)?;
    let target: Target = image.parse().map_err(save::Error::from)?;
    let place = Place::of(&args.destination)?;
    let streams = matches!(place, Place::Stdout);
    if streams && args.format == Format::Json {
        let why = "the tar stream goes to stdout: --format json has no place there";
        return Err(Usage(why.to_owned()).into());
    }
    let path = path.as_bytes().to_vec();
    let view = reading::run(&args.registry, Some(&target), async |registries, cancel| {
        let opened = Arc::new(reading::open(target.clone(), registries, image).await?);
        let digest = opened.manifest.digest;
        let layers = Layers::new(opened, cancel);
        let cancel = cancel.clone();
        let name = escape::limited(image, 4096);
        let destination = escape::path(args.destination.as_os_str().as_bytes());
        reading::blocking(move || {
            let spool = place.spool()?;
            let mut open = |layer: usize, path: Option<&[u8]>| layers.open_for(layer, path);
            let found = match extract::find(&path, layers.len(), &mut open, spool) {
                Err(error) if indexed::needs_whole(&error) => {
                    layers.use_no_index();
                    extract::find(&path, layers.len(), &mut open, place.spool()?)?
                }
                found => found?,
            };
            let written = place.write(&path, &found, &cancel)?;
            anyhow::ensure!(
                written.paths > 0 || written.devices_left_out_count == 0,
                "/{} is a device node, and none is created: copy to - for a tar stream",
                escape::path(&found.path)
            );
            Ok(CopyView {
                image: name,
                digest,
                path: format!("/{}", escape::path(&found.path)),
                destination,
                written,
                layers: layers.len(),
                layers_read: found.layers_read,
                image_bytes: layers.stored_bytes(),
                bytes_read: layers.bytes_read(),
            })
        })
        .await
    })?;
    warn(&view.written);
    if streams {
        return Ok(());
    }
    print(args.format, &view, summary)
}

/// Splits `IMAGE:/PATH` at the first colon before a slash, but for that of a transport.
fn split(text: &str) -> Result<(&str, &str), Usage> {
    let transports = ["docker://", "oci:", "oci-archive:"];
    let of = transports
        .iter()
        .find(|transport| text.starts_with(**transport))
        .map_or(0, |transport| transport.len());
    match text[of..].find(":/") {
        Some(colon) if colon > 0 => Ok((&text[..of + colon], &text[of + colon + 1..])),
        _ => Err(Usage(format!(
            "{text:?} names no path in an image: write IMAGE:/PATH, e.g. oci:/srv/images:monday:/etc/hosts"
        ))),
    }
}

/// Where what was found goes.
enum Place {
    Stdout,
    /// Into a directory that is there.
    Into(PathBuf),
    /// Under a name in a directory; whether a directory is meant.
    As {
        parent: PathBuf,
        name: Vec<u8>,
        directory: bool,
    },
}

impl Place {
    fn of(destination: &Path) -> Result<Self, Usage> {
        let bytes = destination.as_os_str().as_bytes();
        if bytes == b"-" {
            return Ok(Self::Stdout);
        }
        if destination.is_dir() {
            return Ok(Self::Into(destination.to_owned()));
        }
        let parent = destination.parent().unwrap_or(Path::new(""));
        let parent = if parent.as_os_str().is_empty() {
            Path::new(".")
        } else {
            parent
        };
        match destination.file_name() {
            Some(name) if parent.is_dir() => Ok(Self::As {
                parent: parent.to_owned(),
                name: name.as_bytes().to_vec(),
                directory: bytes.ends_with(b"/"),
            }),
            _ => Err(Usage(format!(
                "{} is no directory, and there is none to make it in",
                text::path(destination)
            ))),
        }
    }

    /// Makes an unnamed file, on the file system of the destination if there is one.
    fn spool(&self) -> anyhow::Result<std::fs::File> {
        let made = match self {
            Self::Stdout => tempfile::tempfile(),
            Self::Into(directory)
            | Self::As {
                parent: directory, ..
            } => tempfile::tempfile_in(directory),
        };
        made.context("cannot make a temporary file")
    }

    fn write(
        &self,
        asked: &[u8],
        found: &Extracted,
        cancel: &CancellationToken,
    ) -> anyhow::Result<Written> {
        let is_directory = found
            .members
            .get(b"".as_slice())
            .is_some_and(|top| top.node.kind == Kind::Directory);
        // The content of a directory is asked for, or the root, which has no name.
        let content = asked.ends_with(b"/.") || found.path.is_empty();
        let name = if content {
            b""
        } else {
            copy_out::name_of(asked, found)
        };
        Ok(match self {
            Self::Stdout => {
                let mut out = io::BufWriter::with_capacity(1 << 20, io::stdout().lock());
                let written = copy_out::archive::write(found, name, &mut out, cancel);
                match written {
                    Err(copy_out::Error::Archive(error)) => return Err(Stdout(error).into()),
                    written => {
                        out.flush().map_err(Stdout)?;
                        written?
                    }
                }
            }
            Self::Into(directory) => {
                copy_out::directory::write(found, &open(directory)?, name, cancel)?
            }
            Self::As {
                parent,
                name,
                directory,
            } => {
                if *directory && !is_directory {
                    let why = "the destination ends in a slash, but what is copied is no directory";
                    return Err(Usage(why.to_owned()).into());
                }
                copy_out::directory::write(found, &open(parent)?, name, cancel)?
            }
        })
    }
}

fn open(directory: &Path) -> anyhow::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(directory, flags, Mode::empty())
        .map_err(io::Error::from)
        .with_context(|| format!("cannot open {}", text::path(directory)))
}

/// Reports what could not be set or was left out.
fn warn(written: &Written) {
    if written.devices_left_out_count > 0 {
        tracing::warn!(
            first = ?written.devices_left_out,
            "{} left out: copy to - for a tar stream with them",
            count(written.devices_left_out_count, "device node is", "device nodes are")
        );
    }
    if written.owners_not_set > 0 {
        tracing::warn!(
            "the owners of {} could not be set; set-user-ID and set-group-ID are removed there",
            count(written.owners_not_set, "path", "paths")
        );
    }
    if written.xattrs_not_set > 0 {
        tracing::warn!(
            "{} could not be set",
            count(
                written.xattrs_not_set,
                "extended attribute",
                "extended attributes"
            )
        );
    }
}

fn summary(view: &CopyView) -> String {
    let paths = match view.written.paths {
        1 => String::new(),
        paths => format!("{}, ", count(paths, "path", "paths")),
    };
    format!(
        "{}: {paths}{}, read {} of {} in {}\n",
        view.path,
        size(view.written.bytes),
        size(view.bytes_read),
        size(view.image_bytes),
        count(view.layers, "layer", "layers"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_ends_the_name_of_an_image() {
        for (source, image, path) in [
            ("r.example/x:1:/etc/hosts", "r.example/x:1", "/etc/hosts"),
            ("r.example:5000/x:/a:/b", "r.example:5000/x", "/a:/b"),
            ("docker://r.example/x:/a", "docker://r.example/x", "/a"),
            ("oci:/srv/x:tag:/a", "oci:/srv/x:tag", "/a"),
            ("oci:x:/a", "oci:x", "/a"),
            ("oci-archive:x.tar:t:/", "oci-archive:x.tar:t", "/"),
        ] {
            assert_eq!(split(source).ok(), Some((image, path)), "{source}");
        }
        for bad in [
            "",
            "x",
            "oci:/srv/x",
            ":/x",
            "r.example/x:1",
            "docker://r/x",
        ] {
            assert!(split(bad).is_err(), "{bad}");
        }
    }
}
