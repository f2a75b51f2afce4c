//! TLS trust and identity: the machine's certificates, and the private CAs and client certificates of one registry.
//!
//! Format of the directories: containers-certs.d(5), Docker's `certs.d`.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rustls::ClientConfig;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::ParsedCertificate;

use super::error::Error;
use super::trust::Verifier;
use crate::common::regular_file;

/// The contents of a `certs.d` directory for one registry.
#[derive(Default)]
pub(super) struct Certificates {
    /// CAs that are trusted in addition to the machine's.
    pub(super) authorities: Vec<CertificateDer<'static>>,
    /// The client's certificate chain, its own certificate first, and its key.
    pub(super) identity: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
}

impl Certificates {
    /// Returns the TLS configuration of a client. `as_itself` makes it present the client certificate; `verify` makes
    /// it verify the server's. Fails if the client's key does not match its certificate.
    pub(super) fn client_config(
        &self,
        as_itself: bool,
        verify: bool,
    ) -> Result<ClientConfig, rustls::Error> {
        let provider = CryptoProvider::get_default()
            .cloned()
            .unwrap_or_else(|| Arc::new(rustls::crypto::ring::default_provider()));
        let algorithms = provider.signature_verification_algorithms;
        let verifier = Verifier::new(system_roots(), &self.authorities, algorithms, verify);
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = match &self.identity {
            Some((chain, key)) if as_itself => {
                builder.with_client_auth_cert(chain.clone(), key.clone_key())?
            }
            _ => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }
}

/// Returns the directories to search for `host` if the user names none, in order of precedence.
pub(super) fn default_directories(
    host: &str,
    var: impl Fn(&str) -> Option<OsString>,
) -> Vec<PathBuf> {
    let set = |name| var(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let config = set("XDG_CONFIG_HOME").or_else(|| set("HOME").map(|h| h.join(".config")));
    config
        .map(|dir| dir.join("containers/certs.d"))
        .into_iter()
        .chain([
            "/etc/containers/certs.d".into(),
            "/etc/docker/certs.d".into(),
        ])
        .map(|dir| dir.join(host))
        .collect()
}

/// Reads the directory `explicit`, which has to exist, or else the first of `usual` that exists.
pub(super) fn read(explicit: Option<&Path>, usual: &[PathBuf]) -> Result<Certificates, Error> {
    if let Some(dir) = explicit {
        return read_directory(dir).map_err(|(path, e)| file_error(path, &e));
    }
    for dir in usual {
        match read_directory(dir) {
            Err((path, e))
                if path == *dir
                    && matches!(
                        e.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                    ) => {}
            // The user did not name this directory, so one that the user may not list is skipped.
            Err((path, e)) if path == *dir && e.kind() == io::ErrorKind::PermissionDenied => {}
            other => return other.map_err(|(path, e)| file_error(path, &e)),
        }
    }
    Ok(Certificates::default())
}

fn file_error(path: PathBuf, error: &io::Error) -> Error {
    let denied = error.kind() == io::ErrorKind::PermissionDenied;
    Error::File {
        path,
        reason: error.to_string(),
        denied,
    }
}

/// Maximum size of a file with certificates or a key, in bytes.
const MAX_PEM: u64 = 16 << 20;

fn read_directory(dir: &Path) -> Result<Certificates, (PathBuf, io::Error)> {
    let at = |path: &Path| {
        let path = path.to_path_buf();
        move |e| (path, e)
    };
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut files: Vec<PathBuf> = fs::read_dir(dir)
        .map_err(at(dir))?
        .map(|e| e.map(|e| e.path()))
        .collect::<Result<_, _>>()
        .map_err(at(dir))?;
    files.sort();
    let mut found = Certificates::default();
    for file in files {
        match file.extension().and_then(OsStr::to_str) {
            Some("crt") => {
                let pem = regular_file::read(&file, MAX_PEM).map_err(at(&file))?;
                let bundle = certificates(&pem).filter(|b| !b.is_empty());
                found
                    .authorities
                    .extend(bundle.ok_or_else(|| (file, invalid("no PEM certificate in it")))?);
            }
            Some("cert") if found.identity.is_none() => {
                let key = file.with_extension("key");
                let chain = regular_file::read(&file, MAX_PEM).map_err(at(&file))?;
                let secret = regular_file::read(&key, MAX_PEM).map_err(at(&key))?;
                let secret = zeroize::Zeroizing::new(secret);
                let chain = certificates(&chain).filter(|chain| !chain.is_empty());
                let identity = chain.zip(PrivateKeyDer::from_pem_slice(&secret).ok());
                let identity = identity.ok_or_else(|| {
                    (
                        file,
                        invalid(
                            "not a PEM client certificate with a PEM key of the same name in .key",
                        ),
                    )
                })?;
                found.identity = Some(identity);
            }
            _ => {}
        }
    }
    Ok(found)
}

/// Parses all certificates of a PEM file. Returns `None` if the file is damaged or an entry is not a certificate.
fn certificates(pem: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_slice_iter(pem)
        .map(|der| {
            der.ok()
                .filter(|der| ParsedCertificate::try_from(der).is_ok())
        })
        .collect()
}

/// Returns the certificates that this machine trusts; they are read once. An empty list is not an error, because plain
/// HTTP and private CAs work without.
pub(super) fn system_roots() -> &'static [CertificateDer<'static>] {
    static ROOTS: OnceLock<Vec<CertificateDer<'static>>> = OnceLock::new();
    ROOTS.get_or_init(|| {
        let found = rustls_native_certs::load_native_certs();
        for error in &found.errors {
            tracing::debug!(tls.error = %error, "a part of the machine's certificates cannot be read");
        }
        if found.certs.is_empty() {
            tracing::warn!("this machine has no CA certificates (package ca-certificates): only private CAs will be trusted");
        }
        found.certs
    })
}

/// Installs ring as the process-wide cryptography provider, unless there is one already.
pub(super) fn install_provider() {
    // An error means that a provider is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_those_of_the_tools() {
        let dirs = default_directories("r.example:5000", |n| (n == "HOME").then(|| "/h".into()));
        let shown: Vec<_> = dirs.iter().map(|d| d.display().to_string()).collect();
        assert_eq!(
            shown,
            [
                "/h/.config/containers/certs.d/r.example:5000",
                "/etc/containers/certs.d/r.example:5000",
                "/etc/docker/certs.d/r.example:5000"
            ]
        );
    }

    #[test]
    fn what_is_no_certificate_is_an_error_with_the_path() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        assert!(read(Some(&dir.path().join("none")), &[]).is_err());
        assert!(read(None, &[dir.path().join("none")]).is_ok());
        fs::write(dir.path().join("readme.txt"), "x")?;
        assert!(
            read(Some(dir.path()), &[])
                .is_ok_and(|c| c.authorities.is_empty() && c.identity.is_none())
        );
        fs::write(dir.path().join("client.cert"), "x")?;
        let error = read(Some(dir.path()), &[])
            .err()
            .map(|e| e.to_string())
            .unwrap_or_default();
        assert!(error.contains("client.key"), "{error}");
        fs::remove_file(dir.path().join("client.cert"))?;
        fs::write(dir.path().join("ca.crt"), "x")?;
        let error = read(Some(dir.path()), &[])
            .err()
            .map(|e| e.to_string())
            .unwrap_or_default();
        assert!(error.contains("ca.crt"), "{error}");
        Ok(())
    }
}
