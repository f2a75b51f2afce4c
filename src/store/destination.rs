//! The destination of a saved image (a registry, a layout directory or a layout archive) behind one interface.

mod harbor_extras;
mod tag;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use bytes::Bytes;
use tokio::runtime::Handle;

use crate::common::digest::Digest;
use crate::common::private_files::FileMode;
use crate::common::reference::ReferenceError;
use crate::store::harbor::{self, Budget};
use crate::store::layout::{self, Archive, ArchiveBlob, Directory, DirectoryBlob, GiveUp, Reader};
use crate::store::registry::NewProject;
use crate::store::registry::error::Step;
use crate::store::registry::{self, Denial, Reference, Registries, Repository, Writer};

pub use tag::Replaceable;
pub(crate) use tag::SAVE_ANNOTATION;

/// Tag used if none is given.
const DEFAULT_TAG: &str = "latest";

/// The DESTINATION argument or the value of `--base`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// `[docker://]HOST[:PORT]/REPOSITORY[:TAG]`
    Registry(Reference),
    /// `oci:DIR[:TAG]`
    Layout {
        /// The layout's directory.
        dir: PathBuf,
        /// Tag as written.
        tag: Option<String>,
    },
    /// `oci-archive:FILE[:TAG]`
    Archive {
        /// The tar file.
        file: PathBuf,
        /// Tag as written.
        tag: Option<String>,
    },
}

/// A text that does not name a place for an image.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TargetError {
    /// The registry reference is invalid.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// A digest was given, which is known only once the image exists.
    #[error("{0:?} names a digest: an image is saved under a tag, HOST[:PORT]/REPOSITORY[:TAG]")]
    Digest(String),
    /// The transport is that of another tool, or the text is a URL.
    #[error(
        "{0:?} is not supported: write HOST[:PORT]/REPOSITORY[:TAG], oci:DIR[:TAG] or oci-archive:FILE[:TAG]"
    )]
    Transport(String),
    /// The path after the colon is missing.
    #[error("{0:?} names no path: write {0}PATH[:TAG]")]
    NoPath(&'static str),
    /// The tag of a layout violates the grammar.
    #[error(
        "{0:?} is not a tag for a layout: letters and digits, single - . _ : @ + between them, parts separated by /, \
         255 bytes at most (a path cannot hold a colon)"
    )]
    LayoutTag(String),
}

impl FromStr for Target {
    type Err = TargetError;

    /// Parses a destination. A layout's path ends at the first colon, as in skopeo and Podman. A digest is accepted
    /// here, for reading a base image, and refused by [`Target::for_saving`].
    fn from_str(text: &str) -> Result<Self, TargetError> {
        if let Some(rest) = text.strip_prefix("oci:") {
            let (path, tag) = split_layout("oci:", rest)?;
            return Ok(Self::Layout { dir: path, tag });
        }
        if let Some(rest) = text.strip_prefix("oci-archive:") {
            let (path, tag) = split_layout("oci-archive:", rest)?;
            return Ok(Self::Archive { file: path, tag });
        }
        let scheme = text
            .split_once("://")
            .map(|(scheme, _)| scheme)
            .filter(|&s| s != "docker");
        let others = [
            "docker-archive",
            "docker-daemon",
            "containers-storage",
            "dir",
            "docker",
            "ostree",
            "sif",
        ];
        let transport = text.split_once(':').is_some_and(|(t, rest)| {
            others.contains(&t)
                && !rest.starts_with("//")
                && !rest.bytes().next().is_some_and(|b| b.is_ascii_digit())
        });
        if scheme.is_some() || transport {
            return Err(TargetError::Transport(text.chars().take(200).collect()));
        }
        Ok(Self::Registry(text.parse()?))
    }
}

impl Target {
    /// Parses `text` as DESTINATION. The tag may be missing, but a digest is an error.
    pub fn for_saving(text: &str) -> Result<Self, TargetError> {
        match text.parse()? {
            Self::Registry(Reference {
                digest: Some(_), ..
            }) => Err(TargetError::Digest(text.chars().take(400).collect())),
            Self::Layout { tag: Some(tag), .. } | Self::Archive { tag: Some(tag), .. }
                if tag.contains("@sha256:") =>
            {
                Err(TargetError::Digest(text.chars().take(400).collect()))
            }
            target => Ok(target),
        }
    }

    /// Returns the tag, `latest` if none was given.
    pub fn tag(&self) -> &str {
        let tag = match self {
            Self::Registry(reference) => &reference.tag,
            Self::Layout { tag, .. } | Self::Archive { tag, .. } => tag,
        };
        tag.as_deref().unwrap_or(DEFAULT_TAG)
    }

    /// Returns the same place with another tag.
    ///
    /// Fails if `tag` cannot be one there.
    pub fn with_tag(&self, tag: &str) -> Result<Self, TargetError> {
        let text = self.to_string();
        let place = text.strip_suffix(self.tag()).unwrap_or(&text);
        let target = Self::for_saving(&format!("{place}{tag}"))?;
        if target.tag() != tag {
            return Err(TargetError::LayoutTag(tag.chars().take(300).collect()));
        }
        Ok(target)
    }

    /// Returns the name of the saved image: `HOST/REPOSITORY@sha256:…`, `oci:DIR@sha256:…` or
    /// `oci-archive:FILE@sha256:…`.
    pub fn with_digest(&self, digest: &Digest) -> String {
        match self {
            Self::Registry(reference) => format!("{}@{digest}", reference.name()),
            Self::Layout { dir, .. } => format!("oci:{}@{digest}", dir.display()),
            Self::Archive { file, .. } => format!("oci-archive:{}@{digest}", file.display()),
        }
    }

    /// Opens a layout for reading and returns it with the tag as written. Returns `None` for a registry.
    pub fn open_layout(&self) -> Result<Option<(Reader, Option<&str>)>, layout::Error> {
        match self {
            Self::Registry(_) => Ok(None),
            Self::Layout { dir, tag } => Ok(Some((Reader::directory(dir)?, tag.as_deref()))),
            Self::Archive { file, tag } => Ok(Some((Reader::archive(file)?, tag.as_deref()))),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(Reference {
                host, repository, ..
            }) => write!(f, "{host}/{repository}:{}", self.tag()),
            Self::Layout { dir, .. } => write!(f, "oci:{}:{}", dir.display(), self.tag()),
            Self::Archive { file, .. } => {
                write!(f, "oci-archive:{}:{}", file.display(), self.tag())
            }
        }
    }
}

fn split_layout(
    prefix: &'static str,
    rest: &str,
) -> Result<(PathBuf, Option<String>), TargetError> {
    let (path, tag) = match rest.split_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (rest, None),
    };
    if path.is_empty() {
        return Err(TargetError::NoPath(prefix));
    }
    if let Some(tag) = tag.filter(|t| !is_ref_name(t)) {
        return Err(TargetError::LayoutTag(tag.chars().take(300).collect()));
    }
    Ok((path.into(), tag.map(str::to_owned)))
}

/// Checks the grammar of `org.opencontainers.image.ref.name` (image-spec `annotations.md`): components of alphanumerics
/// with single separators (`-._:@+` or `--`) between them, joined by slashes.
fn is_ref_name(text: &str) -> bool {
    let component = |part: &str| {
        let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        edge(part.chars().next())
            && edge(part.chars().last())
            && part
                .split(|c: char| c.is_ascii_alphanumeric())
                .all(|s| matches!(s, "" | "-" | "." | "_" | ":" | "@" | "+" | "--"))
    };
    text.len() <= 255 && text.split('/').all(component)
}

/// An error of any destination.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Access to a registry failed.
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// Access to a Harbor registry failed, with details from Harbor's API.
    #[error(transparent)]
    Harbor(harbor::Error),
    /// Access to a layout failed.
    #[error(transparent)]
    Layout(#[from] layout::Error),
    /// The tag names an image that has to stay.
    #[error("the tag {tag:?} exists and names {digest}, which is not to be replaced")]
    TagExists {
        /// The tag.
        tag: String,
        /// Digest of the image that it names.
        digest: Digest,
    },
    /// A file is there that is not an archive of one image, and would be replaced as a whole.
    #[error(
        "{} exists, and an archive replaces the whole file: it is not one with a single image, which could be compared; \
         take another file, or remove it", path.display()
    )]
    FileExists {
        /// Path of the file.
        path: PathBuf,
    },
    /// The tag names another image than the one for which the permission to replace it was given.
    #[error(
        "the tag {tag:?} has moved to {digest} while the save asked whether it may replace what it named: try again"
    )]
    TagMoved {
        /// The tag.
        tag: String,
        /// Digest of the image that it names.
        digest: Digest,
    },
    /// The runtime was shut down during a write.
    #[error("the save ended while a file was being written")]
    RuntimeStopped,
}

impl Error {
    /// Returns whether a later attempt may succeed (exit code 75). For a [`BlobWriter`], writing the blob again from
    /// its start may succeed now.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Registry(e) => e.retryable(),
            Self::Harbor(e) => e.retryable(),
            Self::Layout(e) => e.retryable(),
            Self::TagMoved { .. } => true,
            Self::TagExists { .. } | Self::FileExists { .. } | Self::RuntimeStopped => false,
        }
    }

    /// Returns whether the destination did not take a manifest, perhaps because it lacks some of its blobs: a garbage
    /// collection may have removed them after they were found.
    pub fn may_lack_blobs(&self) -> bool {
        let reply = match self {
            Self::Layout(layout::Error::Incomplete { .. }) => return true,
            Self::Registry(registry::Error::Reply(reply)) => reply,
            _ => return false,
        };
        let unknown = reply.code.as_deref() == Some("MANIFEST_BLOB_UNKNOWN");
        reply.step == Step::WriteManifest && (reply.status == 500 || unknown)
    }

    /// Returns a stable name of the cause in snake case, if it has one of its own.
    pub fn code(&self) -> Option<&'static str> {
        match self {
            Self::Registry(e) => Denial::of(e).map(Denial::code),
            Self::Harbor(e) => e.code(),
            Self::TagExists { .. } | Self::FileExists { .. } | Self::TagMoved { .. } => {
                Some("tag_exists")
            }
            Self::Layout(_) | Self::RuntimeStopped => None,
        }
    }

    /// Returns whether the cause is a lack of permission: credentials, quota or policy (exit code 77).
    pub fn not_permitted(&self) -> bool {
        match self {
            Self::Registry(e) => e.not_permitted(),
            Self::Harbor(e) => e.not_permitted(),
            Self::Layout(e) => e.not_permitted(),
            Self::TagExists { .. } | Self::FileExists { .. } => true,
            Self::TagMoved { .. } | Self::RuntimeStopped => false,
        }
    }
}

impl From<harbor::Error> for Error {
    /// Unwraps an error to which Harbor's API added no details.
    fn from(error: harbor::Error) -> Self {
        match error {
            harbor::Error::Registry(error) => Self::Registry(error),
            error => Self::Harbor(error),
        }
    }
}

/// Settings for a layout or archive as a destination.
#[derive(Clone, Debug, Default)]
pub(crate) struct LocalFiles {
    /// Mode of created files. `None` selects the mode of an existing layout, or else access for the owner only.
    pub(crate) mode: Option<FileMode>,
    /// Directory with layouts whose blobs are linked ([`Directory::sharing`]).
    pub(crate) share_blobs: Option<PathBuf>,
}

/// A destination. Clones share the same state.
#[derive(Clone)]
pub struct Destination(Kind);

#[derive(Clone)]
enum Kind {
    Registry {
        repository: Repository,
        create_project: Option<NewProject>,
    },
    Directory(Directory),
    Archive(Archive),
}

impl Destination {
    /// Returns whether a repository (`HOST/REPOSITORY`) is charged to the same quota, that of a project of Harbor.
    pub(crate) fn shares_quota(&self, name: &str) -> bool {
        let Kind::Registry { repository, .. } = &self.0 else {
            return false;
        };
        let path = name.strip_prefix(repository.host());
        let path = path.and_then(|rest| rest.strip_prefix('/'));
        let project = |path| harbor::split(path).map(|(project, _)| project);
        path.and_then(project)
            .is_some_and(|found| project(repository.path()) == Some(found))
    }

    /// Returns whether `name` (`HOST/REPOSITORY`) is this destination.
    pub(crate) fn is_repository(&self, name: &str) -> bool {
        let Kind::Registry { repository, .. } = &self.0 else {
            return false;
        };
        let path = name.strip_prefix(repository.host());
        path.and_then(|rest| rest.strip_prefix('/')) == Some(repository.path())
    }

    /// Opens `target`. No request is sent and no file is touched before the first call.
    pub fn open(target: &Target, registries: &Registries) -> Result<Self, Error> {
        Self::open_as(target, registries, LocalFiles::default())
    }

    /// Like [`Destination::open`], with settings for a layout or archive.
    pub(crate) fn open_as(
        target: &Target,
        registries: &Registries,
        files: LocalFiles,
    ) -> Result<Self, Error> {
        Ok(Self(match target {
            Target::Registry(reference) => Kind::Registry {
                repository: registries.push_to(reference)?,
                create_project: registries.creates_projects(),
            },
            Target::Layout { dir, .. } => {
                let directory = Directory::new(dir).with_mode(files.mode);
                Kind::Directory(directory.sharing(files.share_blobs))
            }
            Target::Archive { file, .. } => {
                let mode = files.mode.unwrap_or(FileMode::PRIVATE);
                Kind::Archive(Archive::with_mode(file, mode))
            }
        }))
    }

    /// Gives the save up when the result is dropped, unless its manifest is written by then: what it wrote to a layout
    /// directory is deleted. Uploads to a registry and archives end with their writers.
    #[must_use]
    pub(crate) fn give_up_on_drop(&self) -> Option<GiveUp> {
        match &self.0 {
            Kind::Directory(directory) => Some(directory.give_up_on_drop()),
            Kind::Registry { .. } | Kind::Archive(_) => None,
        }
    }

    /// Checks whether an image can be written here: credentials, permissions and quota of a registry, or write access
    /// to a path. Leaves nothing behind except a Harbor project if its creation was requested.
    pub async fn check(&self) -> Result<(), Error> {
        match &self.0 {
            Kind::Registry {
                repository,
                create_project,
            } => Ok(harbor::check_push(repository, *create_project).await?),
            Kind::Directory(directory) => blocking(directory.clone(), |d| d.check()).await,
            Kind::Archive(archive) => blocking(archive.clone(), |a| a.check()).await,
        }
    }

    /// Checks whether the tag may be written, before anything else is: an immutable one may not.
    pub async fn check_tag(&self, tag: &str) -> Result<(), Error> {
        match &self.0 {
            Kind::Registry { repository, .. } => Ok(harbor::check_tag(repository, tag).await?),
            Kind::Directory(_) | Kind::Archive(_) => Ok(()),
        }
    }

    /// Returns what the destination's quota has left. Returns `None` if there is no limit, or it is not visible.
    pub async fn budget(&self) -> Result<Option<Budget>, Error> {
        match &self.0 {
            Kind::Registry { repository, .. } => Ok(Budget::of(repository).await?),
            Kind::Directory(_) | Kind::Archive(_) => Ok(None),
        }
    }

    /// Returns how many blobs should be written concurrently.
    pub(crate) fn max_concurrent_blobs(&self) -> usize {
        match &self.0 {
            Kind::Registry { .. } => registry::MAX_CONCURRENT_UPLOADS,
            Kind::Directory(_) | Kind::Archive(_) => 1,
        }
    }

    /// Returns the size in bytes of an existing blob. A blob whose size differs from `size` counts as missing.
    pub async fn has_blob(&self, digest: &Digest, size: Option<u64>) -> Result<Option<u64>, Error> {
        let digest = *digest;
        match &self.0 {
            Kind::Registry { repository, .. } => Ok(repository
                .head_blob(&digest)
                .await?
                .filter(|&found| size.is_none_or(|s| s == found))),
            Kind::Directory(directory) => {
                blocking(directory.clone(), move |d| d.has_blob(&digest, size)).await
            }
            Kind::Archive(archive) => Ok(archive.has_blob(&digest, size)),
        }
    }

    /// Mounts a blob of another repository (`HOST/REPOSITORY`) on the same registry. Returns false if it has to be
    /// uploaded.
    pub async fn mount_blob(&self, digest: &Digest, from_repository: &str) -> Result<bool, Error> {
        match &self.0 {
            Kind::Registry { repository, .. } => {
                explained(repository, repository.mount_blob(digest, from_repository)).await
            }
            Kind::Directory(_) | Kind::Archive(_) => Ok(false),
        }
    }

    /// Writes a small blob (the config).
    pub async fn put_blob(&self, bytes: Bytes, digest: &Digest) -> Result<(), Error> {
        let digest = *digest;
        match &self.0 {
            Kind::Registry { repository, .. } => {
                explained(repository, repository.put_blob(bytes, &digest)).await
            }
            Kind::Directory(directory) => {
                blocking(directory.clone(), move |d| d.put_blob(&bytes, &digest)).await
            }
            Kind::Archive(archive) => {
                blocking(archive.clone(), move |a| a.put_blob(&bytes, &digest)).await
            }
        }
    }

    /// Starts a blob whose digest is known only at its end. `handle` is the runtime for the requests to a registry.
    ///
    /// An archive accepts one blob at a time: the first write of another one blocks until this one ends.
    pub fn begin_blob(&self, handle: Handle) -> Result<BlobWriter, Error> {
        Ok(BlobWriter(match &self.0 {
            Kind::Registry { repository, .. } => {
                WriterKind::Registry(repository.begin_blob(handle))
            }
            Kind::Directory(directory) => WriterKind::Directory(directory.begin_blob()?),
            Kind::Archive(archive) => WriterKind::Archive(archive.begin_blob()),
        }))
    }

    /// Writes the manifest under its tag. This is the last step, before which the image is not visible. Returns the
    /// digest.
    pub async fn put_manifest(
        &self,
        bytes: Bytes,
        media_type: &str,
        tag: &str,
    ) -> Result<Digest, Error> {
        let (media_type_, tag_) = (media_type.to_owned(), tag.to_owned());
        match &self.0 {
            Kind::Registry { repository, .. } => {
                let put = repository.put_manifest(bytes, media_type, tag);
                explained(repository, put).await
            }
            Kind::Directory(directory) => {
                blocking(directory.clone(), move |d| {
                    d.put_manifest(&bytes, &media_type_, &tag_)
                })
                .await
            }
            Kind::Archive(archive) => {
                blocking(archive.clone(), move |a| {
                    a.put_manifest(&bytes, &media_type_, &tag_)
                })
                .await
            }
        }
    }
}

/// Carries out a request, and finds out why it failed.
async fn explained<T>(
    repository: &Repository,
    request: impl Future<Output = Result<T, registry::Error>>,
) -> Result<T, Error> {
    match request.await {
        Ok(done) => Ok(done),
        Err(error) => Err(harbor::explain(repository, error).await.into()),
    }
}

/// Runs blocking work on the runtime's blocking threads.
async fn blocking<K: Send + 'static, T: Send + 'static>(
    kind: K,
    work: impl FnOnce(K) -> Result<T, layout::Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(move || work(kind)).await {
        Ok(result) => Ok(result?),
        Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
        Err(_) => Err(Error::RuntimeStopped),
    }
}

/// A blob that is being written. If dropped before [`BlobWriter::finish`], nothing of it remains.
pub struct BlobWriter(WriterKind);

enum WriterKind {
    Registry(Writer),
    Directory(DirectoryBlob),
    Archive(ArchiveBlob),
    /// A blob of a layout that has been completed.
    Finished,
}

impl BlobWriter {
    /// Hands bytes over, blocking while the destination is behind. For threads, not for async tasks. If the error is
    /// retryable, a new writer has to be obtained from [`BlobWriter::retry`].
    pub fn write(&mut self, bytes: Bytes) -> Result<(), Error> {
        match &mut self.0 {
            WriterKind::Registry(writer) => match writer.write(bytes) {
                Ok(()) => Ok(()),
                // A registry may refuse a blob at any of its bytes.
                Err(error) => {
                    let (handle, repository) = (writer.handle(), writer.repository());
                    Err(handle.block_on(harbor::explain(repository, error)).into())
                }
            },
            WriterKind::Directory(blob) => Ok(blob.write(&bytes)?),
            WriterKind::Archive(blob) => Ok(blob.write(&bytes)?),
            WriterKind::Finished => Err(Error::RuntimeStopped),
        }
    }

    /// Completes the blob under `digest`. Fails if `size` differs from the number of bytes written.
    pub async fn finish(mut self, digest: &Digest, size: u64) -> Result<(), Error> {
        self.try_finish(digest, size).await
    }

    /// Like [`BlobWriter::finish`], but keeps the writer, so that a failure can be followed by [`BlobWriter::retry`].
    pub async fn try_finish(&mut self, digest: &Digest, size: u64) -> Result<(), Error> {
        let digest = *digest;
        if let WriterKind::Registry(writer) = &mut self.0 {
            return match writer.try_finish(&digest, size).await {
                Ok(()) => Ok(()),
                Err(error) => Err(harbor::explain(writer.repository(), error).await.into()),
            };
        }
        match std::mem::replace(&mut self.0, WriterKind::Finished) {
            WriterKind::Directory(blob) => blocking(blob, move |b| b.finish(&digest, size)).await,
            WriterKind::Archive(blob) => blocking(blob, move |b| b.finish(&digest, size)).await,
            WriterKind::Registry(_) | WriterKind::Finished => Err(Error::RuntimeStopped),
        }
    }

    /// Returns a writer for another attempt after `error`, once the required pause is over. The same bytes have to be
    /// written to it from their start, whatever part of them is sent again.
    ///
    /// Returns the error if another attempt is not worthwhile: the retries of the blob or of the save are used up, or
    /// the destination is a layout, whose errors are never transient.
    pub async fn retry(self, error: Error) -> Result<Self, Error> {
        match (self.0, error) {
            (WriterKind::Registry(writer), Error::Registry(error)) => {
                Ok(Self(WriterKind::Registry(writer.retry(error).await?)))
            }
            (_, error) => Err(error),
        }
    }

    /// Cancels the blob and waits until the destination has cleaned up. Dropping the writer does the same without
    /// waiting.
    pub(crate) async fn abort(self) {
        if let WriterKind::Registry(writer) = self.0 {
            writer.abort().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_of_one_project_share_its_quota() {
        let registries = Registries::new(crate::store::registry::Access::default());
        let open = |text: &str| {
            let target = Target::for_saving(text).unwrap();
            Destination::open(&target, &registries).unwrap()
        };
        let destination = open("h.example:5000/alice/note:1");
        for (name, shares, is) in [
            ("h.example:5000/alice/note", true, true),
            ("h.example:5000/alice/other/deeper", true, false),
            ("h.example:5000/alice2/note", false, false),
            ("h.example:5000/alice", false, false),
            ("h.example/alice/note", false, false),
        ] {
            assert_eq!(destination.shares_quota(name), shares, "{name}");
            assert_eq!(destination.is_repository(name), is, "{name}");
        }
        assert!(!open("oci:/tmp/x").shares_quota("h.example/alice/note"));
    }

    #[test]
    fn targets() {
        for (text, shown) in [
            ("127.0.0.1:5000/a/b", "127.0.0.1:5000/a/b:latest"),
            ("docker://r.example/a:1", "r.example/a:1"),
            ("oci:/tmp/x", "oci:/tmp/x:latest"),
            ("oci:x:v1", "oci:x:v1"),
            (
                "oci-archive:x.tar:docker.io/library/debian:12",
                "oci-archive:x.tar:docker.io/library/debian:12",
            ),
            ("dir:5000/x", "dir:5000/x:latest"), // valid name of a host
        ] {
            assert_eq!(
                Target::for_saving(text).map(|t| t.to_string()),
                Ok(shown.to_owned()),
                "{text}"
            );
        }
        let digest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        for bad in [
            "",
            "x",
            "oci:",
            "oci::tag",
            "oci:x:",
            "oci:x:a b",
            "oci:x:../y",
            "oci-archive:",
            "docker-archive:x.tar",
            "dir:/tmp/x",
            "docker:x",
            "https://r.example/x",
            "containers-storage:x",
            "r.example/x:-",
            "r.example/../x",
            &format!("r.example/x@{digest}"),
            &format!("r.example/x:1@{digest}"),
            &format!("oci:x:y@{digest}"),
        ] {
            assert!(Target::for_saving(bad).is_err(), "{bad}");
        }
        // A base image may be read by its digest.
        assert!(format!("r.example/x@{digest}").parse::<Target>().is_ok());
    }

    #[test]
    fn the_result_is_named_by_its_digest() {
        let digest = Digest::of("");
        let named = |text: &str| Target::for_saving(text).unwrap().with_digest(&digest);
        assert_eq!(named("r.example/x:1"), format!("r.example/x@{digest}"));
        assert_eq!(named("oci:/x:1"), format!("oci:/x@{digest}"));
    }
}
