//! The Helm chart and the manifests rendered from it: what is documented is what there is, what is rendered is understood
//! by the program, and what an agent may do is what it needs.

#[path = "support/mod.rs"]
#[allow(dead_code, reason = "other tests use the rest of it")]
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

type Outcome = Result<(), Box<dyn std::error::Error>>;
type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

const IMAGE: &str = "image.repository=registry.example.org/upperdeck";
const TARGET: &str = "target=registry.example.org/sessions/{user}/{name}:{tag}";
const PRESETS: [(&str, &[&str]); 5] = [
    ("kubeadm", &["/var/lib/containerd", "/run/containerd"]),
    ("erofs", &["/var/lib/containerd", "/run/containerd"]),
    (
        "k3s",
        &[
            "/var/lib/rancher/k3s/agent/containerd",
            "/run/k3s/containerd",
        ],
    ),
    (
        "rke2",
        &[
            "/var/lib/rancher/rke2/agent/containerd",
            "/run/k3s/containerd",
        ],
    ),
    (
        "crio",
        &["/var/lib/containers/storage", "/run/containers/storage"],
    ),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> Fallible<String> {
    Ok(fs::read_to_string(root().join(path))?)
}

/// Returns helm, which `tests/run` does not install: it is built from source, which takes minutes.
fn helm() -> Option<PathBuf> {
    let kept = PathBuf::from("/var/tmp/upperdeck-tools/helm");
    let found = support::find_program("helm").or_else(|| kept.is_file().then_some(kept));
    if found.is_none() {
        support::ignore("no helm");
    }
    found
}

fn template(helm: &Path, set: &[&str]) -> std::io::Result<Output> {
    let mut command = Command::new(helm);
    command.args(["template", "upperdeck", "deploy/helm/upperdeck"]);
    command.args(["--namespace", "upperdeck", "--kube-version", "1.31.0"]);
    for value in set {
        command.args(["--set", value]);
    }
    command.current_dir(root()).output()
}

/// Returns the objects of a rendered chart by kind and name.
fn objects(text: &str) -> Fallible<BTreeMap<(String, String), Value>> {
    let mut all = BTreeMap::new();
    for document in text.split("\n---\n") {
        let Some(object) = serde_yaml_ng::from_str::<Option<Value>>(document)? else {
            continue;
        };
        let name = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let key = (name(&object["kind"]), name(&object["metadata"]["name"]));
        assert!(all.insert(key.clone(), object).is_none(), "{key:?} twice");
    }
    Ok(all)
}

fn rendered(helm: &Path, set: &[&str]) -> Fallible<BTreeMap<(String, String), Value>> {
    let output = template(helm, set)?;
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{set:?}: {told}");
    objects(&format!("\n{}", String::from_utf8(output.stdout)?))
}

fn object<'a>(
    all: &'a BTreeMap<(String, String), Value>,
    kind: &str,
    name: &str,
) -> Fallible<&'a Value> {
    let key = (kind.to_owned(), name.to_owned());
    all.get(&key)
        .ok_or_else(|| format!("no {kind} {name}").into())
}

/// Adds the values below `path` that are not groups of others, according to the schema.
fn leaves(path: &str, schema: &Value, value: &Value, found: &mut BTreeMap<String, Value>) {
    let (Some(properties), Some(values)) = (schema["properties"].as_object(), value.as_object())
    else {
        found.insert(path.to_owned(), value.clone());
        return;
    };
    assert_eq!(schema["additionalProperties"], false, "{path}");
    for (name, value) in values {
        let path = [path, name].join(".");
        let path = path.trim_start_matches('.');
        let schema = &properties.get(name).unwrap_or(&Value::Null);
        assert!(!schema.is_null(), "{path} is not in the schema");
        leaves(path, schema, value, found);
    }
    let unknown: Vec<_> = properties
        .keys()
        .filter(|name| !values.contains_key(*name) && *name != "global")
        .collect();
    assert!(unknown.is_empty(), "in the schema only: {path} {unknown:?}");
}

#[test]
fn every_value_is_described_with_its_default() -> Outcome {
    let values: Value = serde_yaml_ng::from_str(&read("deploy/helm/upperdeck/values.yaml")?)?;
    let schema: Value = serde_json::from_str(&read("deploy/helm/upperdeck/values.schema.json")?)?;
    let mut expected = BTreeMap::new();
    leaves("", &schema, &values, &mut expected);
    assert!(expected.len() > 60, "{}", expected.len());
    let readme = read("deploy/helm/upperdeck/README.md")?;
    let mut described = BTreeMap::new();
    for line in readme.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.split(" | ").collect();
        let [name, default, what] = cells[..] else {
            return Err(format!("three cells: {line}").into());
        };
        assert!(what.len() > 5, "{line}");
        let name = name.trim_start_matches("| ").trim_matches('`').to_owned();
        let default = serde_yaml_ng::from_str::<Value>(default.trim_matches('`'))?;
        assert!(described.insert(name, default).is_none(), "{line}");
    }
    assert_eq!(described, expected);
    let checked = boon_schema(&schema, &values);
    assert!(checked.is_ok(), "{checked:?}");
    Ok(())
}

/// Returns whether `value` is valid.
fn boon_schema(schema: &Value, value: &Value) -> Result<(), String> {
    let (mut schemas, mut compiler) = (boon::Schemas::new(), boon::Compiler::new());
    let wrong = |error: boon::CompileError| error.to_string();
    compiler
        .add_resource("values.json", schema.clone())
        .map_err(wrong)?;
    let index = compiler
        .compile("values.json", &mut schemas)
        .map_err(wrong)?;
    schemas
        .validate(value, index)
        .map_err(|error| error.to_string())
}

#[test]
fn chart_and_program_are_of_one_version() -> Outcome {
    let chart: Value = serde_yaml_ng::from_str(&read("deploy/helm/upperdeck/Chart.yaml")?)?;
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
    // One source of the alerts.
    let file = root().join("deploy/helm/upperdeck/files/rules.yml");
    let rules = root().join("deploy/prometheus/rules.yml");
    assert_eq!(file.canonicalize()?, rules.canonicalize()?);
    Ok(())
}

#[test]
fn the_manifests_are_what_the_chart_renders() -> Outcome {
    let Some(helm) = helm() else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let made = dir.path().join("upperdeck.yaml");
    let bin = helm.parent().ok_or("a directory")?;
    let path = format!("{}:{}", bin.display(), std::env::var("PATH")?);
    let output = Command::new(root().join("deploy/helm/render"))
        .arg(&made)
        .env("PATH", path)
        .output()?;
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    let committed = read("deploy/kubernetes/upperdeck.yaml")?;
    assert!(
        fs::read_to_string(&made)? == committed,
        "deploy/kubernetes/upperdeck.yaml is out of date: run deploy/helm/render"
    );
    Ok(())
}

#[test]
fn an_agent_may_what_a_save_needs_and_no_more() -> Outcome {
    let all = objects(&format!("\n{}", read("deploy/kubernetes/upperdeck.yaml")?))?;
    let agent = object(&all, "DaemonSet", "upperdeck-agent")?;
    let pod = &agent["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let expected = serde_json::json!({
        "privileged": false,
        "readOnlyRootFilesystem": true,
        "capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN", "SYS_PTRACE", "DAC_READ_SEARCH"]},
    });
    assert_eq!(container["securityContext"], expected);
    assert_eq!(pod["hostPID"], true);
    assert_eq!(pod["automountServiceAccountToken"], false);
    assert_eq!(
        pod["securityContext"]["seccompProfile"]["type"],
        "RuntimeDefault"
    );
    for key in ["hostNetwork", "hostIPC"] {
        assert!(pod.get(key).is_none(), "{key}");
    }
    let mounts = container["volumeMounts"].as_array().ok_or("mounts")?;
    let written: BTreeSet<&str> = mounts
        .iter()
        .filter(|mount| mount["readOnly"] != true)
        .filter_map(|mount| mount["mountPath"].as_str())
        .collect();
    assert_eq!(
        written,
        BTreeSet::from([
            "/host/run/upperdeck",
            "/host/sys/fs/cgroup",
            "/var/lib/upperdeck"
        ])
    );
    // An agent that is deleted by force goes on beside its successor: each has to see which containers the other has frozen.
    let volumes = pod["volumes"].as_array().ok_or("volumes")?;
    let claims = volumes.iter().find(|v| v["name"] == "claims");
    let claims = &claims.ok_or("a volume for claims")?["hostPath"];
    assert_eq!(
        *claims,
        serde_json::json!({"path": "/run/upperdeck", "type": "DirectoryOrCreate"})
    );
    // The master key is not in the agent's container.
    assert!(mounts.iter().all(|mount| mount["name"] != "master-key"));
    let drain = pod["terminationGracePeriodSeconds"].as_u64();
    assert!(drain.is_some_and(|seconds| seconds > 300), "{drain:?}");
    let key_maker = &pod["initContainers"][0]["securityContext"];
    assert_eq!(
        key_maker["capabilities"],
        serde_json::json!({"drop": ["ALL"]})
    );

    for name in ["upperdeck-manager", "upperdeck-redis"] {
        let pod = &object(&all, "Deployment", name)?["spec"]["template"]["spec"];
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{name}");
        assert_eq!(pod["automountServiceAccountToken"], false, "{name}");
        let container = &pod["containers"][0]["securityContext"];
        let expected = serde_json::json!({
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": {"drop": ["ALL"]},
        });
        assert_eq!(*container, expected, "{name}");
    }
    Ok(())
}

#[test]
fn presets_show_an_agent_what_its_runtime_has() -> Outcome {
    let Some(helm) = helm() else { return Ok(()) };
    for (preset, paths) in PRESETS {
        let preset = format!("preset={preset}");
        let all = rendered(&helm, &[IMAGE, TARGET, &preset])?;
        let agent = object(&all, "DaemonSet", "upperdeck-agent")?;
        let pod = &agent["spec"]["template"]["spec"];
        for path in paths {
            let volumes = pod["volumes"].as_array().ok_or("volumes")?;
            let volume = volumes.iter().find(|v| v["hostPath"]["path"] == *path);
            let name = &volume.ok_or_else(|| format!("{preset}: {path}"))?["name"];
            let mounts = pod["containers"][0]["volumeMounts"].as_array();
            let mount = mounts.ok_or("mounts")?.iter().find(|m| m["name"] == *name);
            let mount = mount.ok_or("a mount")?;
            assert_eq!(mount["mountPath"], format!("/host{path}"), "{preset}");
            assert_eq!(mount["mountPropagation"], "HostToContainer", "{preset}");
            let args = pod["containers"][0]["args"].to_string();
            assert!(args.contains(&format!("={path}\"")), "{preset}: {args}");
        }
    }
    Ok(())
}

#[test]
fn values_that_cannot_work_are_refused() -> Outcome {
    let Some(helm) = helm() else { return Ok(()) };
    for (set, told) in [
        (&[IMAGE][..], "target"),
        (&[TARGET], "image.repository"),
        (&[IMAGE, TARGET, "agent.nosuch=1"], "nosuch"),
        (&[IMAGE, TARGET, "preset=docker"], "preset"),
        (&[IMAGE, TARGET, "preset=custom"], "agent.runtime"),
        (&[IMAGE, "target=registry.example.org/x:1"], "target"),
        (&[IMAGE, TARGET, "manager.replicas=2"], "record.postgres"),
        (
            &[IMAGE, TARGET, "secrets.generate=false"],
            "secrets.existingSecret",
        ),
        (
            &[IMAGE, TARGET, "preset=erofs", "agent.mountPropagation=None"],
            "agent.mountPropagation",
        ),
        (&[IMAGE, TARGET, "agent.settings.slots.x=1"], "slots"),
        (&[IMAGE, TARGET, "manager.autosave=8d"], "/manager/autosave"),
        (
            &[IMAGE, TARGET, "manager.settings.autosave_min=30d"],
            "autosave_min",
        ),
        (
            &[IMAGE, TARGET, "manager.settings.autosave_keep=101"],
            "autosave_keep",
        ),
        (
            &[IMAGE, TARGET, "agent.settings.save_ended=sometimes"],
            "save_ended",
        ),
        // Passwords would stand in a ConfigMap.
        (
            &[
                IMAGE,
                TARGET,
                "record.postgres=postgres://u:pw@db/upperdeck",
            ],
            "/record/postgres",
        ),
        (
            &[IMAGE, TARGET, "redis.url=redis://:pw@redis"],
            "/redis/url",
        ),
        (
            &[IMAGE, TARGET, "fullnameOverride=a.b"],
            "/fullnameOverride",
        ),
        (
            &[IMAGE, TARGET, "agent.podAnnotations.x=1"],
            "podAnnotations",
        ),
        (
            &[
                IMAGE,
                TARGET,
                "record.sqlite.hostPath=/srv",
                "record.sqlite.existingClaim=c",
            ],
            "/record/sqlite",
        ),
        (&[IMAGE, TARGET, "ingress.enabled=true"], "ingress.host"),
    ] {
        let output = template(&helm, set)?;
        let found = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{set:?} is accepted");
        // Versions of helm differ in how they write the path of a value.
        let plain = |text: &str| text.replace('/', ".");
        let told = plain(told);
        let is_told = plain(&found).contains(told.trim_start_matches('.'));
        assert!(is_told, "{set:?}: {found}");
    }
    Ok(())
}

#[test]
fn the_program_understands_the_settings_that_are_rendered() -> Outcome {
    let Some(helm) = helm() else { return Ok(()) };
    let set = [
        IMAGE,
        TARGET,
        "registry.existingSecret=robot",
        "registry.caSecret=ca",
        "record.postgres=postgres://u@db/upperdeck",
        "record.existingSecret=pg",
        "manager.replicas=3",
        "manager.proxyFrom={10.1.0.0/16}",
        "manager.settings.retention=90d",
        "ingress.enabled=true",
        "ingress.host=save.example.org",
        "ingress.tlsSecret=tls",
        "agent.settings.slots=2",
        "agent.settings.commit_flag={--pause=none}",
        "metrics.serviceMonitor=true",
        "metrics.rules=true",
        "kubernetesAuth.enabled=true",
        "kubernetesSaves.enabled=true",
    ];
    let all = rendered(&helm, &set)?;
    object(&all, "CustomResourceDefinition", "saves.upperdeck.io")?;
    let output = Command::new(env!("CARGO_BIN_EXE_upperdeck"))
        .arg("crd")
        .output()?;
    let printed: Value = serde_json::from_slice(&output.stdout)?;
    let kept: Value = serde_json::from_str(&read("deploy/helm/upperdeck/files/saves.json")?)?;
    assert_eq!(kept, printed, "deploy/helm/upperdeck/files/saves.json");
    let dir = tempfile::tempdir()?;
    for (verb, expected) in [
        (
            "manager",
            &[
                "retention = \"90d\"",
                "public_url = \"https://save.example.org/\"",
                "10.1.0.0/16",
                "kubernetes_auth = true",
                "kubernetes_crd = true",
            ][..],
        ),
        (
            "agent",
            &[
                "slots = 2",
                "--pause=none",
                "allow = [\"registry.example.org/sessions\"]",
                "health_listen = \"0.0.0.0:8788\"",
            ],
        ),
    ] {
        let config = object(&all, "ConfigMap", &format!("upperdeck-{verb}"))?;
        let file = dir.path().join(verb);
        fs::write(
            &file,
            config["data"]["upperdeck.toml"].as_str().ok_or("text")?,
        )?;
        let output = Command::new(env!("CARGO_BIN_EXE_upperdeck"))
            .args([verb, "--print-config", "--config"])
            .arg(&file)
            .output()?;
        let told = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        for line in expected {
            assert!(told.contains(line), "{verb}: {line}: {told}");
        }
    }
    let budget = object(&all, "PodDisruptionBudget", "upperdeck-manager")?;
    assert_eq!(budget["spec"]["maxUnavailable"], 1);
    let rules = object(&all, "PrometheusRule", "upperdeck")?;
    let alerts: Value = serde_yaml_ng::from_str(&read("deploy/prometheus/rules.yml")?)?;
    assert_eq!(rules["spec"], alerts);
    object(&all, "ServiceMonitor", "upperdeck-agent")?;
    object(&all, "Ingress", "upperdeck")?;
    Ok(())
}

/// An API server checks more than a schema does: names, ports, references between fields.
#[test]
fn an_api_server_takes_what_is_rendered() -> Outcome {
    let Some(cluster) = std::env::var_os("UPPERDECK_TEST_CLUSTER").map(PathBuf::from) else {
        support::ignore("UPPERDECK_TEST_CLUSTER does not name the directory of a cluster");
        return Ok(());
    };
    let Some(helm) = helm() else { return Ok(()) };
    let presets = PRESETS.map(|(preset, _)| vec![format!("preset={preset}")]);
    let all = [
        "record.postgres=postgres://u@db/upperdeck",
        "manager.replicas=3",
        "ingress.enabled=true",
        "ingress.host=save.example.org",
        "redis.url=rediss://redis.example.org",
        "agent.nodeKeys.source=secret",
        "agent.nodeKeys.existingSecret=nodes",
        "kubernetesAuth.enabled=true",
        "kubernetesSaves.enabled=true",
    ];
    let all = all.map(str::to_owned).to_vec();
    for set in presets.into_iter().chain([all]) {
        let set: Vec<&str> = [IMAGE, TARGET]
            .into_iter()
            .chain(set.iter().map(String::as_str))
            .collect();
        let output = template(&helm, &set)?;
        assert!(output.status.success(), "{set:?}");
        let text =
            String::from_utf8(output.stdout)?.replace("namespace: upperdeck", "namespace: default");
        let file = tempfile::NamedTempFile::new()?;
        fs::write(file.path(), text)?;
        let applied = Command::new(cluster.join("bin/kubectl"))
            .args([
                "--namespace",
                "default",
                "create",
                "--dry-run=server",
                "--validate=strict",
                "-f",
            ])
            .arg(file.path())
            .env("KUBECONFIG", cluster.join("admin.conf"))
            .output()?;
        let told = String::from_utf8_lossy(&applied.stderr);
        assert!(applied.status.success(), "{set:?}: {told}");
    }
    Ok(())
}

/// Makes a copy of a program of this machine that says it is for aarch64.
fn for_aarch64(program: &Path, copy: &Path) -> Outcome {
    let mut bytes = fs::read(program)?;
    // e_machine in the ELF header: EM_AARCH64.
    bytes[18..20].copy_from_slice(&[0xb7, 0]);
    Ok(fs::write(copy, bytes)?)
}

#[test]
fn an_image_has_a_program_for_each_architecture_and_runs_as_a_user() -> Outcome {
    let needs = ["busybox", "jq", "skopeo", "readelf"].map(support::Need::Program);
    if support::ignored(&[&[support::Need::Root], &needs[..]].concat()) {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    // Programs that are linked statically; what they do is of no importance.
    let busybox = support::find_program("busybox").ok_or("busybox")?;
    let other = dir.path().join("other");
    for_aarch64(&busybox, &other)?;
    let image = format!("oci:{}", dir.path().join("image").display());
    let make = |programs: &[&Path]| {
        Command::new(root().join("deploy/image"))
            .arg(&image)
            .args(programs)
            .env("UPPERDECK", env!("CARGO_BIN_EXE_upperdeck"))
            .output()
    };
    let dynamic = make(&[Path::new(env!("CARGO_BIN_EXE_upperdeck"))])?;
    let told = String::from_utf8_lossy(&dynamic.stderr).into_owned();
    assert!(
        !dynamic.status.success() && told.contains("linked dynamically"),
        "{told}"
    );
    let made = make(&[&busybox, &other])?;
    let told = String::from_utf8_lossy(&made.stderr);
    assert!(made.status.success(), "{told}");
    let mut programs = BTreeSet::new();
    for arch in ["amd64", "arm64"] {
        let copy = format!("dir:{}", dir.path().join(arch).display());
        let from = format!("{image}:latest");
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["--override-arch", arch]);
        let copied = skopeo.args(["copy", "--quiet", &from, &copy]).output()?;
        let told = String::from_utf8_lossy(&copied.stderr);
        assert!(copied.status.success(), "{arch}: {told}");
        let file = |name: &str| fs::read(dir.path().join(arch).join(name));
        let manifest: Value = serde_json::from_slice(&file("manifest.json")?)?;
        let blob = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().unwrap_or_default();
            file(digest.trim_start_matches("sha256:"))
        };
        let config: Value = serde_json::from_slice(&blob(&manifest["config"])?)?;
        assert_eq!(config["architecture"], arch);
        assert_eq!(config["config"]["User"], "65532:65532");
        programs.insert(blob(&manifest["layers"][0])?);
    }
    assert_eq!(programs.len(), 2, "each has its own program");
    Ok(())
}

#[test]
fn helm_finds_nothing_to_say() -> Outcome {
    let Some(helm) = helm() else { return Ok(()) };
    let output = Command::new(helm)
        .args([
            "lint",
            "--strict",
            "deploy/helm/upperdeck",
            "--set",
            IMAGE,
            "--set",
            TARGET,
        ])
        .current_dir(root())
        .output()?;
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{told}");
    Ok(())
}
