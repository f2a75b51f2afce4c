//! `image ls` and `image rm`: lists and deletes saved images.

use anyhow::Context;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::args::{ImageLs, ImageRm, ImageTag};
use super::exit::Usage;
use super::print::print;
use super::text::{self, Align};
use super::{options, signals, write_stdout};
use crate::common::cancel::Cancelled;
use crate::store::destination::{Destination, Replaceable, Target};
use crate::store::harbor::QuotaUsage;
use crate::store::images::{
    Error, ImageEntry, ImageLocation, ImageSelector, Images, Listed, Query, Removed,
    RepositoryEntry,
};

/// Length of a shortened digest in a table.
const SHORT_DIGEST: usize = "sha256:".len() + 12;

/// Output of `image ls`.
#[derive(Serialize)]
struct ListView {
    page: u32,
    page_size: u32,
    total: u64,
    quota: Option<QuotaUsage>,
    #[serde(flatten)]
    what: Listing,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Listing {
    Repositories(Vec<RepositoryEntry>),
    Images(Vec<ImageEntry>),
}

pub(super) fn ls(args: &ImageLs) -> anyhow::Result<()> {
    let Some(place) = &args.place else {
        #[cfg(feature = "service")]
        return super::service::images::ls(args);
        #[cfg(not(feature = "service"))]
        return Err(Usage("name the place: HOST/REPOSITORY or oci:DIRECTORY".to_owned()).into());
    };
    let place: ImageLocation = place.parse()?;
    let query = Query {
        search: args.search.clone(),
        sort: args.sort,
        page: args.page,
        page_size: args.page_size,
    };
    let view = run(&args.registry, &place, async |images| {
        list(images, &place, &query).await
    })?;
    print(args.format, &view, |view| table(view, args.no_trunc))
}

async fn list(
    images: &dyn Images,
    place: &ImageLocation,
    query: &Query,
) -> Result<ListView, Error> {
    let (path, which) = place.path_and_image();
    let mut query = query.clone();
    if let Some(ImageSelector::Tag(tag)) = which {
        query.search.get_or_insert_with(|| tag.clone());
    }
    let (what, total) = if images.is_group(path) {
        repositories(images, path, &query).await?
    } else {
        match images.images(path, &query).await {
            Ok(Listed { items, total }) => (Listing::Images(items), total),
            // A plain registry has no projects, so a path that is not a repository may be a prefix of some.
            Err(missing @ Error::NotFound(_)) => {
                match repositories(images, &format!("{path}/"), &query).await {
                    Ok((what, total)) if total > 0 => (what, total),
                    _ => return Err(missing),
                }
            }
            Err(error) => return Err(error),
        }
    };
    Ok(ListView {
        page: query.page,
        page_size: query.page_size,
        total,
        quota: images.quota_usage(path).await?,
        what,
    })
}

async fn repositories(
    images: &dyn Images,
    path: &str,
    query: &Query,
) -> Result<(Listing, u64), Error> {
    let Listed { items, total } = images.repositories(path, query).await?;
    Ok((Listing::Repositories(items), total))
}

fn table(view: &ListView, no_trunc: bool) -> String {
    let or_dash = |text: Option<&str>| text.unwrap_or("-").to_owned();
    let number = |n: Option<u64>| n.map_or_else(|| "-".to_owned(), |n| n.to_string());
    let (mut out, shown) = match &view.what {
        Listing::Repositories(found) => {
            let header = [
                ("REPOSITORY", Align::Left),
                ("IMAGES", Align::Right),
                ("PULLS", Align::Right),
                ("UPDATED", Align::Left),
            ];
            let rows = found.iter().map(|entry| {
                vec![
                    entry.name.clone(),
                    number(entry.images),
                    number(entry.pulls),
                    text::time(entry.updated.as_deref()),
                ]
            });
            (text::table(&header, &rows.collect::<Vec<_>>()), found.len())
        }
        Listing::Images(found) => {
            let header = [
                ("TAG", Align::Left),
                ("DIGEST", Align::Left),
                ("ARCH", Align::Left),
                ("SIZE", Align::Right),
                ("PUSHED", Align::Left),
                ("CREATED", Align::Left),
            ];
            let rows = found.iter().map(|entry| {
                let digest = entry.digest.to_string();
                let short = &digest[..SHORT_DIGEST.min(digest.len())];
                vec![
                    if entry.tags.is_empty() {
                        "-".to_owned()
                    } else {
                        entry.tags.join(",")
                    },
                    if no_trunc {
                        digest.clone()
                    } else {
                        short.to_owned()
                    },
                    or_dash(entry.architecture.as_deref()),
                    text::bytes(entry.size),
                    text::time(entry.pushed.as_deref()),
                    text::time(entry.created.as_deref()),
                ]
            });
            (text::table(&header, &rows.collect::<Vec<_>>()), found.len())
        }
    };
    if (shown as u64) < view.total {
        out.push_str(&format!(
            "page {} of {}: {shown} of {}\n",
            view.page,
            view.total.div_ceil(u64::from(view.page_size)),
            view.total
        ));
    }
    if let Some(room) = view.quota {
        let bytes = |n| text::bytes(Some(n));
        out.push_str(&match (room.limit, room.free()) {
            (Some(limit), Some(free)) => format!(
                "{} of {} used, {} free\n",
                bytes(room.used),
                bytes(limit),
                bytes(free)
            ),
            _ => format!("{} used, no limit\n", bytes(room.used)),
        });
    }
    out
}

/// One result of `image rm`.
#[derive(Serialize)]
struct RemovedView {
    image: String,
    #[serde(flatten)]
    removed: Removed,
}

/// Deletes the images in order. Completed deletions are printed even if a later one fails.
pub(super) fn rm(args: &ImageRm) -> anyhow::Result<()> {
    let of_manager = |image: &String| !image.contains('/') && !image.starts_with("oci:");
    #[cfg(feature = "service")]
    if args.images.iter().all(of_manager) {
        return super::service::images::rm(args);
    }
    if let Some(image) = args.images.iter().find(|image| of_manager(image)) {
        return Err(Usage(format!(
            "{image:?} is a manager's, others are not: delete them by two calls"
        ))
        .into());
    }
    let places = args.images.iter().map(|image| {
        let place: ImageLocation = image.parse()?;
        match place.path_and_image() {
            (_, Some(_)) => Ok((image, place)),
            _ => Err(Error::Place {
                text: image.clone(),
                reason: "no tag and no digest: whole repositories are not deleted".to_owned(),
            }),
        }
    });
    // All arguments are parsed before anything is deleted.
    let places = places.collect::<Result<Vec<_>, Error>>()?;
    let mut views = Vec::new();
    let mut failure = None;
    for (image, place) in places {
        let removed = run(&args.registry, &place, async |images| {
            match place.path_and_image() {
                (path, Some(which)) => images.remove(path, which, args.all_tags).await,
                _ => Err(Error::NotFound(image.clone())),
            }
        });
        match removed {
            Ok(removed) => views.push(RemovedView {
                image: image.clone(),
                removed,
            }),
            Err(error) => {
                failure = Some(error);
                break;
            }
        }
    }
    if failure.is_none() || !views.is_empty() {
        print(args.format, views.as_slice(), removed_text)?;
    }
    failure.map_or(Ok(()), Err)
}

/// Gives an image another tag.
pub(super) fn tag(args: &ImageTag) -> anyhow::Result<()> {
    let from = Target::for_saving(&args.image).map_err(|error| Usage(error.to_string()))?;
    let to = from
        .with_tag(&args.tag)
        .map_err(|error| Usage(error.to_string()))?;
    let host = match &from {
        Target::Registry(reference) => Some(reference.host.clone()),
        Target::Layout { .. } => None,
        Target::Archive { .. } => {
            return Err(Usage("an archive has one image with one tag".to_owned()).into());
        }
    };
    let registries = options::registries(&args.registry, host)?;
    let cancel = CancellationToken::new();
    signals::cancel_on_signals(&cancel).context("cannot listen for SIGINT and SIGTERM")?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the I/O threads")?;
    runtime.block_on(async {
        let work = async {
            let place = Destination::open(&from, &registries)?;
            let digest = place.digest_of(from.tag()).await?;
            let digest = digest.ok_or_else(|| Error::NotFound(args.image.clone()))?;
            let rule = Replaceable {
                digest: if args.replace {
                    place.digest_of(to.tag()).await?
                } else {
                    None
                },
                save: None,
            };
            place.add_tag(&digest, to.tag(), &rule).await?;
            write_stdout(format!("{to}@{digest}\n").as_bytes())?;
            Ok::<(), anyhow::Error>(())
        };
        tokio::select! {
            done = work => done,
            () = cancel.cancelled() => Err(Cancelled.into()),
        }
    })
}

fn removed_text(views: &[RemovedView]) -> String {
    use crate::common::escape::text;
    let mut out = String::new();
    for RemovedView { image, removed } in views {
        let image = text(image);
        if removed.image_deleted {
            let tags = match removed.tags.as_slice() {
                [] => String::new(),
                tags => format!(" (was tagged {})", text(&tags.join(", "))),
            };
            let with = match removed.accessories.as_slice() {
                [] => String::new(),
                kinds => format!(", with its {}", text(&kinds.join(", "))),
            };
            out.push_str(&format!(
                "deleted {image}: {}{tags}{with}\n",
                removed.digest
            ));
        } else {
            let kept = text(&removed.kept.join(", "));
            out.push_str(&format!(
                "untagged {image}: {} stays, tagged {kept}\n",
                removed.digest
            ));
        }
    }
    let mut told: Vec<&str> = Vec::new();
    for view in views.iter().filter(|view| view.removed.image_deleted) {
        let space = view.removed.space.as_str();
        if !told.contains(&space) {
            told.push(space);
            out.push_str(&format!("note: {}\n", text(space)));
        }
    }
    out
}

/// Opens the place and runs `work` on it until a signal cancels.
fn run<T>(
    registry: &super::args::Registry,
    place: &ImageLocation,
    work: impl AsyncFnOnce(&dyn Images) -> Result<T, Error>,
) -> anyhow::Result<T> {
    let host = match place {
        ImageLocation::Registry { host, .. } => Some(host.clone()),
        ImageLocation::Layout { .. } => None,
    };
    let registries = options::registries(registry, host)?;
    let cancel = CancellationToken::new();
    signals::cancel_on_signals(&cancel).context("cannot listen for SIGINT and SIGTERM")?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the I/O threads")?;
    runtime.block_on(async {
        let work = async {
            let images = place.open(&registries).await?;
            work(images.as_ref()).await
        };
        tokio::select! {
            done = work => Ok(done?),
            () = cancel.cancelled() => Err(Cancelled.into()),
        }
    })
}
