//! Which image of an index runs here: an index may hold dozens, and attestations that are no images at all.

use oci_spec::image::Descriptor;
use serde_json::Value;

use super::{DOCKER_LIST, DOCKER_MANIFEST, Error, INDEX, MANIFEST};

/// This program's architecture as images name it (`GOARCH`).
pub const fn host_architecture() -> &'static str {
    // A program runs on the architecture that it was built for, so this is no look at the environment.
    if cfg!(target_arch = "x86_64") {
        "amd64"
    } else if cfg!(target_arch = "aarch64") {
        "arm64"
    } else if cfg!(target_arch = "powerpc64") {
        "ppc64le"
    } else if cfg!(target_arch = "x86") {
        "386"
    } else if cfg!(target_arch = "loongarch64") {
        "loong64"
    } else {
        // arm, riscv64, s390x have one name.
        std::env::consts::ARCH
    }
}

/// The image for `linux/architecture[/variant]` in an OCI index or Docker manifest list.
///
/// An entry without a platform is taken if it is the only image. Without `variant` the highest that is there wins.
pub fn select_platform(
    index: &[u8],
    architecture: &str,
    variant: Option<&str>,
) -> Result<Descriptor, Error> {
    let entries = entries(index)?;
    let best = entries
        .iter()
        .filter_map(|entry| Some((entry.rank(architecture, variant)?, entry)));
    // `min_by_key` takes the first of equals, as the specification asks.
    if let Some((_, entry)) = best.min_by_key(|(rank, _)| *rank) {
        return Ok(entry.descriptor.clone());
    }
    if let [only] = entries.as_slice()
        && only.os.is_empty()
    {
        return Ok(only.descriptor.clone());
    }
    Err(Error::Platform {
        wanted: name("linux", architecture, variant.unwrap_or_default()),
        available: entries.iter().map(Entry::name).collect(),
    })
}

/// Every image of an index, the one that [`select_platform`] takes first: a container may run under emulation, and then
/// only the proof by chain IDs tells which one it stands on.
pub fn candidates(
    index: &[u8],
    architecture: &str,
    variant: Option<&str>,
) -> Result<Vec<Descriptor>, Error> {
    let mut entries = entries(index)?;
    entries.sort_by_key(|entry| entry.rank(architecture, variant).unwrap_or(u8::MAX));
    Ok(entries.into_iter().map(|entry| entry.descriptor).collect())
}

struct Entry {
    descriptor: Descriptor,
    os: String,
    architecture: String,
    variant: String,
}

impl Entry {
    fn name(&self) -> String {
        if self.os.is_empty() {
            "one without a platform".to_owned()
        } else {
            name(&self.os, &self.architecture, &self.variant)
        }
    }

    /// Smaller is better; none: cannot run here.
    fn rank(&self, architecture: &str, variant: Option<&str>) -> Option<u8> {
        if self.os != "linux" || self.architecture != architecture {
            return None;
        }
        // What is left out is the lowest common level: v8 for arm64, v7 for arm (as containerd has it), v1 for amd64.
        let default = match architecture {
            "arm64" => 8,
            "arm" => 7,
            _ => 1,
        };
        let level = |text: &str| match text {
            "" => Some(default),
            text => text
                .strip_prefix('v')
                .and_then(|n| n.split('.').next())
                .and_then(|n| n.parse::<u8>().ok()),
        };
        let own = level(&self.variant)?;
        let host = match variant {
            Some(variant) => level(variant)?,
            None => return Some(u8::MAX - 1 - own.min(u8::MAX - 1)),
        };
        host.checked_sub(own)
    }
}

fn name(os: &str, architecture: &str, variant: &str) -> String {
    match variant {
        "" => format!("{os}/{architecture}"),
        variant => format!("{os}/{architecture}/{variant}"),
    }
}

/// The images of an index (and indexes within it), attestations left out.
fn entries(index: &[u8]) -> Result<Vec<Entry>, Error> {
    let what = "the index";
    let root = super::parse_object(what, index)?;
    let list = match root.get("manifests") {
        // A document that can be read as both is an attack (CVE-2021-41190).
        Some(Value::Array(list)) if !root.contains_key("layers") => list,
        other => {
            return Err(super::shape(
                what,
                "manifests",
                "a list",
                other.unwrap_or(&Value::Null),
            ));
        }
    };
    let mut entries = Vec::new();
    for (i, entry) in list.iter().enumerate() {
        let descriptor: Descriptor =
            serde_json::from_value(entry.clone()).map_err(|error| Error::Shape {
                what,
                field: format!("manifests[{i}]"),
                expected: "a descriptor",
                found: error.to_string(),
            })?;
        let media_type = descriptor.media_type().to_string();
        let attestation = entry
            .pointer("/annotations/vnd.docker.reference.type")
            .is_some_and(|kind| kind == "attestation-manifest");
        if attestation
            || ![MANIFEST, DOCKER_MANIFEST, INDEX, DOCKER_LIST].contains(&media_type.as_str())
        {
            continue;
        }
        let platform = |key: &str| {
            let value = entry.get("platform").and_then(|platform| platform.get(key));
            value.and_then(Value::as_str).unwrap_or_default().to_owned()
        };
        entries.push(Entry {
            descriptor,
            os: platform("os"),
            architecture: platform("architecture"),
            variant: platform("variant"),
        });
    }
    Ok(entries)
}
