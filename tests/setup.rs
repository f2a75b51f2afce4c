//! `upperdeck setup` in a root directory of its own: what it makes, that it can be repeated, and what it never changes.

use std::error::Error;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

#[allow(dead_code, reason = "each test program uses its part")]
mod support;

use support::{Need, ignored};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// A machine with a user database, and nothing else.
struct Machine(TempDir);

impl Machine {
    fn new() -> Outcome<Self> {
        let root = tempfile::tempdir()?;
        fs::create_dir(root.path().join("etc"))?;
        fs::write(
            root.path().join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\n",
        )?;
        fs::write(root.path().join("etc/group"), "root:x:0:\n")?;
        fs::write(
            root.path().join("etc/shadow"),
            "root:*:19000:0:99999:7:::\n",
        )?;
        Ok(Self(root))
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(support::program());
        command
            .arg("setup")
            .args(words)
            .arg("--root")
            .arg(self.0.path());
        command
    }

    /// Returns the state of each step.
    fn setup(&self, words: &[&str]) -> Outcome<Vec<(String, String)>> {
        let output = self.command(words).args(["--format", "json"]).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {said}");
        let report: Value = serde_json::from_slice(&output.stdout)?;
        let actions = report["actions"].as_array().ok_or("actions")?;
        let text = |action: &Value, key: &str| action[key].as_str().unwrap_or_default().to_owned();
        Ok(actions
            .iter()
            .map(|action| (text(action, "what"), text(action, "state")))
            .collect())
    }

    fn refused(&self, words: &[&str]) -> Outcome<String> {
        let output = self.command(words).output()?;
        assert!(!output.status.success(), "{words:?}");
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Returns the IDs of the manager's user.
    fn manager(&self) -> Outcome<(u32, u32)> {
        let users = fs::read_to_string(self.at("etc/passwd"))?;
        let user = users
            .lines()
            .find(|line| line.starts_with("upperdeck:"))
            .ok_or("no user")?;
        let fields: Vec<&str> = user.split(':').collect();
        assert_eq!(
            fields[5..],
            ["/var/lib/upperdeck-manager", "/usr/sbin/nologin"]
        );
        Ok((fields[2].parse()?, fields[3].parse()?))
    }
}

/// Returns mode, owner and group.
fn rights(path: &Path) -> Outcome<(u32, u32, u32)> {
    let there = fs::metadata(path)?;
    Ok((there.mode() & 0o7777, there.uid(), there.gid()))
}

fn state<'a>(actions: &'a [(String, String)], what: &str) -> &'a str {
    let found = actions.iter().find(|(name, _)| name == what);
    found.map_or("not named", |(_, state)| state)
}

fn private(path: &Path, text: &str) -> Outcome {
    fs::write(path, text)?;
    Ok(fs::set_permissions(path, Permissions::from_mode(0o600))?)
}

const NEEDS: [Need<'_>; 2] = [Need::Root, Need::Program("useradd")];

#[test]
fn a_managers_machine_is_prepared_once_and_its_key_stays() -> Outcome {
    if ignored(&NEEDS) {
        return Ok(());
    }
    let machine = Machine::new()?;
    let key = machine.at("etc/upperdeck/master-key");

    let planned = machine.setup(&["manager", "--dry-run"])?;
    assert_eq!(state(&planned, "/etc/upperdeck/master-key"), "created");
    assert!(!machine.at("etc/upperdeck").exists() && machine.manager().is_err());

    let done = machine.setup(&["manager"])?;
    assert_eq!(planned, done);
    let (uid, gid) = machine.manager()?;
    assert_eq!(rights(&machine.at("etc/upperdeck"))?, (0o755, 0, 0));
    assert_eq!(
        rights(&machine.at("etc/upperdeck/upperdeck.toml"))?,
        (0o644, 0, 0)
    );
    assert_eq!(rights(&key)?, (0o640, 0, gid));
    assert_eq!(
        rights(&machine.at("var/lib/upperdeck-manager"))?,
        (0o700, uid, gid)
    );
    assert_eq!(state(&done, "/etc/upperdeck/robot"), "missing");
    let content = fs::read(&key)?;
    assert_eq!(content.len(), 65);

    // The second time, only what is wrong is corrected.
    private(&machine.at("etc/upperdeck/robot"), "robot:password")?;
    fs::set_permissions(&key, Permissions::from_mode(0o644))?;
    fs::write(machine.at("etc/upperdeck/upperdeck.toml"), "# mine\n")?;
    let again = machine.setup(&["manager"])?;
    assert_eq!(state(&again, "upperdeck"), "unchanged");
    assert_eq!(state(&again, "/var/lib/upperdeck-manager"), "unchanged");
    assert_eq!(state(&again, "/etc/upperdeck/master-key"), "changed");
    assert_eq!(rights(&key)?, (0o640, 0, gid));
    assert_eq!(fs::read(&key)?, content);
    // The manager can read it: its mode is not widened, but its group is the manager's.
    assert_eq!(rights(&machine.at("etc/upperdeck/robot"))?, (0o600, 0, gid));
    assert_eq!(
        fs::read(machine.at("etc/upperdeck/upperdeck.toml"))?,
        b"# mine\n"
    );
    let third = machine.setup(&["manager"])?;
    assert!(
        third
            .iter()
            .all(|(_, state)| ["unchanged", "missing"].contains(&state.as_str())),
        "{third:?}"
    );
    Ok(())
}

#[test]
fn a_nodes_key_is_made_where_the_master_key_is_and_asked_for_elsewhere() -> Outcome {
    if ignored(&NEEDS) {
        return Ok(());
    }
    let machine = Machine::new()?;
    let key = machine.at("etc/upperdeck/node-key");
    let output = machine.command(&["agent", "--node", "n1"]).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        said.contains(
            "missing        /etc/upperdeck/node-key: on a manager's machine: upperdeck key"
        ),
        "{said}"
    );
    assert!(said.contains("--node n1") && !key.exists(), "{said}");

    let master = machine.at("master");
    private(&master, "a key of the tests, long enough\n")?;
    let with_key = [
        "agent",
        "--node=n1",
        "--master-key",
        master.to_str().ok_or("path")?,
    ];
    assert_eq!(
        state(&machine.setup(&with_key)?, "/etc/upperdeck/node-key"),
        "created"
    );
    assert_eq!(rights(&key)?, (0o600, 0, 0));
    assert_eq!(rights(&machine.at("var/lib/upperdeck"))?, (0o700, 0, 0));
    let made = Command::new(support::program())
        .args(["key", "--node=n1", "--key-file"])
        .arg(&master)
        .output()?;
    assert_eq!(fs::read(&key)?, made.stdout);

    // Another name or master key does not replace it.
    private(&master, "another key of the tests, long enough\n")?;
    assert_eq!(
        state(&machine.setup(&with_key)?, "/etc/upperdeck/node-key"),
        "unchanged"
    );
    assert_eq!(fs::read(&key)?, made.stdout);

    // The agent would not start with the key of another node, so it is not passed over.
    let said = machine.refused(&["agent", "--node=n2"])?;
    assert!(said.contains("node-key") && said.contains("n1"), "{said}");
    assert_eq!(fs::read(&key)?, made.stdout);

    // With a manager on the same machine, each keeps its own, and both read the robot.
    private(&machine.at("etc/upperdeck/robot"), "robot:password")?;
    machine.setup(&["manager"])?;
    fs::set_permissions(
        machine.at("etc/upperdeck/robot"),
        Permissions::from_mode(0o644),
    )?;
    machine.setup(&["agent", "--node=n1"])?;
    let (uid, gid) = machine.manager()?;
    assert_eq!(rights(&machine.at("etc/upperdeck/robot"))?, (0o640, 0, gid));
    assert_eq!(rights(&machine.at("var/lib/upperdeck"))?, (0o700, 0, 0));
    assert_eq!(
        rights(&machine.at("var/lib/upperdeck-manager"))?,
        (0o700, uid, gid)
    );
    Ok(())
}

#[test]
fn a_master_key_that_others_can_read_or_that_is_a_fifo_is_refused() -> Outcome {
    if ignored(&NEEDS) {
        return Ok(());
    }
    let machine = Machine::new()?;
    let master = machine.at("master");
    let path = master.to_str().ok_or("path")?;
    let with_key = ["agent", "--node=n1", "--master-key", path];
    private(&master, "a key of the tests, long enough\n")?;
    fs::set_permissions(&master, Permissions::from_mode(0o644))?;
    let said = machine.refused(&with_key)?;
    assert!(said.contains("chmod 600"), "{said}");
    fs::remove_file(&master)?;
    for fifo in [&master, &machine.at("etc/upperdeck/master-key")] {
        let (kind, mode) = (
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
        );
        rustix::fs::mknodat(rustix::fs::CWD, fifo, kind, mode, 0)?;
    }
    for words in [&with_key[..], &["manager"]] {
        let said = machine.refused(words)?;
        assert!(said.contains("not a regular file"), "{said}");
    }
    assert!(!machine.at("etc/upperdeck/node-key").exists());
    Ok(())
}

/// Directories above upperdeck's own are the machine's.
#[test]
fn missing_parents_are_for_all_users_and_a_root_may_be_relative() -> Outcome {
    if ignored(&NEEDS) {
        return Ok(());
    }
    let machine = Machine::new()?;
    let above = machine.0.path().parent().ok_or("parent")?;
    let name = machine.0.path().file_name().ok_or("name")?;
    let output = Command::new(support::program())
        .args(["setup", "manager", "--root"])
        .arg(name)
        .current_dir(above)
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    machine.manager()?;
    for dir in ["var", "var/lib"] {
        assert_eq!(rights(&machine.at(dir))?, (0o755, 0, 0), "{dir}");
    }
    let rights = rights(&machine.at("var/lib/upperdeck-manager"))?;
    assert_eq!(rights.0, 0o700);
    Ok(())
}

#[test]
fn the_record_of_an_earlier_version_moves_to_the_managers_directory() -> Outcome {
    if ignored(&NEEDS) {
        return Ok(());
    }
    let machine = Machine::new()?;
    machine.setup(&["manager"])?;
    let (uid, gid) = machine.manager()?;
    let (old, new) = (
        machine.at("var/lib/upperdeck"),
        machine.at("var/lib/upperdeck-manager"),
    );
    // As the unit of the earlier version left it.
    fs::create_dir(&old)?;
    for name in ["manager.db", "manager.db-wal"] {
        private(&old.join(name), name)?;
        chown(old.join(name), Some(uid), Some(gid))?;
    }
    chown(&old, Some(uid), Some(gid))?;

    fs::write(new.join("manager.db"), "another")?;
    let said = machine.refused(&["manager"])?;
    assert!(
        said.contains("/var/lib/upperdeck/manager.db is the record of an earlier version"),
        "{said}"
    );
    fs::remove_file(new.join("manager.db"))?;

    machine.setup(&["manager", "--dry-run"])?;
    assert!(old.join("manager.db").exists());
    machine.setup(&["manager"])?;
    for name in ["manager.db", "manager.db-wal"] {
        assert_eq!(fs::read_to_string(new.join(name))?, name);
        assert_eq!(rights(&new.join(name))?, (0o600, uid, gid));
        assert!(!old.join(name).exists(), "{name}");
    }
    assert_eq!(rights(&old)?.1, 0, "it is the agent's now");
    Ok(())
}

#[test]
fn the_record_of_up_stays_where_it_is() -> Outcome {
    if ignored(&NEEDS) {
        return Ok(());
    }
    let machine = Machine::new()?;
    fs::create_dir_all(machine.at("var/lib/upperdeck"))?;
    private(&machine.at("var/lib/upperdeck/manager.db"), "of root")?;
    machine.setup(&["manager"])?;
    assert!(machine.at("var/lib/upperdeck/manager.db").exists());
    assert!(!machine.at("var/lib/upperdeck-manager/manager.db").exists());
    Ok(())
}
