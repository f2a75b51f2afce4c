//! The output of `ps`, `inspect` and `diff`. Its JSON form is a stable interface, hence these types instead of internal
//! ones.

mod end;

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::text::{self, Align};
use crate::common::digest::{ChainId, DiffId, Digest};
use crate::common::escape::{limited, text as escaped};
use crate::image::packages::Packages;
use crate::node::container::{Base, Container, IdMapping, Pod, Runtime};
use crate::save::{NextKind, NextSave};
use end::EndView;

/// Length of a shortened ID in a table, as in `docker ps`.
const SHORT_ID: usize = 12;
/// Limits of `inspect`: number of mounts, their total size in bytes, and characters of a source.
const MAX_MOUNTS: usize = 200;
const MAX_MOUNT_BYTES: usize = 128 << 10;
const MAX_SOURCE: usize = 1024;

/// An entry of `ps`, and the head of `inspect`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ContainerView {
    /// The runtime.
    pub(crate) runtime: Runtime,
    /// Full ID.
    pub(crate) id: String,
    /// Names, the preferred one first.
    pub(crate) names: Vec<String>,
    /// Namespace in containerd.
    pub(crate) namespace: Option<String>,
    /// The pod.
    pub(crate) pod: Option<Pod>,
    /// Image as recorded by the runtime.
    pub(crate) image: Option<String>,
    /// PID of the first process, if it runs.
    pub(crate) pid: Option<u32>,
    /// How it ended, if it does not run.
    pub(crate) ended: Option<EndView>,
    /// Allocated bytes of the upper directory.
    pub(crate) upper_bytes: Option<u64>,
}

impl ContainerView {
    /// Creates the entry. `upper_bytes` is `None` if it could not be determined.
    pub(crate) fn new(container: &Container, upper_bytes: Option<u64>) -> Self {
        Self {
            runtime: container.runtime,
            id: container.id.clone(),
            names: container.names.clone(),
            namespace: container.namespace.clone(),
            pod: container.pod.clone(),
            image: container.image_name.clone(),
            pid: container.running().map(|running| running.pid),
            ended: container.ended().map(|ended| EndView::new(&ended.end)),
            upper_bytes,
        }
    }

    /// Returns the name in a form that the argument CONTAINER accepts.
    fn name(&self) -> String {
        match (&self.pod, self.names.first()) {
            (Some(pod), _) => format!("{}/{}/{}", pod.namespace, pod.name, pod.container),
            (None, Some(name)) => name.clone(),
            (None, None) => "-".to_owned(),
        }
    }

    fn short_id(&self) -> &str {
        // IDs of another form (`pid:N`, a name given to ctr) are not shortened.
        let hex = self.id.len() == 64 && self.id.bytes().all(|b| b.is_ascii_hexdigit());
        if hex { &self.id[..SHORT_ID] } else { &self.id }
    }
}

/// Formats `ps` as a table.
pub(crate) fn ps_table(containers: &[ContainerView], no_trunc: bool, all: bool) -> String {
    let mut header = vec![
        ("RUNTIME", Align::Left),
        ("ID", Align::Left),
        ("NAME", Align::Left),
        ("IMAGE", Align::Left),
        ("PID", Align::Right),
        ("CHANGES", Align::Right),
    ];
    if all {
        header.push(("STATUS", Align::Left));
    }
    let row = |view: &ContainerView| {
        let mut row = vec![
            view.runtime.name().to_owned(),
            if no_trunc {
                view.id.clone()
            } else {
                view.short_id().to_owned()
            },
            view.name(),
            view.image.clone().unwrap_or_else(|| "-".to_owned()),
            view.pid
                .map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            text::bytes(view.upper_bytes),
        ];
        if all {
            let status = view.ended.as_ref().map(EndView::status);
            row.push(status.unwrap_or_else(|| "running".to_owned()));
        }
        row
    };
    text::table(&header, &containers.iter().map(row).collect::<Vec<_>>())
}

/// Output of `inspect`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct InspectView {
    /// The fields of `ps`.
    #[serde(flatten)]
    pub(crate) container: ContainerView,
    /// The base, if it was proven.
    pub(crate) base: Option<BaseView>,
    /// The reason why it was not proven.
    pub(crate) base_error: Option<String>,
    /// The upper directory.
    pub(crate) upper: UpperView,
    /// UID map; empty without a user namespace.
    pub(crate) uid_map: Vec<IdMapping>,
    /// GID map; empty without a user namespace.
    pub(crate) gid_map: Vec<IdMapping>,
    /// Mounts whose content is not saved, volumes first.
    pub(crate) not_saved: Vec<MountView>,
    /// Number of such mounts beyond the limit.
    pub(crate) not_saved_more: usize,
    /// Kind of the next save; `None` if the base is not proven.
    pub(crate) next_save: Option<NextSave>,
    /// The reason why the next save would fail.
    pub(crate) next_save_error: Option<String>,
    /// The packages that differ from those of the base, if they are asked for.
    pub(crate) packages: Option<Packages>,
}

/// The proven base.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct BaseView {
    /// Reference by which it was pulled.
    pub(crate) name: Option<String>,
    /// Digest of the manifest; `None` if the runtime keeps none.
    pub(crate) manifest_digest: Option<Digest>,
    /// Digest of the config, which is the image ID.
    pub(crate) config_digest: Digest,
    /// A sentence on how it was proven.
    pub(crate) proof: String,
    /// Layers, bottom first.
    pub(crate) layers: Vec<LayerView>,
}

/// A layer of the base.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct LayerView {
    /// Digest of the uncompressed tar.
    pub(crate) diff_id: DiffId,
    /// Chain ID of the layers up to this one.
    pub(crate) chain_id: ChainId,
    /// Digest of the compressed blob, if known.
    pub(crate) digest: Option<String>,
    /// Size of the compressed blob in bytes, if known.
    pub(crate) size: Option<u64>,
    /// Media type of the blob, if known.
    pub(crate) media_type: Option<String>,
    /// Directory with the unpacked layer.
    pub(crate) lower: Option<String>,
    /// Whether the compressed blob is on this node.
    pub(crate) local: bool,
}

/// The upper directory.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct UpperView {
    /// Path.
    pub(crate) path: String,
    /// Allocated bytes.
    pub(crate) bytes: Option<u64>,
    /// Number of entries.
    pub(crate) entries: Option<u64>,
}

/// A mount.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct MountView {
    /// Mount point in the container.
    pub(crate) destination: String,
    /// File system type.
    pub(crate) kind: String,
    /// Source of the mount.
    pub(crate) source: String,
    /// Whether this is a volume with user data, as opposed to a mount of the runtime.
    pub(crate) volume: bool,
}

impl InspectView {
    /// Creates the view. `entries` is the number in the upper directory, `None` if it could not be determined.
    pub(crate) fn new(
        container: &Container,
        base: Result<&Base, String>,
        upper_bytes: Option<u64>,
        entries: Option<u64>,
    ) -> Self {
        let (base, base_error) = match base {
            Ok(base) => (Some(BaseView::new(base)), None),
            Err(error) => (None, Some(error)),
        };
        let mount = |mount: &crate::node::container::MountPoint| MountView {
            destination: text::path(&mount.destination),
            kind: mount.kind.clone(),
            source: limited(&mount.source, MAX_SOURCE),
            volume: mount.volume,
        };
        let all = container.mounts.iter();
        let (volumes, others): (Vec<_>, Vec<_>) = all.partition(|mount| mount.volume);
        let mut bytes = 0;
        let not_saved: Vec<MountView> = volumes
            .into_iter()
            .chain(others)
            .take(MAX_MOUNTS)
            .map(mount)
            .take_while(|mount| {
                bytes += mount.destination.len() + mount.source.len();
                bytes <= MAX_MOUNT_BYTES
            })
            .collect();
        Self {
            container: ContainerView::new(container, upper_bytes),
            base,
            base_error,
            upper: UpperView {
                path: text::path(&container.overlay.upper),
                bytes: upper_bytes,
                entries,
            },
            uid_map: container.uid_map.clone(),
            gid_map: container.gid_map.clone(),
            not_saved_more: container.mounts.len() - not_saved.len(),
            not_saved,
            next_save: None,
            next_save_error: None,
            packages: None,
        }
    }

    /// Adds the kind of the next save, which includes the volumes at `volumes`.
    pub(crate) fn saved_next(&mut self, next: NextSave, volumes: &[PathBuf]) {
        self.next_save = Some(next);
        let saved: Vec<String> = volumes
            .iter()
            .map(|path| text::path(&path.components().collect::<PathBuf>()))
            .collect();
        self.not_saved
            .retain(|mount| !saved.contains(&mount.destination));
    }

    /// Formats the view as a table. Mounts of the runtime (`/proc`, `/dev`, ...) are only counted.
    pub(crate) fn table(&self) -> String {
        let container = &self.container;
        let mut rows: Vec<[String; 2]> = Vec::new();
        let mut add = |name: &str, value: String| rows.push([name.to_owned(), value]);
        add("ID", container.id.clone());
        add("Runtime", container.runtime.name().to_owned());
        add("Name", container.name());
        match (container.pid, &container.ended) {
            (Some(pid), _) => add("PID", pid.to_string()),
            (None, Some(end)) => add("Status", end.status()),
            (None, None) => {}
        }
        add(
            "Image",
            container.image.clone().unwrap_or_else(|| "-".to_owned()),
        );
        match (&self.base, &self.base_error) {
            (Some(base), _) => {
                add("Base", base.name.clone().unwrap_or_else(|| "-".to_owned()));
                add(
                    "  manifest",
                    base.manifest_digest
                        .map_or_else(|| "not kept by the runtime".to_owned(), |d| d.to_string()),
                );
                add("  config", base.config_digest.to_string());
                add("  proven", base.proof.clone());
                for (i, layer) in base.layers.iter().enumerate() {
                    let blob = if layer.local {
                        "blob on this node"
                    } else {
                        "blob not on this node"
                    };
                    add(
                        &format!("  layer {}", i + 1),
                        format!("{}  {}  {blob}", layer.diff_id, text::bytes(layer.size)),
                    );
                }
            }
            (None, Some(error)) => add("Base", format!("not proven: {error}")),
            (None, None) => add("Base", "-".to_owned()),
        }
        let entries = self
            .upper
            .entries
            .map_or_else(|| "-".to_owned(), |entries| entries.to_string());
        add(
            "Changes",
            format!("{} in {entries} entries", text::bytes(self.upper.bytes)),
        );
        add("  upper", self.upper.path.clone());
        if let Some(error) = &self.next_save_error {
            add("Next save", format!("would fail: {error}"));
        }
        if let Some(next) = &self.next_save {
            let what = match next.kind {
                NextKind::Delta => "what changed",
                NextKind::Full => "everything",
            };
            add(
                "Next save",
                format!(
                    "{what}: {} in {} entries; {} layers above the base then",
                    text::bytes(Some(next.bytes)),
                    next.entries,
                    next.layers
                ),
            );
            add("  as", next.reason.clone());
        }
        for (name, map) in [("User ids", &self.uid_map), ("Group ids", &self.gid_map)] {
            for line in map {
                add(
                    name,
                    format!(
                        "{} to {} are {} to {} on this node",
                        line.inside,
                        last(line.inside, line.count),
                        line.outside,
                        last(line.outside, line.count)
                    ),
                );
            }
        }
        for mount in self.not_saved.iter().filter(|mount| mount.volume) {
            add(
                "Not saved",
                format!(
                    "{} ({} from {})",
                    mount.destination, mount.kind, mount.source
                ),
            );
        }
        let others = self.not_saved.iter().filter(|mount| !mount.volume).count();
        let others = others + self.not_saved_more;
        if others > 0 {
            let mounts = crate::common::message::count(others, "mount", "mounts");
            add("", format!("and {mounts} of the runtime's own"));
        }
        let width = rows.iter().map(|[name, _]| name.len()).max().unwrap_or(0);
        rows.iter()
            .map(|[name, value]| format!("{name:<width$}  {}\n", escaped(value)))
            .collect::<Vec<_>>()
            .concat()
    }
}

fn last(first: u32, count: u32) -> u64 {
    u64::from(first) + u64::from(count.saturating_sub(1))
}

impl BaseView {
    fn new(base: &Base) -> Self {
        let layer = |layer: &crate::node::container::BaseLayer| LayerView {
            diff_id: layer.diff_id,
            chain_id: layer.chain_id,
            digest: layer
                .descriptor
                .as_ref()
                .map(|descriptor| descriptor.digest().to_string()),
            size: layer
                .descriptor
                .as_ref()
                .filter(|_| layer.size_known)
                .map(oci_spec::image::Descriptor::size),
            media_type: layer
                .descriptor
                .as_ref()
                .map(|descriptor| descriptor.media_type().to_string()),
            lower: layer.lower.as_deref().map(text::path),
            local: layer.local_blob.is_some(),
        };
        Self {
            name: base.name.clone(),
            manifest_digest: base.manifest.as_ref().map(|manifest| manifest.digest),
            config_digest: Digest::of(&base.config),
            proof: base.proof.clone(),
            layers: base.layers.iter().map(layer).collect(),
        }
    }
}

/// Kind of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Change {
    /// Added.
    A,
    /// Changed.
    C,
    /// Deleted.
    D,
}

/// A line of `diff`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct DiffView {
    /// Kind of the change.
    pub(crate) change: Change,
    /// Absolute path as text.
    pub(crate) path: String,
}

impl DiffView {
    /// Creates a line. `path` is relative to the root or absolute.
    pub(crate) fn new(change: Change, path: &Path) -> Self {
        Self {
            change,
            path: format!("/{}", text::path(path).trim_matches('/')),
        }
    }
}

/// Formats `diff` like `docker diff`.
pub(crate) fn diff_table(lines: &[DiffView]) -> String {
    lines
        .iter()
        .map(|line| format!("{:?} {}\n", line.change, line.path))
        .collect::<Vec<_>>()
        .concat()
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use serde_json::json;

    use super::*;
    use crate::node::container::{BaseLayer, End, Life, MountPoint, RawManifest, Running};
    use crate::node::overlay::mount::OverlayMount;
    use crate::node::overlay::xattr::Namespace;

    fn container() -> Container {
        Container {
            runtime: Runtime::Containerd,
            id: "ab".repeat(32),
            names: vec![],
            namespace: Some("k8s.io".into()),
            pod: Some(Pod {
                namespace: "jupyter".into(),
                name: "nb-0".into(),
                container: "notebook".into(),
                ..Pod::default()
            }),
            life: Life::Running(Running {
                pid: 42,
                pid_start: 7,
                ..Running::default()
            }),
            overlay: OverlayMount {
                upper: OsStr::from_bytes(b"/u\xff").into(),
                lowers: vec!["/l".into()],
                data_only: vec![],
                id_mapped: vec![],
                namespace: Namespace::Trusted,
                index: false,
            },
            uid_map: vec![IdMapping {
                inside: 0,
                outside: 100_000,
                count: 65_536,
            }],
            gid_map: vec![],
            mounts: vec![
                MountPoint {
                    destination: "/home".into(),
                    kind: "nfs4".into(),
                    source: "nas:/h\x1b".into(),
                    volume: true,
                },
                MountPoint {
                    destination: "/proc".into(),
                    kind: "proc".into(),
                    source: "proc".into(),
                    volume: false,
                },
            ],
            mounts_cut: false,
            image_name: Some("registry.example/nb:1".into()),
            runtime_root_mode: None,
            spec: crate::node::container::Spec::default(),
        }
    }

    fn base() -> anyhow::Result<Base> {
        let digest = Digest::of("blob");
        let descriptor =
            serde_json::from_value(json!({"mediaType": "t", "digest": digest, "size": 0}))?;
        let diff_id = DiffId(Digest::of("diff"));
        let layer = BaseLayer {
            diff_id,
            chain_id: ChainId::bottom(diff_id),
            lower: Some("/l".into()),
            descriptor: Some(descriptor),
            size_known: false,
            local_blob: None,
            repositories: vec![],
        };
        Ok(Base {
            name: Some("registry.example/nb:1".into()),
            manifest: Some(RawManifest {
                bytes: vec![],
                media_type: String::new(),
                digest: Digest::of(""),
            }),
            config: b"{}".to_vec(),
            layers: vec![layer],
            proof: "1 chain ID".into(),
        })
    }

    #[test]
    fn ps_for_people_and_programs() -> anyhow::Result<()> {
        let mut plain = container();
        (plain.runtime, plain.pod, plain.names, plain.image_name) =
            (Runtime::Docker, None, vec!["web".into()], None);
        let mut process = container();
        (process.runtime, process.pod, process.id) = (Runtime::Process, None, "pid:42".into());
        let views = [
            ContainerView::new(&container(), Some(3 << 20)),
            ContainerView::new(&plain, None),
            ContainerView::new(&process, Some(0)),
        ];
        let expected = "\
RUNTIME     ID            NAME                   IMAGE                  PID  CHANGES
containerd  abababababab  jupyter/nb-0/notebook  registry.example/nb:1   42  3.15 MB
docker      abababababab  web                    -                       42        -
process     pid:42        -                      registry.example/nb:1   42      0 B
";
        assert_eq!(ps_table(&views, false, false), expected);
        assert!(ps_table(&views, true, false).contains(&"ab".repeat(32)));
        let expected = json!({
            "runtime": "containerd", "id": "ab".repeat(32), "names": [], "namespace": "k8s.io",
            "pod": {"namespace": "jupyter", "name": "nb-0", "container": "notebook", "uid": null},
            "image": "registry.example/nb:1", "pid": 42, "ended": null, "upper_bytes": 3 << 20,
        });
        assert_eq!(serde_json::to_value(&views[0])?, expected);
        let mut gone = ContainerView::new(&plain, None);
        gone.pid = None;
        gone.ended = Some(EndView::new(&End {
            exit_code: Some(137),
            out_of_memory: true,
            ..End::default()
        }));
        let table = ps_table(&[gone], false, true);
        assert!(
            table.ends_with("  ended: exit code 137, out of memory\n"),
            "{table}"
        );
        assert!(ps_table(&views, false, true).contains("  running\n"));
        Ok(())
    }

    #[test]
    fn inspect_lists_volumes_first_and_no_more_mounts_than_it_may() -> anyhow::Result<()> {
        let mut it = container();
        let home = it.mounts[0].clone();
        it.mounts = (0..750)
            .map(|number| MountPoint {
                destination: format!("/a/{}{number}", "\u{1}".repeat(3700)).into(),
                kind: "tmpfs".into(),
                source: "\u{1}".repeat(4000),
                volume: false,
            })
            .chain([home])
            .collect();
        let view = InspectView::new(&it, Ok(&base()?), None, None);
        assert_eq!(view.not_saved[0].destination, "/home");
        assert_eq!(view.not_saved.len() + view.not_saved_more, 751);
        let json = serde_json::to_vec(&view)?;
        assert!(json.len() < 256 << 10, "{} bytes", json.len());
        assert!(view.table().contains("and 750 mounts of the runtime's own"));
        Ok(())
    }

    #[test]
    fn inspect_for_people_and_programs() -> anyhow::Result<()> {
        let view = InspectView::new(&container(), Ok(&base()?), Some(1024), Some(3));
        let json = serde_json::to_value(&view)?;
        assert_eq!(
            json["upper"],
            json!({"path": "/u\\xff", "bytes": 1024, "entries": 3})
        );
        assert_eq!(
            json["base"]["layers"][0]["size"],
            json!(null),
            "a size that is not known is not 0"
        );
        assert_eq!(
            json["base"]["layers"][0]["digest"],
            json!(Digest::of("blob"))
        );
        assert_eq!(json["base"]["config_digest"], json!(Digest::of("{}")));
        assert_eq!(json["base_error"], json!(null));
        assert_eq!(
            json["uid_map"],
            json!([{"inside": 0, "outside": 100_000, "count": 65_536}])
        );
        assert_eq!(json["not_saved"][0]["destination"], "/home");
        let table = view.table();
        assert!(
            table.contains("User ids    0 to 65535 are 100000 to 165535 on this node\n"),
            "{table}"
        );
        assert!(
            table.contains("Not saved   /home (nfs4 from nas:/h\\u{1b})\n"),
            "{table}"
        );
        assert!(
            table.contains("and 1 mount of the runtime's own\n"),
            "{table}"
        );

        let mut view = view;
        let next = NextSave {
            kind: NextKind::Delta,
            reason: "it can".into(),
            entries: 7,
            bytes: 2048,
            layers: 3,
            times_only: false,
        };
        view.saved_next(next, &["/home/".into()]);
        assert_eq!(
            view.not_saved.len(),
            1,
            "what is saved is not listed as not saved"
        );
        assert_eq!(
            serde_json::to_value(&view)?["next_save"],
            json!({"kind": "delta", "reason": "it can", "entries": 7, "bytes": 2048, "layers": 3, "times_only": false})
        );
        let table = view.table();
        let line = "Next save   what changed: 2.05 kB in 7 entries; 3 layers above the base then\n";
        assert!(table.contains(line), "{table}");

        let view = InspectView::new(&container(), Err("compared \x1b with b".into()), None, None);
        assert!(view.table().contains("not proven: compared \\u{1b} with b"));
        assert_eq!(serde_json::to_value(&view)?["base"], json!(null));
        Ok(())
    }

    #[test]
    fn diff_is_docker_diff() -> anyhow::Result<()> {
        let lines = [
            DiffView::new(Change::C, Path::new("etc")),
            DiffView::new(Change::A, Path::new("/etc/new\nline")),
            DiffView::new(Change::D, Path::new("gone/")),
        ];
        assert_eq!(diff_table(&lines), "C /etc\nA /etc/new\\nline\nD /gone\n");
        assert_eq!(
            serde_json::to_value(&lines[2])?,
            json!({"change": "D", "path": "/gone"})
        );
        Ok(())
    }
}
