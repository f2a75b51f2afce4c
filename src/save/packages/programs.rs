//! The programs by which a session is started: whether they are in its tree, from which an image is made. A user can
//! have deleted or replaced them or their interpreters, and an image without them does not start.

use super::shebang;
use super::tree::{File, Place, Tree};
use super::user;
use crate::common::escape;
use crate::image::manifest::Start;
use crate::image::packages::{Interpreter, Program, StartUser};
use crate::node::container::{Container, Spec};

/// The program by which a JupyterHub starts a server, and the module that is the same.
const SINGLEUSER: &str = "jupyterhub-singleuser";
const MODULE: &str = "jupyterhub.singleuser";
/// The variable that every JupyterHub sets for its servers.
const HUB: &str = "JUPYTERHUB_SERVICE_PREFIX";
/// Directories of programs if the environment has none, as runtimes set them.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Maximum number of directories that are searched.
const MAX_DIRECTORIES: usize = 64;
/// Maximum number of scripts that start each other.
const MAX_SCRIPTS: usize = 2;
/// Maximum length of a name in bytes.
const MAX_NAME: usize = 256;

/// Returns the programs by which a container was started and by which its image, started as `start` says, would be, as
/// they are in its tree now, and the image's user; none that cannot be looked for.
pub(super) fn of(container: &Container, start: &Start) -> (Vec<Program>, Option<StartUser>) {
    let now = Tree::open(container, true);
    let base = Tree::open(container, false);
    let (Ok(now), Ok(base)) = (now, base) else {
        return (Vec::new(), None);
    };
    (
        listed(&container.spec, start, &now, &base),
        user::of(&start.user, &now),
    )
}

fn listed(spec: &Spec, start: &Start, now: &Tree, base: &Tree) -> Vec<Program> {
    let search = search_path(spec);
    let first = first(&spec.args);
    let is_module = spec.args.iter().any(|word| word == MODULE);
    let is_of_hub = spec
        .env
        .iter()
        .any(|line| line.split('=').next() == Some(HUB));
    // A base that never had it is started in another way.
    let in_base =
        |name: &&str| matches!(base.program(name.as_bytes(), &search), Ok(Place::File(_)));
    let hub = Some(SINGLEUSER)
        .filter(|_| is_of_hub && !is_module)
        .filter(in_base);
    let image = self::first(&start.command).filter(in_base);
    let names = [(first, false), (hub, false), (image, true)];
    let mut listed: Vec<Program> = Vec::new();
    for (name, image_only) in names {
        let Some(program) = name.and_then(|name| look(name, image_only, now, &search)) else {
            continue;
        };
        let is_same = |known: &Program| {
            known.name == program.name || (known.path.is_some() && known.path == program.path)
        };
        if !listed.iter().any(is_same) {
            listed.push(program);
        }
    }
    listed
}

/// Returns the program of a command, unless its path depends on the working directory.
fn first(command: &[String]) -> Option<&str> {
    let name = command.first().map(String::as_str);
    name.filter(|name| name.starts_with('/') || !(name.is_empty() || name.contains('/')))
}

fn look(name: &str, image_only: bool, now: &Tree, search: &[String]) -> Option<Program> {
    let place = now.program(name.as_bytes(), search).ok()?;
    let (path, mounted) = told(&place);
    Some(Program {
        name: escape::limited(name, MAX_NAME),
        path,
        mounted,
        image_only,
        interpreter: match place {
            Place::File(file) => interpreter(file, now, search),
            Place::Mounted | Place::Nowhere => None,
        },
    })
}

/// Returns the path of a program, and whether it may be below a mount.
fn told(place: &Place) -> (Option<String>, bool) {
    match place {
        Place::File(file) => (Some(format!("/{}", escape::path(&file.path))), false),
        Place::Mounted => (None, true),
        Place::Nowhere => (None, false),
    }
}

/// Returns the first interpreter without which a script does not start, or the last of those that it needs. What cannot
/// be read needs none.
fn interpreter(mut file: File, now: &Tree, search: &[String]) -> Option<Interpreter> {
    let mut last = None;
    for _ in 0..MAX_SCRIPTS {
        let Ok(Some(head)) = now.read(&file, shebang::HEAD as u64) else {
            break;
        };
        let names = shebang::interpreters(&head);
        if names.is_empty() {
            break;
        }
        for name in names {
            let Ok(place) = now.program(&name, search) else {
                return last;
            };
            let (path, mounted) = told(&place);
            last = Some(Interpreter {
                name: escape::limited(&escape::path(&name), MAX_NAME),
                path,
                mounted,
            });
            match place {
                Place::File(found) => file = found,
                Place::Mounted | Place::Nowhere => return last,
            }
        }
    }
    last
}

fn search_path(spec: &Spec) -> Vec<String> {
    let set = spec.env.iter().find_map(|line| line.strip_prefix("PATH="));
    let all = set.filter(|path| !path.is_empty()).unwrap_or(DEFAULT_PATH);
    let absolute = all
        .split(':')
        .filter(|directory| directory.starts_with('/'));
    absolute.take(MAX_DIRECTORIES).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::PathBuf;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;
    use crate::node::overlay::mount::OverlayMount;
    use crate::node::overlay::xattr::Namespace;

    type Outcome = Result<(), Box<dyn std::error::Error>>;
    /// Name, path and `mounted`.
    type Found = (String, Option<String>, bool);

    struct Container {
        dir: tempfile::TempDir,
        overlay: OverlayMount,
        spec: Spec,
        start: Start,
        mounts: BTreeSet<Vec<u8>>,
    }

    impl Container {
        fn new() -> Result<Self, Box<dyn std::error::Error>> {
            let dir = tempfile::tempdir()?;
            let path = |name: &str| -> std::io::Result<PathBuf> {
                let path = dir.path().join(name);
                fs::create_dir(&path)?;
                Ok(path)
            };
            let overlay = OverlayMount {
                upper: path("upper")?,
                lowers: vec![path("lower1")?, path("lower2")?],
                data_only: Vec::new(),
                id_mapped: Vec::new(),
                namespace: Namespace::User,
                index: false,
            };
            let spec = Spec {
                args: ["tini", "--", "start.sh"].map(str::to_owned).into(),
                env: [
                    "JUPYTERHUB_SERVICE_PREFIX=/user/a/",
                    "PATH=/opt/bin:/usr/bin",
                ]
                .map(str::to_owned)
                .into(),
                ..Spec::default()
            };
            let it = Self {
                dir,
                overlay,
                spec,
                start: Start::default(),
                mounts: BTreeSet::new(),
            };
            it.program("lower2/usr/bin/tini", 0o755)?;
            it.program("lower1/opt/real/jupyterhub-singleuser", 0o755)?;
            fs::create_dir(it.dir.path().join("lower1/opt/bin"))?;
            symlink(
                "../real/jupyterhub-singleuser",
                it.dir.path().join("lower1/opt/bin/jupyterhub-singleuser"),
            )?;
            Ok(it)
        }

        fn program(&self, path: &str, mode: u32) -> std::io::Result<()> {
            let path = self.dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap_or(&path))?;
            fs::write(&path, "#!/bin/sh\n")?;
            fs::set_permissions(path, Permissions::from_mode(mode))
        }

        fn delete(&self, path: &str) -> std::io::Result<()> {
            let path = self.overlay.upper.join(path);
            fs::create_dir_all(path.parent().unwrap_or(&path))?;
            Ok(mknodat(
                CWD,
                &path,
                FileType::CharacterDevice,
                Mode::empty(),
                0,
            )?)
        }

        fn listed(&self) -> Result<Vec<Program>, std::io::Error> {
            let tree = |upper| Tree::new(&self.overlay, upper, self.mounts.clone());
            Ok(listed(&self.spec, &self.start, &tree(true)?, &tree(false)?))
        }

        /// Writes an executable file of the upper.
        fn script(&self, path: &str, content: &str) -> std::io::Result<()> {
            let path = format!("upper/{path}");
            self.program(&path, 0o755)?;
            fs::write(self.dir.path().join(path), content)
        }

        /// Returns name, path and `mounted` of the interpreter of the first program.
        fn interpreter(&self) -> Result<Option<Found>, Box<dyn std::error::Error>> {
            let first = self.listed()?.into_iter().next().ok_or("no program")?;
            let found = first.interpreter;
            Ok(found.map(|it| (it.name, it.path, it.mounted)))
        }

        /// Returns name, path and `mounted` of each program.
        fn found(&self) -> Result<Vec<Found>, std::io::Error> {
            let listed = self.listed()?;
            Ok(listed
                .into_iter()
                .map(|it| (it.name, it.path, it.mounted))
                .collect())
        }
    }

    fn at(name: &str, path: &str) -> Found {
        (name.to_owned(), Some(path.to_owned()), false)
    }

    fn not(name: &str, mounted: bool) -> Found {
        (name.to_owned(), None, mounted)
    }

    #[test]
    fn programs_are_found_over_all_layers_and_links() -> Outcome {
        let it = Container::new()?;
        let all = [
            at("tini", "/usr/bin/tini"),
            at(SINGLEUSER, "/opt/real/jupyterhub-singleuser"),
        ];
        assert_eq!(it.found()?, all);
        // A user's own, in a directory that is searched before.
        it.program("upper/opt/bin/tini", 0o755)?;
        assert_eq!(it.found()?[0], at("tini", "/opt/bin/tini"));
        it.program("upper/opt/bin/tini", 0o644)?;
        assert_eq!(it.found()?[0], at("tini", "/usr/bin/tini"));
        Ok(())
    }

    #[test]
    fn what_was_deleted_or_cannot_be_executed_is_missing() -> Outcome {
        let it = Container::new()?;
        it.delete("opt/real")?;
        it.program("upper/usr/bin/tini", 0o644)?;
        assert_eq!(it.found()?, [not("tini", false), not(SINGLEUSER, false)]);
        Ok(())
    }

    #[test]
    fn a_mounted_directory_is_said() -> Outcome {
        let mut it = Container::new()?;
        it.mounts.insert(b"opt".to_vec());
        it.spec.args[0] = "/opt/bin/server".to_owned();
        assert_eq!(it.found()?, [not("/opt/bin/server", true)]);
        Ok(())
    }

    #[test]
    fn only_what_starts_this_session_is_looked_for() -> Outcome {
        let mut it = Container::new()?;
        it.spec.args = ["tini", "python3", "-m", MODULE].map(str::to_owned).into();
        assert_eq!(it.found()?, [at("tini", "/usr/bin/tini")]);
        it.spec.args = vec!["tini".to_owned()];
        it.spec.env.remove(0);
        assert_eq!(it.found()?, [at("tini", "/usr/bin/tini")]);
        // A hub that starts its servers in another way has a base without it.
        let it = Container::new()?;
        fs::remove_dir_all(it.dir.path().join("lower1/opt"))?;
        assert_eq!(it.found()?, [at("tini", "/usr/bin/tini")]);
        Ok(())
    }

    #[test]
    fn a_tenant_s_links_end() -> Outcome {
        let it = Container::new()?;
        let bin = it.overlay.upper.join("usr/bin");
        fs::create_dir_all(&bin)?;
        symlink("tini", bin.join("tini"))?;
        // Unknown, so that nothing is said of it.
        assert_eq!(
            it.found()?,
            [at(SINGLEUSER, "/opt/real/jupyterhub-singleuser")]
        );
        // Out of the tree: the root is where it ends.
        fs::remove_file(bin.join("tini"))?;
        symlink("../../../../../../../../bin/sh", bin.join("tini"))?;
        assert_eq!(it.found()?[0], not("tini", false));
        Ok(())
    }

    #[test]
    fn scripts_name_what_they_need() -> Outcome {
        let mut it = Container::new()?;
        assert_eq!(it.interpreter()?, Some(not("/bin/sh", false)));
        it.script("bin/sh", "\x7fELF")?;
        assert_eq!(it.interpreter()?, Some(at("/bin/sh", "/bin/sh")));
        // The first that is missing, and the last if all are there.
        it.script("usr/bin/tini", "#!/usr/bin/env python3\n")?;
        assert_eq!(it.interpreter()?, Some(not("/usr/bin/env", false)));
        it.script("usr/bin/env", "\x7fELF")?;
        assert_eq!(it.interpreter()?, Some(not("python3", false)));
        it.script("opt/bin/python3", "\x7fELF")?;
        assert_eq!(it.interpreter()?, Some(at("python3", "/opt/bin/python3")));
        // An interpreter that is a script, of one that is not there or is the script itself.
        it.script("opt/bin/python3", "#!/opt/conda/bin/python\n")?;
        let conda = "/opt/conda/bin/python";
        assert_eq!(it.interpreter()?, Some(not(conda, false)));
        it.script("opt/bin/python3", "#!/opt/bin/python3\n")?;
        let itself = "/opt/bin/python3";
        assert_eq!(it.interpreter()?, Some(at(itself, itself)));
        let pip = format!("#!/bin/sh\n'''exec' {conda} \"$0\" \"$@\"\n' '''\n");
        it.script("usr/bin/tini", &pip)?;
        assert_eq!(it.interpreter()?, Some(not(conda, false)));
        it.mounts.insert(b"opt/conda".to_vec());
        assert_eq!(it.interpreter()?, Some(not(conda, true)));
        it.script("usr/bin/tini", "\x7fELF")?;
        assert_eq!(it.interpreter()?, None);
        Ok(())
    }

    #[test]
    fn the_image_s_own_command_is_looked_for_if_it_is_another() -> Outcome {
        let mut it = Container::new()?;
        let said = |it: &Container| -> Result<Vec<(String, bool)>, std::io::Error> {
            let listed = it.listed()?.into_iter();
            Ok(listed.map(|one| (one.name, one.image_only)).collect())
        };
        let started = [("tini".to_owned(), false), (SINGLEUSER.to_owned(), false)];
        it.start.command = vec!["/usr/bin/tini".to_owned(), "--".to_owned()];
        assert_eq!(said(&it)?, started, "it is the same file");
        it.start.command = vec!["start-notebook.py".to_owned()];
        assert_eq!(said(&it)?, started, "the base has none");
        it.program("lower1/usr/bin/start-notebook.py", 0o755)?;
        assert_eq!(said(&it)?[2], ("start-notebook.py".to_owned(), true));
        it.delete("usr/bin/start-notebook.py")?;
        assert_eq!(it.found()?[2], not("start-notebook.py", false));
        // What a hub starts anyway is not the image's alone.
        it.start.command = vec![SINGLEUSER.to_owned()];
        assert_eq!(said(&it)?, started);
        Ok(())
    }
}
