//! `inspect --packages`: the packages of images, and the list of packages for people.

use serde::Serialize;

use super::args::Inspect;
use super::print::print;
use super::reading;
use super::text::{self, Align};
use crate::common::digest::Digest;
use crate::common::{escape, message};
use crate::image::packages::{ChangeKind, Packages};
use crate::save;
use crate::store::destination::Target;

/// Output of `inspect --packages IMAGE`.
#[derive(Serialize)]
struct ImagePackages {
    image: String,
    digest: Digest,
    since: Option<Digest>,
    packages: Packages,
}

/// Returns whether an argument names an image and not a container: it has a transport, or begins with a host. Namespaces
/// of Kubernetes have neither a dot nor a colon.
pub(super) fn is_image(text: &str) -> bool {
    let transport = ["docker://", "oci:", "oci-archive:"];
    let host = text.split_once('/').map_or("", |(host, _)| host);
    transport.iter().any(|prefix| text.starts_with(prefix))
        || host.contains(['.', ':'])
        || host == "localhost"
}

/// Prints the packages of an image.
pub(super) fn image(args: &Inspect) -> anyhow::Result<()> {
    let target: Target = args.container.parse().map_err(save::Error::from)?;
    let since: Option<Target> = args
        .since
        .as_deref()
        .map(str::parse)
        .transpose()
        .map_err(save::Error::from)?;
    let view = reading::run(&args.registry, Some(&target), async |registries, _| {
        let image = reading::open(target.clone(), registries, &args.container).await?;
        let since = match (since, &args.since) {
            (Some(target), Some(name)) => Some(reading::open(target, registries, name).await?),
            _ => None,
        };
        let packages = save::packages::image::of_image(&image, since.as_ref()).await?;
        Ok(ImagePackages {
            image: escape::limited(&args.container, 4096),
            digest: image.manifest.digest,
            since: since.map(|since| since.manifest.digest),
            packages,
        })
    })?;
    print(args.format, &view, |view| table(&view.packages))
}

/// Formats a list of packages: what is added, changed or removed, and what limits the list.
pub(super) fn table(found: &Packages) -> String {
    let header = [
        ("", Align::Left),
        ("MANAGER", Align::Left),
        ("PACKAGE", Align::Left),
        ("VERSION", Align::Left),
        ("BEFORE", Align::Left),
        ("WHERE", Align::Left),
    ];
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    let rows: Vec<Vec<String>> = found
        .packages
        .iter()
        .map(|package| {
            let mark = match package.change {
                ChangeKind::Added => "A",
                ChangeKind::Changed => "C",
                ChangeKind::Removed => "D",
            };
            let place = match package.location.as_str() {
                "" => "-".to_owned(),
                location => format!("/{location}"),
            };
            vec![
                mark.to_owned(),
                package.manager.name().to_owned(),
                package.name.clone(),
                or_dash(&package.version),
                or_dash(&package.previous),
                place,
            ]
        })
        .collect();
    let mut out = if rows.is_empty() {
        "no package differs\n".to_owned()
    } else {
        text::table(&header, &rows)
    };
    if found.more > 0 {
        let more = message::count(found.more, "package", "packages");
        out.push_str(&format!("and {more} more\n"));
    }
    for unread in &found.unread {
        let (path, reason) = (&unread.path, escape::text(&unread.reason));
        out.push_str(&format!("not read: /{path}: {reason}\n"));
    }
    if found.unread_more > 0 {
        let more = message::count(found.unread_more, "file", "files");
        out.push_str(&format!("not read: {more} more\n"));
    }
    for note in &found.notes {
        out.push_str(&format!("note: {}\n", escape::text(note)));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_told_from_a_container() {
        for image in [
            "oci:/srv/x:1",
            "oci-archive:x.tar",
            "docker://h/x",
            "r.example.org/alice/lab:1",
            "localhost:5000/x",
            "localhost/x@sha256:00",
        ] {
            assert!(is_image(image), "{image}");
        }
        for container in [
            "3f2a",
            "web",
            "jupyter/nb-0",
            "ns/pod/main",
            "pid:42",
            "a.b",
        ] {
            assert!(!is_image(container), "{container}");
        }
    }
}
