//! A node with pods: a registry, a containerd, and the small base in three layers, as most scenarios need them.

use anyhow::Result;

use crate::host::containerd::{Containerd, Pod, PodOptions};
use crate::host::image::{Base, Format, base};
use crate::host::registry::Registry;
use crate::host::{Roots, Scratch};
use crate::save::{WORK, set_attributes};
use crate::support::{Need, ignored};

/// Fields are dropped in this order: servers first, their directories last.
#[derive(Debug)]
pub struct Lab {
    pub containerd: Containerd,
    pub registry: Registry,
    pub roots: Roots,
    pub scratch: Scratch,
    /// The base, in the registry.
    pub image: String,
}

impl Lab {
    /// Returns `None` if this machine cannot run it.
    pub fn new(kind: Base, format: Format) -> Result<Option<Self>> {
        let mut needs = needs(&["containerd", "runc"]);
        if kind == Base::Big {
            needs.push(Need::Program("debootstrap"));
        }
        if ignored(&needs) {
            return Ok(None);
        }
        let scratch = Scratch::new()?;
        let registry = Registry::start(&scratch)?;
        registry.push(&base(Base::Pause, Format::Oci)?, "pause:1")?;
        let image = registry.push(&base(kind, format)?, "bases/notebook:1")?;
        let containerd = Containerd::start(&scratch, &registry)?;
        let roots = containerd.roots(&scratch);
        Ok(Some(Self {
            containerd,
            registry,
            roots,
            scratch,
            image,
        }))
    }

    /// Starts a pod on the base with a user's work in it.
    pub fn session(&self) -> Result<Pod> {
        let pod = self
            .containerd
            .run_pod(&self.image, &PodOptions::default())?;
        self.containerd.shell(&pod, WORK)?;
        set_attributes(pod.pid, true)?;
        Ok(pod)
    }

    /// Returns a destination with a repository of its own, which contains nothing of the base.
    pub fn destination(&self, repository: &str) -> String {
        self.registry.reference(&format!("{repository}:saved"))
    }
}

/// Programs that make bases, keep them in a registry, and compare what was saved.
const TOOLS: [&str; 6] = [
    "docker-registry",
    "buildah",
    "skopeo",
    "umoci",
    "busybox",
    "python3",
];

/// Returns what a scenario needs that saves containers of `programs`.
pub fn needs<'p>(programs: &[&'p str]) -> Vec<Need<'p>> {
    let programs = programs.iter().copied().chain(TOOLS);
    programs.map(Need::Program).chain([Need::Root]).collect()
}

/// Starts a registry with the small base for an engine that needs `programs`, and returns it with the name of the base.
/// `None` if something is missing, which is reported.
pub fn engine(programs: &[&str], format: Format) -> Result<Option<(Scratch, Registry, String)>> {
    if ignored(&needs(programs)) {
        return Ok(None);
    }
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let image = registry.push(&base(Base::Small, format)?, "bases/notebook:1")?;
    Ok(Some((scratch, registry, image)))
}
