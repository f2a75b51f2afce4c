//! Finds a user's credentials in the files that container tools use, without running credential helpers.
//!
//! Formats: containers-auth.json(5); Docker's `config.json`.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer};
use zeroize::{Zeroize, Zeroizing};

use super::error::Error;
use crate::common::reference::DOCKER_HUB;

/// Maximum size of an auth file, in bytes. A larger file is refused.
const MAX_AUTH_FILE: u64 = 4 << 20;

/// A string that is zeroed when dropped and never shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Wraps `text`.
    pub(crate) fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// Returns the text itself. Must not be used in messages.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::new)
    }
}

/// Credentials of either kind that auth files hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credentials {
    /// User and password, or robot account and secret.
    Basic {
        /// User name.
        user: String,
        /// Password.
        password: Secret,
    },
    /// An OAuth2 refresh token (`identitytoken` in auth files).
    IdentityToken(Secret),
}

/// A `--creds` value that cannot be parsed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("credentials are written USER:PASSWORD")]
pub struct CredentialsError;

impl FromStr for Credentials {
    type Err = CredentialsError;

    /// Parses `USER:PASSWORD`. The password may contain colons.
    fn from_str(text: &str) -> Result<Self, CredentialsError> {
        match text.split_once(':') {
            Some((user, password)) if !user.is_empty() => Ok(Self::Basic {
                user: user.to_owned(),
                password: Secret::new(password.to_owned()),
            }),
            _ => Err(CredentialsError),
        }
    }
}

/// The result of a search for credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum CredentialLookup {
    /// Credentials were found.
    Credentials {
        /// The credentials.
        credentials: Credentials,
        /// Where they are from: the path of a file, or the flag.
        source: String,
    },
    /// An auth file refers to a credential helper, and no other file has credentials.
    OnlyHelper {
        /// Path of the auth file.
        file: PathBuf,
        /// Name of the helper; its program would be `docker-credential-NAME`.
        helper: String,
    },
    /// No credentials: requests are anonymous.
    Nothing,
}

impl CredentialLookup {
    /// Describes, for error messages, which credentials were used or why there were none.
    pub(crate) fn describe(&self, host: &str) -> String {
        match self {
            Self::Credentials {
                credentials: Credentials::Basic { user, .. },
                source,
            } => {
                format!(
                    "{:?} from {source}",
                    crate::common::escape::limited(user, 100)
                )
            }
            Self::Credentials {
                credentials: Credentials::IdentityToken(_),
                source,
            } => {
                format!("the identity token from {source}")
            }
            Self::OnlyHelper { file, helper } => format!(
                "{} names the credential helper docker-credential-{} for {host}, and upperdeck runs no other programs: \
                 use --creds, or --authfile with a file that holds the credentials",
                file.display(),
                crate::common::escape::limited(helper, 60)
            ),
            Self::Nothing => {
                format!("none were found for {host}: log in, or use --creds or --authfile")
            }
        }
    }
}

/// The auth files to search, in order of precedence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AuthFiles {
    files: Vec<PathBuf>,
    /// Whether the user named the file. If so, it has to exist and is the only one.
    explicit: bool,
}

impl AuthFiles {
    /// Determines the auth files from `--authfile` and the environment, which is read through `var`.
    pub(crate) fn find(
        authfile: Option<&Path>,
        var: impl Fn(&str) -> Option<OsString>,
        uid: u32,
    ) -> Self {
        let set = |name| var(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        if let Some(file) = authfile
            .map(Path::to_path_buf)
            .or_else(|| set("REGISTRY_AUTH_FILE"))
        {
            return Self {
                files: vec![file],
                explicit: true,
            };
        }
        let home = set("HOME");
        let runtime = set("XDG_RUNTIME_DIR")
            .map(|dir| dir.join("containers/auth.json"))
            // The path that containers-auth.json(5) names for processes without a login session.
            .or_else(|| Some(PathBuf::from(format!("/run/containers/{uid}/auth.json"))));
        let config = set("XDG_CONFIG_HOME").or_else(|| home.as_ref().map(|h| h.join(".config")));
        let docker = set("DOCKER_CONFIG").or_else(|| home.as_ref().map(|h| h.join(".docker")));
        let files = [
            runtime,
            config.map(|dir| dir.join("containers/auth.json")),
            docker.map(|dir| dir.join("config.json")),
        ];
        Self {
            files: files.into_iter().flatten().collect(),
            explicit: false,
        }
    }

    /// Searches for the credentials of `host` and `repository` (without host). The longest matching key wins.
    pub(crate) fn search(&self, host: &str, repository: &str) -> Result<CredentialLookup, Error> {
        let mut helper = None;
        for path in &self.files {
            let bytes = match read_bounded(path) {
                Ok(bytes) => bytes,
                Err(e) if e.kind() == io::ErrorKind::NotFound && !self.explicit => continue,
                Err(e) if e.kind() == io::ErrorKind::NotADirectory && !self.explicit => continue,
                // Root's Podman closes /run/containers: who may not enter a directory has put no file there.
                Err(e) if is_out_of_reach(path, &e) && !self.explicit => continue,
                Err(e) => {
                    let denied = e.kind() == io::ErrorKind::PermissionDenied;
                    return Err(Error::File {
                        path: path.clone(),
                        reason: e.to_string(),
                        denied,
                    });
                }
            };
            let bad = |reason: String| Error::File {
                path: path.clone(),
                reason,
                denied: false,
            };
            match look_up(&bytes, host, repository).map_err(bad)? {
                Entry::Credentials(credentials) => {
                    return Ok(CredentialLookup::Credentials {
                        credentials,
                        source: path.display().to_string(),
                    });
                }
                Entry::Helper(name) => {
                    helper.get_or_insert_with(|| CredentialLookup::OnlyHelper {
                        file: path.clone(),
                        helper: name,
                    });
                }
                Entry::None => {}
            }
        }
        Ok(helper.unwrap_or(CredentialLookup::Nothing))
    }
}

/// Returns whether reading failed because a directory of the path may not be entered, not because of the file's mode.
fn is_out_of_reach(path: &Path, error: &io::Error) -> bool {
    let denied = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
    denied(error) && std::fs::symlink_metadata(path).is_err_and(|error| denied(&error))
}

fn read_bounded(path: &Path) -> io::Result<Zeroizing<Vec<u8>>> {
    let file = File::open(path)?;
    // Allocated in advance, so that growing the vector leaves no copies of secrets behind.
    let room = file.metadata()?.len().min(MAX_AUTH_FILE) as usize + 1;
    let mut bytes = Zeroizing::new(Vec::with_capacity(room));
    file.take(MAX_AUTH_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_AUTH_FILE {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            "larger than 4 MiB: not an auth file",
        ));
    }
    Ok(bytes)
}

#[derive(Deserialize, Default)]
struct AuthDocument {
    #[serde(default)]
    auths: Option<HashMap<String, AuthEntry>>,
    #[serde(default, rename = "credHelpers")]
    cred_helpers: Option<HashMap<String, String>>,
    #[serde(default, rename = "credsStore")]
    creds_store: Option<String>,
}

#[derive(Deserialize, Default)]
struct AuthEntry {
    auth: Option<Secret>,
    username: Option<String>,
    password: Option<Secret>,
    identitytoken: Option<Secret>,
}

#[derive(Debug, PartialEq, Eq)]
enum Entry {
    Credentials(Credentials),
    Helper(String),
    None,
}

/// Looks up a repository in the contents of one auth file.
fn look_up(bytes: &[u8], host: &str, repository: &str) -> Result<Entry, String> {
    // serde_json's messages name line and column but no contents.
    let document: AuthDocument = serde_json::from_slice(bytes).map_err(|e| {
        format!(
            "not an auth file ({}, line {}, column {}): expected {{\"auths\": {{...}}}}",
            kind(&e),
            e.line(),
            e.column()
        )
    })?;
    let hosts: &[&str] = match host {
        DOCKER_HUB => &[DOCKER_HUB, "index.docker.io", "registry-1.docker.io"],
        other => &[other],
    };
    let auths = document.auths.unwrap_or_default();
    let helpers = document.cred_helpers.unwrap_or_default();
    // containers-auth.json(5): a configured helper replaces the file's own entry for that registry.
    if let Some(name) = hosts
        .iter()
        .find_map(|h| helpers.get(*h))
        .filter(|name| !name.is_empty())
    {
        return Ok(Entry::Helper(name.clone()));
    }
    let mut known = false;
    for key in keys(hosts, repository) {
        let entry = auths.get(&key).or_else(|| {
            // Docker writes some keys as URLs, but only for hosts, not for namespaces.
            hosts.contains(&key.as_str()).then(|| {
                auths
                    .iter()
                    .find(|(k, _)| host_of_url(k) == Some(&key))
                    .map(|(_, e)| e)
            })?
        });
        let Some(entry) = entry else { continue };
        known = true;
        if let Some(credentials) =
            read_entry(entry).map_err(|e| format!("the entry {key:?}: {e}"))?
        {
            return Ok(Entry::Credentials(credentials));
        }
    }
    match document.creds_store {
        // Docker leaves an empty entry for credentials in the store. Without such an entry, the store has none either.
        Some(store) if known && !store.is_empty() => Ok(Entry::Helper(store)),
        _ => Ok(Entry::None),
    }
}

fn kind(error: &serde_json::Error) -> &'static str {
    if error.is_data() {
        "unexpected types"
    } else {
        "broken JSON"
    }
}

/// Returns the keys to try: `host/a/b`, `host/a`, `host`, each for every name of the host.
fn keys(hosts: &[&str], repository: &str) -> Vec<String> {
    let mut keys = Vec::new();
    let mut rest = Some(repository);
    while let Some(path) = rest {
        keys.extend(hosts.iter().map(|h| format!("{h}/{path}")));
        rest = path.rsplit_once('/').map(|(parent, _)| parent);
    }
    keys.extend(hosts.iter().map(|&h| h.to_owned()));
    keys
}

/// Returns the host of a key that is a URL: `index.docker.io` for `https://index.docker.io/v1/`.
fn host_of_url(key: &str) -> Option<&str> {
    let rest = key
        .strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"))?;
    rest.split('/').next()
}

fn read_entry(entry: &AuthEntry) -> Result<Option<Credentials>, String> {
    let filled = |s: &Option<Secret>| s.as_ref().filter(|s| !s.expose().is_empty()).cloned();
    if let Some(token) = filled(&entry.identitytoken) {
        return Ok(Some(Credentials::IdentityToken(token)));
    }
    if let Some(auth) = filled(&entry.auth) {
        let broken = || "\"auth\" is not the base64 form of USER:PASSWORD".to_owned();
        let raw = Zeroizing::new(
            STANDARD
                .decode(auth.expose().trim())
                .map_err(|_| broken())?,
        );
        let text = std::str::from_utf8(&raw).map_err(|_| broken())?;
        // Old Docker versions pad with NUL.
        let text = text.trim_end_matches('\0');
        return text.parse().map(Some).map_err(|_| broken());
    }
    match (&entry.username, filled(&entry.password)) {
        (Some(user), Some(password)) if !user.is_empty() => Ok(Some(Credentials::Basic {
            user: user.clone(),
            password,
        })),
        _ => Ok(None),
    }
}

/// Returns an `Authorization` header for user and password, marked as sensitive.
pub(super) fn basic_header(user: &str, password: &Secret) -> Option<http::HeaderValue> {
    let plain = Zeroizing::new(format!("{user}:{}", password.expose()));
    let mut value = Zeroizing::new(String::from("Basic "));
    STANDARD.encode_string(plain.as_bytes(), &mut value);
    sensitive_header(&value)
}

/// Returns an `Authorization` header for a token, marked as sensitive.
pub(super) fn bearer_header(token: &Secret) -> Option<http::HeaderValue> {
    let mut text = format!("Bearer {}", token.expose());
    let header = sensitive_header(&text);
    text.zeroize();
    header
}

fn sensitive_header(text: &str) -> Option<http::HeaderValue> {
    let mut value = http::HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// Reads a variable of the process environment.
pub(super) fn environment(name: &str) -> Option<OsString> {
    std::env::var_os(OsStr::new(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(user: &str, password: &str) -> Entry {
        Entry::Credentials(Credentials::Basic {
            user: user.into(),
            password: Secret::new(password.into()),
        })
    }

    fn b64(text: &str) -> String {
        STANDARD.encode(text)
    }

    #[test]
    fn longest_key_wins() {
        let file = format!(
            r#"{{"auths":{{"h:1":{{"auth":"{}"}},"h:1/a":{{"auth":"{}"}},"h:1/a/b":{{"username":"w","password":"x"}}}}}}"#,
            b64("u:p:q"),
            b64("v:p")
        );
        let of = |repository| look_up(file.as_bytes(), "h:1", repository).unwrap();
        assert_eq!(of("z"), basic("u", "p:q"));
        assert_eq!(of("a/c"), basic("v", "p"));
        assert_eq!(of("a/b"), basic("w", "x"));
        assert_eq!(of("ab"), basic("u", "p:q")); // a byte prefix is not a path prefix
        assert_eq!(look_up(file.as_bytes(), "h", "a").unwrap(), Entry::None);
    }

    #[test]
    fn docker_hub_has_many_names() {
        for key in [
            "docker.io",
            "index.docker.io",
            "https://index.docker.io/v1/",
            "registry-1.docker.io",
        ] {
            let file = format!(r#"{{"auths":{{"{key}":{{"auth":"{}"}}}}}}"#, b64("u:p"));
            assert_eq!(
                look_up(file.as_bytes(), "docker.io", "library/x").unwrap(),
                basic("u", "p"),
                "{key}"
            );
        }
        let file = format!(
            r#"{{"auths":{{"https://r.example/v2/":{{"auth":"{}"}}}}}}"#,
            b64("u:p")
        );
        assert_eq!(
            look_up(file.as_bytes(), "r.example", "x").unwrap(),
            basic("u", "p")
        );
    }

    #[test]
    fn helpers_are_named_and_not_run() {
        let of = |file: &str| look_up(file.as_bytes(), "r.example", "x").unwrap();
        assert_eq!(
            of(r#"{"credHelpers":{"r.example":"ecr-login"}}"#),
            Entry::Helper("ecr-login".into())
        );
        assert_eq!(
            of(r#"{"auths":{"r.example":{}},"credsStore":"desktop"}"#),
            Entry::Helper("desktop".into())
        );
        assert_eq!(
            of(r#"{"auths":{"other":{}},"credsStore":"desktop"}"#),
            Entry::None
        );
        // An entry with credentials takes precedence over the store.
        let file = format!(
            r#"{{"auths":{{"r.example":{{"auth":"{}"}}}},"credsStore":"desktop"}}"#,
            b64("u:p")
        );
        assert_eq!(of(&file), basic("u", "p"));
        assert_eq!(
            of(r#"{"auths":{"r.example":{"auth":"","identitytoken":"tok"}}}"#),
            Entry::Credentials(Credentials::IdentityToken(Secret::new("tok".into())))
        );
    }

    #[test]
    fn broken_files_do_not_show_what_they_hold() {
        for file in [
            "",
            "{",
            "3",
            r#"{"auths":3}"#,
            r#"{"auths":{"h":{"auth":"hunter2!"}}}"#,
            r#"{"auths":{"h":{"auth":"aHVudGVyMg=="}}}"#,
        ] {
            let error = look_up(file.as_bytes(), "h", "x").unwrap_err();
            assert!(!error.contains("hunter2"), "{error}");
        }
        assert_eq!(look_up(b"{}", "h", "x"), Ok(Entry::None));
        assert_eq!(look_up(br#"{"auths":null}"#, "h", "x"), Ok(Entry::None));
    }

    #[test]
    fn files_are_looked_for_where_the_tools_keep_them() {
        let env = |pairs: &'static [(&str, &str)]| {
            move |name: &str| {
                pairs
                    .iter()
                    .find(|(n, _)| *n == name)
                    .map(|(_, v)| OsString::from(*v))
            }
        };
        let files = |found: AuthFiles| {
            found
                .files
                .iter()
                .map(|p| p.display().to_string())
                .collect::<Vec<_>>()
        };
        let all = AuthFiles::find(None, env(&[("HOME", "/h"), ("XDG_RUNTIME_DIR", "/r")]), 7);
        assert_eq!(
            files(all),
            [
                "/r/containers/auth.json",
                "/h/.config/containers/auth.json",
                "/h/.docker/config.json"
            ]
        );
        let bare = AuthFiles::find(None, env(&[("DOCKER_CONFIG", "/d")]), 7);
        assert_eq!(
            files(bare),
            ["/run/containers/7/auth.json", "/d/config.json"]
        );
        let by_variable = AuthFiles::find(
            None,
            env(&[("HOME", "/h"), ("REGISTRY_AUTH_FILE", "/f")]),
            7,
        );
        assert_eq!(
            (by_variable.explicit, files(by_variable)),
            (true, vec!["/f".to_owned()])
        );
        let by_flag = AuthFiles::find(
            Some(Path::new("/g")),
            env(&[("REGISTRY_AUTH_FILE", "/f")]),
            7,
        );
        assert_eq!(files(by_flag), ["/g"]);
        // A file that the user named has to exist; the default ones need not.
        assert!(
            AuthFiles::find(Some(Path::new("/nonexistent/x")), |_| None, 7)
                .search("h", "x")
                .is_err()
        );
        let nowhere = env(&[("XDG_RUNTIME_DIR", "/nonexistent")]);
        // A directory that may not be entered. The user ID for file systems is one of the thread.
        let closed = std::thread::spawn(|| {
            let dir = tempfile::tempdir()?;
            let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o700);
            std::fs::set_permissions(dir.path(), permissions)?;
            nix::unistd::setfsuid(65534.into());
            let found = AuthFiles {
                files: vec![dir.path().join("containers/auth.json")],
                explicit: false,
            };
            let found = found.search("h", "x");
            nix::unistd::setfsuid(rustix::process::geteuid().as_raw().into());
            io::Result::Ok(found)
        });
        let closed = closed.join().unwrap().unwrap().unwrap();
        assert_eq!(closed, CredentialLookup::Nothing);
        assert_eq!(
            AuthFiles::find(None, nowhere, 7).search("h", "x").unwrap(),
            CredentialLookup::Nothing
        );
    }

    #[test]
    fn secrets_do_not_show() {
        let credentials: Credentials = "robot$p+n:hunter2".parse().unwrap();
        let found = CredentialLookup::Credentials {
            credentials: credentials.clone(),
            source: "--creds".into(),
        };
        assert!(!format!("{credentials:?} {found:?} {}", found.describe("h")).contains("hunter2"));
        let header = basic_header("u", &Secret::new("hunter2".into())).unwrap();
        assert_eq!(header, "Basic dTpodW50ZXIy");
        assert!(!format!("{header:?}").contains("dTpo"));
        assert_eq!("nocolon".parse::<Credentials>(), Err(CredentialsError));
        assert_eq!(":p".parse::<Credentials>(), Err(CredentialsError));
    }
}
