//! `image ls` and `image rm`: where images were saved, seen from the shell.

use anyhow::Context;
use serde::Serialize;

use super::args::{Format, ImageLs, ImageRm};
use super::exit::Usage;
use super::text::{self, Align};
use super::{job, options, signals, verbs, write_stdout};
use crate::common::cancel::{Cancel, Cancelled};
use crate::service::manager::shape;
use crate::store::harbor::Room;
use crate::store::images::{
    Error, ImageEntry, Images, Listed, Place, Query, Removed, RepositoryEntry, Which,
};

/// Digits of a digest in a table.
const SHORT_DIGEST: usize = "sha256:".len() + 12;

/// What `image ls` prints.
#[derive(Serialize)]
struct ListView {
    page: u32,
    page_size: u32,
    total: u64,
    quota: Option<Room>,
    #[serde(flatten)]
    what: What,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum What {
    Repositories(Vec<RepositoryEntry>),
    Images(Vec<ImageEntry>),
}

pub(super) fn ls(args: &ImageLs) -> anyhow::Result<()> {
    let Some(place) = &args.place else {
        return ls_of_manager(args);
    };
    let place: Place = place.parse()?;
    let query = Query {
        search: args.search.clone(),
        sort: args.sort,
        page: args.page,
        page_size: args.page_size,
    };
    let view = run(&args.registry, &place, async |images| {
        list(images, &place, &query).await
    })?;
    verbs::print(args.format, &view, |view| table(view, args.no_trunc))
}

/// The caller's images, as the portal shows them.
fn ls_of_manager(args: &ImageLs) -> anyhow::Result<()> {
    let mut query = vec![
        ("sort", job::word(&args.sort)),
        ("page", args.page.to_string()),
        ("page_size", args.page_size.to_string()),
    ];
    query.extend(args.search.clone().map(|search| ("search", search)));
    job::on(&args.server, async |client| {
        let found: shape::Images = client.get("images", &query).await?;
        verbs::print(args.format, &found, managed_table)
    })
}

fn managed_table(found: &shape::Images) -> String {
    let header = [
        ("IMAGE", Align::Left),
        ("TAGS", Align::Left),
        ("SIZE", Align::Right),
        ("SESSION", Align::Left),
        ("CHANGED", Align::Left),
        ("MESSAGE", Align::Left),
    ];
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    let rows = found.images.iter().map(|image| {
        let tags: Vec<&str> = image.tags.iter().map(|tag| tag.name.as_str()).collect();
        vec![
            image.name.clone(),
            if tags.is_empty() {
                "-".to_owned()
            } else {
                tags.join(",")
            },
            text::bytes(image.size),
            or_dash(&image.session_name),
            time(image.changed.as_deref()),
            or_dash(&image.message),
        ]
    });
    let mut out = text::table(&header, &rows.collect::<Vec<_>>());
    if (found.images.len() as u64) < found.total {
        out.push_str(&format!(
            "page {} of {}: {} of {}\n",
            found.page,
            found.total.div_ceil(u64::from(found.page_size.max(1))),
            found.images.len(),
            found.total
        ));
    }
    out
}

/// To the second: the rest of an RFC 3339 time is for programs.
fn time(time: Option<&str>) -> String {
    match time {
        Some(time) => time
            .split(['.', 'Z'])
            .next()
            .unwrap_or_default()
            .replace('T', " "),
        None => "-".to_owned(),
    }
}

async fn list(images: &dyn Images, place: &Place, query: &Query) -> Result<ListView, Error> {
    let (path, which) = place.inside();
    let mut query = query.clone();
    if let Some(Which::Tag(tag)) = which {
        query.search.get_or_insert_with(|| tag.clone());
    }
    let (what, total) = if images.is_group(path) {
        repositories(images, path, &query).await?
    } else {
        match images.images(path, &query).await {
            Ok(Listed { items, total }) => (What::Images(items), total),
            // A plain registry has no projects: what is no repository may be the beginning of some.
            Err(missing @ Error::NotThere(_)) => {
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
        quota: images.room(path).await?,
        what,
    })
}

async fn repositories(
    images: &dyn Images,
    path: &str,
    query: &Query,
) -> Result<(What, u64), Error> {
    let Listed { items, total } = images.repositories(path, query).await?;
    Ok((What::Repositories(items), total))
}

fn table(view: &ListView, no_trunc: bool) -> String {
    let or_dash = |text: Option<&str>| text.unwrap_or("-").to_owned();
    let number = |n: Option<u64>| n.map_or_else(|| "-".to_owned(), |n| n.to_string());
    let (mut out, shown) = match &view.what {
        What::Repositories(found) => {
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
                    time(entry.updated.as_deref()),
                ]
            });
            (text::table(&header, &rows.collect::<Vec<_>>()), found.len())
        }
        What::Images(found) => {
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
                    time(entry.pushed.as_deref()),
                    time(entry.created.as_deref()),
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
        out.push_str(&format!(
            "{} of {} used, {} free\n",
            bytes(room.used),
            bytes(room.limit),
            bytes(room.free())
        ));
    }
    out
}

/// A line of `image rm`.
#[derive(Serialize)]
struct RemovedView {
    image: String,
    #[serde(flatten)]
    removed: Removed,
}

/// Each in turn; what is gone is told even when a later one fails.
pub(super) fn rm(args: &ImageRm) -> anyhow::Result<()> {
    let of_manager = |image: &String| !image.contains('/') && !image.starts_with("oci:");
    if args.images.iter().all(of_manager) {
        return rm_of_manager(args);
    }
    if let Some(image) = args.images.iter().find(|image| of_manager(image)) {
        return Err(Usage(format!(
            "{image:?} is a manager's, others are not: delete them by two calls"
        ))
        .into());
    }
    let places = args.images.iter().map(|image| {
        let place: Place = image.parse()?;
        match place.inside() {
            (_, Some(_)) => Ok((image, place)),
            _ => Err(Error::Place {
                text: image.clone(),
                reason: "no tag and no digest: whole repositories are not deleted".to_owned(),
            }),
        }
    });
    // A command line that is wrong deletes nothing.
    let places = places.collect::<Result<Vec<_>, Error>>()?;
    let mut views = Vec::new();
    let mut failure = None;
    for (image, place) in places {
        let removed = run(&args.registry, &place, async |images| {
            match place.inside() {
                (path, Some(which)) => images.remove(path, which, args.all_tags).await,
                _ => Err(Error::NotThere(image.clone())),
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
        verbs::print(args.format, views.as_slice(), removed_text)?;
    }
    failure.map_or(Ok(()), Err)
}

/// `NAME:TAG`, each in turn.
fn rm_of_manager(args: &ImageRm) -> anyhow::Result<()> {
    let images = args.images.iter().map(|image| {
        image
            .split_once(':')
            .filter(|(name, tag)| !name.is_empty() && !tag.is_empty())
            .ok_or_else(|| {
                Usage(format!(
                    "{image:?}: expected HOST/REPOSITORY:TAG, oci:DIRECTORY:TAG, or NAME:TAG of a manager"
                ))
            })
    });
    let images = images.collect::<Result<Vec<_>, _>>()?;
    if args.all_tags {
        return Err(
            Usage("a manager deletes one tag at a time, without --all-tags".to_owned()).into(),
        );
    }
    job::on(&args.server, async |client| {
        for (name, tag) in &images {
            let encode = |part| {
                percent_encoding::utf8_percent_encode(part, percent_encoding::NON_ALPHANUMERIC)
            };
            client
                .delete(&format!("images/{}/tags/{}", encode(name), encode(tag)))
                .await?;
            if args.format == Format::Table {
                write_stdout(format!("deleted {name}:{tag}\n").as_bytes())?;
            }
        }
        if args.format == Format::Json {
            verbs::print(Format::Json, args.images.as_slice(), |_| String::new())?;
        }
        Ok(())
    })
}

fn removed_text(views: &[RemovedView]) -> String {
    let mut out = String::new();
    for RemovedView { image, removed } in views {
        let image = crate::common::escape::text(image);
        if removed.image_deleted {
            let tags = match removed.tags.as_slice() {
                [] => String::new(),
                tags => format!(" (was tagged {})", tags.join(", ")),
            };
            out.push_str(&format!("deleted {image}: {}{tags}\n", removed.digest));
        } else {
            let kept = removed.kept.join(", ");
            out.push_str(&format!(
                "untagged {image}: {} stays, tagged {kept}\n",
                removed.digest
            ));
        }
    }
    let mut told: Vec<&str> = Vec::new();
    for view in views.iter().filter(|view| view.removed.image_deleted) {
        if !told.contains(&view.removed.space) {
            told.push(view.removed.space);
            out.push_str(&format!("note: {}\n", view.removed.space));
        }
    }
    out
}

/// Opens the place and does `work` there, until somebody asks to stop.
fn run<T>(
    registry: &super::args::Registry,
    place: &Place,
    work: impl AsyncFnOnce(&dyn Images) -> Result<T, Error>,
) -> anyhow::Result<T> {
    let host = match place {
        Place::Registry { host, .. } => Some(host.clone()),
        Place::Layout { .. } => None,
    };
    let registries = options::registries(registry, host)?;
    let cancel = Cancel::default();
    signals::cancel_on_signals(&cancel).context("cannot listen for SIGINT and SIGTERM")?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the I/O threads")?;
    runtime.block_on(async {
        let work = async {
            let images = place.open(&registries).await?;
            work(images.as_ref()).await
        };
        tokio::select! {
            done = work => Ok(done?),
            _ = cancel.cancelled() => Err(Cancelled.into()),
        }
    })
}
