//! `image ls` and `image rm` by way of a manager: the images of the caller.

use super::client::Client;
use super::{job, words};
use crate::cli::args::{Format, ImageLs, ImageRm};
use crate::cli::exit::Usage;
use crate::cli::print::print;
use crate::cli::text::{self, Align};
use crate::cli::write_stdout;
use crate::common::escape;
use crate::service::manager::api;

/// Lists the caller's images, as the portal shows them.
pub(in crate::cli) fn ls(args: &ImageLs) -> anyhow::Result<()> {
    let mut query = vec![
        ("sort", words::api_name(&args.sort)),
        ("limit", args.page_size.to_string()),
    ];
    query.extend(args.search.clone().map(|search| ("search", search)));
    job::with_client(&args.server, async |client| {
        list(client, query, args.page, args.page_size, args.format).await
    })
}

/// Prints a page of the caller's images that `query` selects.
pub(super) async fn list(
    client: &Client,
    mut query: Vec<(&str, String)>,
    page: u32,
    page_size: u32,
    format: Format,
) -> anyhow::Result<()> {
    let mut found: api::Images = client.get("images", &query).await?;
    for _ in 1..page {
        let Some(next) = found.next.take() else {
            found.images.clear();
            break;
        };
        query.retain(|(name, _)| *name != "cursor");
        query.push(("cursor", next));
        found = client.get("images", &query).await?;
    }
    print(format, &found, |found| {
        managed_table(found, page, page_size)
    })
}

fn managed_table(found: &api::Images, page: u32, page_size: u32) -> String {
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
            text::time(image.changed.as_deref()),
            or_dash(&image.message),
        ]
    });
    let mut out = text::table(&header, &rows.collect::<Vec<_>>());
    if (found.images.len() as u64) < found.total {
        out.push_str(&format!(
            "page {} of {}: {} of {}\n",
            page,
            found.total.div_ceil(u64::from(page_size.max(1))),
            found.images.len(),
            found.total
        ));
    }
    out
}

/// Deletes the images given as `NAME:TAG`, one after another.
pub(in crate::cli) fn rm(args: &ImageRm) -> anyhow::Result<()> {
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
    job::with_client(&args.server, async |client| {
        for (name, tag) in &images {
            let encode = |part| {
                percent_encoding::utf8_percent_encode(part, percent_encoding::NON_ALPHANUMERIC)
            };
            let path = format!("images/{}/tags/{}", encode(name), encode(tag));
            let deleted: api::Deleted = client.delete(&path).await?;
            if args.format == Format::Table {
                let space = escape::text(&deleted.space);
                write_stdout(format!("deleted {name}:{tag}: {space}\n").as_bytes())?;
            }
        }
        if args.format == Format::Json {
            print(Format::Json, args.images.as_slice(), |_| String::new())?;
        }
        Ok(())
    })
}
