//! Determines the kind of application and the accelerator category of a session from what its runtime recorded, by the
//! tables in this module.

use std::path::Path;

use crate::node::container::{Container, MountPoint};
use crate::service::job::{Category, Kind};

/// Environment variables that are set only by images or spawners of these servers.
const VARIABLES: [(&str, Kind); 8] = [
    ("JUPYTERHUB_API_TOKEN", Kind::Jupyter),
    ("JUPYTERHUB_USER", Kind::Jupyter),
    ("JUPYTERHUB_SERVICE_PREFIX", Kind::Jupyter),
    ("JUPYTER_PORT", Kind::Jupyter),
    ("JUPYTER_TOKEN", Kind::Jupyter),
    ("RSTUDIO_VERSION", Kind::Rstudio),
    ("RSTUDIO_WHICH_R", Kind::Rstudio),
    ("RSTUDIO_DEFAULT_R_VERSION", Kind::Rstudio),
];

/// Substrings of program and image names. The first match decides, because an image that contains both servers is
/// started as one of them.
const KEYWORDS: [(&str, Kind); 8] = [
    ("rserver", Kind::Rstudio),
    ("rsession", Kind::Rstudio),
    ("rstudio", Kind::Rstudio),
    ("rocker/tidyverse", Kind::Rstudio),
    ("rocker/verse", Kind::Rstudio),
    ("jupyter", Kind::Jupyter),
    ("start-notebook", Kind::Jupyter),
    ("start-singleuser", Kind::Jupyter),
];

fn by_keyword(text: &str) -> Option<Kind> {
    let text = text.to_ascii_lowercase();
    let found = KEYWORDS.iter().find(|(word, _)| text.contains(word));
    found.map(|(_, kind)| *kind)
}

/// Returns the kind of application. The command line takes precedence over the environment, the image name and the pod
/// name: what is closer to the running program is more reliable.
pub(super) fn kind(container: &Container) -> Kind {
    let spec = &container.spec;
    let by_variables = || {
        let set = |(name, _): &&(&str, Kind)| spec.variable(name).is_some();
        VARIABLES.iter().find(set).map(|(_, kind)| *kind)
    };
    let pod = container.pod.as_ref();
    // A shell receives its script as one long argument, and file names further back say little about the program.
    let command = spec.args.iter().take(4).find_map(|word| by_keyword(word));
    command
        .or_else(by_variables)
        .or_else(|| container.image_name.as_deref().and_then(by_keyword))
        .or_else(|| by_keyword(&pod?.container))
        .or_else(|| by_keyword(&pod?.name))
        .unwrap_or(Kind::Other)
}

/// Returns the labels that an image of the session gets in Harbor.
pub(super) fn labels(container: &Container) -> Vec<&'static str> {
    let kind = match kind(container) {
        Kind::Jupyter => Some("jupyter"),
        Kind::Rstudio => Some("rstudio"),
        Kind::Other => None,
    };
    let category = match category(container) {
        Category::Cpu => "cpu",
        Category::Gpu => "gpu",
    };
    kind.into_iter().chain([category]).collect()
}

/// Major number of NVIDIA's character devices (kernel `Documentation/admin-guide/devices.txt`). The number of
/// nvidia-uvm is dynamic.
const NVIDIA_MAJOR: i64 = 195;
/// Prefixes of accelerator device nodes: AMD's compute interface, DRM cards and render nodes, Intel's accelerators,
/// Habana's, and Huawei's. NVIDIA's are matched separately: `/dev/nvidiactl` alone, without a numbered device, is not
/// usable for computing.
const DEVICES: [&str; 5] = [
    "/dev/kfd",
    "/dev/dri/",
    "/dev/accel/",
    "/dev/hl",
    "/dev/davinci",
];
/// Programs that add a GPU to a container when it starts.
const HOOKS: [&str; 3] = [
    "nvidia-container-runtime-hook",
    "nvidia-container-toolkit",
    "nvidia-ctk",
];

fn is_accelerator(device: &Path) -> bool {
    let Some(path) = device.to_str() else {
        return false;
    };
    let numbered = path
        .strip_prefix("/dev/nvidia")
        .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    numbered || DEVICES.iter().any(|known| path.starts_with(known))
}

/// Returns [`Category::Gpu`] if the container has an accelerator: a device node of one, permission to use one, a CDI
/// device, or a request to NVIDIA's runtime in the environment.
///
/// CUDA images set `NVIDIA_VISIBLE_DEVICES=all` themselves, which has no effect on a node without NVIDIA's hook. So the
/// variable counts only if the hook or a part of the driver is present.
pub(super) fn category(container: &Container) -> Category {
    let spec = &container.spec;
    let mounted = |mount: &MountPoint| is_accelerator(&mount.destination);
    let cdi = |(key, value): (&String, &String)| {
        key.starts_with("cdi.k8s.io/") && value.to_ascii_lowercase().contains("gpu")
    };
    let asked = spec
        .variable("NVIDIA_VISIBLE_DEVICES")
        .is_some_and(|devices| !matches!(devices.trim(), "" | "void" | "none"));
    let hooked = spec.hooks.iter().any(|hook| {
        let name = hook.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| HOOKS.contains(&name))
    });
    let driver = || {
        container.mounts.iter().any(|mount| {
            let name = mount.destination.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with("libcuda.so") || name == "nvidia-smi")
                || mount.destination.starts_with("/proc/driver/nvidia")
        })
    };
    let gpu = spec.devices.iter().any(|device| is_accelerator(device))
        || spec.majors.contains(&NVIDIA_MAJOR)
        || container.mounts.iter().any(mounted)
        || spec.annotations.iter().any(cdi)
        || (asked && (hooked || driver()));
    if gpu { Category::Gpu } else { Category::Cpu }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::node::container::{Pod, Runtime, Spec};
    use crate::node::overlay::mount::OverlayMount;
    use crate::node::overlay::xattr::Namespace;

    /// Returns a container that runs no known application.
    pub(in crate::service::agent) fn container() -> Container {
        Container {
            runtime: Runtime::Containerd,
            id: "ab".repeat(32),
            names: vec![],
            namespace: Some("k8s.io".to_owned()),
            pod: None,
            pid: 42,
            pid_start: 7,
            root: crate::node::container::RootMount::default(),
            overlay: OverlayMount {
                upper: "/u".into(),
                lowers: vec!["/l".into()],
                data_only: vec![],
                id_mapped: vec![],
                namespace: Namespace::Trusted,
                index: false,
            },
            uid_map: vec![],
            gid_map: vec![],
            mounts: vec![],
            mounts_cut: false,
            image_name: None,
            runtime_root_mode: None,
            spec: Spec::default(),
        }
    }

    fn texts(words: &[&str]) -> Vec<String> {
        words.iter().map(|&word| word.to_owned()).collect()
    }

    /// Name of the case, arguments, environment, image, pod, and the expected kind.
    type Case = (
        &'static str,
        &'static [&'static str],
        &'static [&'static str],
        Option<&'static str>,
        Option<&'static str>,
        Kind,
    );

    #[test]
    fn kinds() {
        let cases: [Case; 10] = [
            (
                "command",
                &["tini", "--", "jupyterhub-singleuser"],
                &[],
                None,
                None,
                Kind::Jupyter,
            ),
            (
                "script",
                &["start-notebook.py"],
                &[],
                None,
                None,
                Kind::Jupyter,
            ),
            (
                "init",
                &["/init"],
                &["RSTUDIO_VERSION=2024.04"],
                Some("r.example/x:1"),
                None,
                Kind::Rstudio,
            ),
            (
                "server",
                &["/usr/lib/rstudio-server/bin/rserver"],
                &[],
                None,
                None,
                Kind::Rstudio,
            ),
            (
                "spawner",
                &["sh", "-c", "exec x"],
                &["JUPYTERHUB_USER=a"],
                None,
                None,
                Kind::Jupyter,
            ),
            (
                "image",
                &[],
                &[],
                Some("quay.io/jupyter/scipy-notebook:1"),
                None,
                Kind::Jupyter,
            ),
            (
                "image of R",
                &["/init"],
                &[],
                Some("docker.io/rocker/rstudio:4"),
                None,
                Kind::Rstudio,
            ),
            (
                "pod",
                &["sleep"],
                &[],
                Some("r.example/x:1"),
                Some("jupyter-alice"),
                Kind::Jupyter,
            ),
            (
                "both, started as one",
                &["rserver"],
                &["JUPYTERHUB_USER=a"],
                Some("jupyter/r"),
                None,
                Kind::Rstudio,
            ),
            (
                "neither",
                &["python3", "train.py"],
                &["PATH=/bin"],
                Some("python:3"),
                Some("train-0"),
                Kind::Other,
            ),
        ];
        for (case, args, env, image, pod, expected) in cases {
            let mut it = container();
            it.spec.args = texts(args);
            it.spec.env = texts(env);
            it.image_name = image.map(str::to_owned);
            it.pod = pod.map(|name| Pod {
                namespace: "hub".to_owned(),
                name: name.to_owned(),
                container: "main".to_owned(),
                ..Pod::default()
            });
            assert_eq!(kind(&it), expected, "{case}");
        }
    }

    #[test]
    fn categories() {
        type Change = fn(&mut Container);
        let cases: [(&str, Change, Category); 13] = [
            ("nothing", |_| {}, Category::Cpu),
            (
                "device",
                |c| c.spec.devices = vec!["/dev/nvidia0".into()],
                Category::Gpu,
            ),
            (
                "control device alone",
                |c| c.spec.devices = vec!["/dev/nvidiactl".into()],
                Category::Cpu,
            ),
            (
                "AMD",
                |c| c.spec.devices = vec!["/dev/kfd".into()],
                Category::Gpu,
            ),
            (
                "DRM",
                |c| c.spec.devices = vec!["/dev/dri/renderD128".into()],
                Category::Gpu,
            ),
            (
                "other devices",
                |c| c.spec.devices = vec!["/dev/fuse".into()],
                Category::Cpu,
            ),
            ("major", |c| c.spec.majors = vec![1, 195], Category::Gpu),
            (
                "CDI",
                |c| {
                    let (key, device) = ("cdi.k8s.io/x", "nvidia.com/gpu=0");
                    c.spec.annotations.insert(key.into(), device.into());
                },
                Category::Gpu,
            ),
            (
                "the image's own word",
                |c| c.spec.env = texts(&["NVIDIA_VISIBLE_DEVICES=all"]),
                Category::Cpu,
            ),
            (
                "asked for, with the hook",
                |c| {
                    c.spec.env = texts(&["NVIDIA_VISIBLE_DEVICES=GPU-1"]);
                    c.spec.hooks = vec!["/usr/bin/nvidia-container-runtime-hook".into()];
                },
                Category::Gpu,
            ),
            (
                "refused, with the hook",
                |c| {
                    c.spec.env = texts(&["NVIDIA_VISIBLE_DEVICES=void"]);
                    c.spec.hooks = vec!["/usr/bin/nvidia-container-runtime-hook".into()];
                },
                Category::Cpu,
            ),
            (
                "asked for, with the driver mounted",
                |c| {
                    c.spec.env = texts(&["NVIDIA_VISIBLE_DEVICES=0"]);
                    c.mounts = vec![mount("/usr/lib/x86_64-linux-gnu/libcuda.so.550.1", false)];
                },
                Category::Gpu,
            ),
            (
                "mounted by a hook",
                |c| c.mounts = vec![mount("/dev/nvidia3", false)],
                Category::Gpu,
            ),
        ];
        for (case, change, expected) in cases {
            let mut it = container();
            change(&mut it);
            assert_eq!(category(&it), expected, "{case}");
        }
    }

    pub(in crate::service::agent) fn mount(destination: &str, volume: bool) -> MountPoint {
        MountPoint {
            destination: destination.into(),
            kind: "bind".to_owned(),
            source: "/x".to_owned(),
            volume,
        }
    }
}
