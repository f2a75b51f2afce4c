//! Selects the image for this machine's platform from an image index.
//!
//! Format: image-spec `image-index.md`; variants are ordered as in Go and containerd.

use oci_spec::image::{Descriptor, ImageIndex};

/// Architecture and variant in Go's notation, which indexes use. The operating system is always Linux.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// `amd64`, `arm64`, ...
    pub architecture: String,
    /// `v7`, `v8`, ...
    pub variant: Option<String>,
}

impl Platform {
    /// Returns the platform that this program was built for.
    pub fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "x86" => ("386", None),
            "aarch64" => ("arm64", Some("v8")),
            "arm" => ("arm", Some("v7")),
            "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", None),
            "powerpc64" => ("ppc64", None),
            "loongarch64" => ("loong64", None),
            other => (other, None),
        };
        Self {
            architecture: architecture.to_owned(),
            variant: variant.map(str::to_owned),
        }
    }

    /// Returns the manifest for this platform, with the highest variant that runs on it. Returns `None` if there is
    /// none.
    pub fn choose<'a>(&self, index: &'a ImageIndex) -> Option<&'a Descriptor> {
        let mut best = None;
        for descriptor in index.manifests() {
            let Some(platform) = descriptor.platform() else {
                continue;
            };
            if platform.os().to_string() != "linux"
                || platform.architecture().to_string() != self.architecture
            {
                continue;
            }
            let Some(rank) = self.rank(platform.variant().as_deref()) else {
                continue;
            };
            // Of equal candidates the first is taken, as in all clients.
            if best.is_none_or(|(_, known)| rank > known) {
                best = Some((descriptor, rank));
            }
        }
        best.map(|(descriptor, _)| descriptor)
    }

    /// Returns the rank of a variant, or `None` if it does not run on this platform.
    fn rank(&self, variant: Option<&str>) -> Option<u32> {
        let number = |v: Option<&str>, default| {
            v.map_or(Some(default), |v| v.strip_prefix('v')?.parse::<u32>().ok())
        };
        // Variant that is assumed if none is given.
        let default = match self.architecture.as_str() {
            "arm64" => 8,
            "arm" => 7,
            _ => 1,
        };
        let here = number(self.variant.as_deref(), default)?;
        number(variant, default).filter(|&there| there <= here)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(platforms: &[(&str, &str, Option<&str>)]) -> ImageIndex {
        let manifests: Vec<_> = platforms
            .iter()
            .enumerate()
            .map(|(n, (os, architecture, variant))| {
                let mut platform = serde_json::json!({"os": os, "architecture": architecture});
                if let Some(v) = variant {
                    platform["variant"] = serde_json::json!(v);
                }
                serde_json::json!({
                    "mediaType": "application/vnd.oci.image.manifest.v1+json",
                    "digest": format!("sha256:{:064x}", n),
                    "size": n,
                    "platform": platform,
                })
            })
            .collect();
        serde_json::from_value(serde_json::json!({"schemaVersion": 2, "manifests": manifests}))
            .unwrap()
    }

    #[test]
    fn the_best_variant_that_runs_here() {
        let index = index(&[
            ("windows", "amd64", None),
            ("unknown", "unknown", None), // attestations of BuildKit
            ("linux", "amd64", Some("v3")),
            ("linux", "amd64", None),
            ("linux", "arm", Some("v5")),
            ("linux", "arm", Some("v7")),
            ("linux", "arm64", Some("v8")),
        ]);
        let of = |architecture: &str, variant: Option<&str>| {
            let platform = Platform {
                architecture: architecture.into(),
                variant: variant.map(Into::into),
            };
            platform.choose(&index).map(Descriptor::size)
        };
        assert_eq!(of("amd64", None), Some(3));
        assert_eq!(of("arm", Some("v7")), Some(5));
        assert_eq!(of("arm", Some("v6")), Some(4));
        assert_eq!(of("arm64", None), Some(6));
        assert_eq!(of("s390x", None), None);
    }
}
