//! Decides which server certificates are trusted.
//!
//! WebPKI rules apply to everything that a CA has signed. In addition, a certificate in the registry's own `certs.d`
//! directory is trusted if the registry presents exactly that certificate. Such certificates are mostly self-signed
//! with `CA:TRUE` (the default of `openssl req -x509`), which WebPKI refuses as a server's own certificate; curl,
//! Docker and skopeo accept them. Name, validity period and possession of the key are checked all the same.

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use x509_cert::der::Decode;

/// Verifies the certificate that a server presents.
#[derive(Debug)]
pub(super) struct Verifier {
    roots: RootCertStore,
    /// Certificates of the `certs.d` directory.
    own: Vec<CertificateDer<'static>>,
    algorithms: WebPkiSupportedAlgorithms,
    /// If false, any certificate is accepted (`--tls-verify=false`).
    verify: bool,
}

impl Verifier {
    /// Creates a verifier that trusts everything signed by the CAs in `machine` and `own` (the registry's directory),
    /// and the certificates in `own` themselves. Certificates that cannot be trust anchors are ignored as such.
    pub(super) fn new(
        machine: &[CertificateDer<'static>],
        own: &[CertificateDer<'static>],
        algorithms: WebPkiSupportedAlgorithms,
        verify: bool,
    ) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(machine.iter().chain(own).cloned());
        Self {
            roots,
            own: own.to_vec(),
            algorithms,
            verify,
        }
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if !self.verify {
            return Ok(ServerCertVerified::assertion());
        }
        let certificate = ParsedCertificate::try_from(end_entity)?;
        if self.own.iter().any(|own| own == end_entity) {
            in_time(end_entity, now)?;
        } else {
            verify_server_cert_signed_by_trust_anchor(
                &certificate,
                &self.roots,
                intermediates,
                now,
                self.algorithms.all,
            )?;
        }
        verify_server_name(&certificate, server_name)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        if !self.verify {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        if !self.verify {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Checks that `now` is within the certificate's validity period.
fn in_time(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), Error> {
    let parsed = x509_cert::Certificate::from_der(certificate)
        .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
    let validity = parsed.tbs_certificate().validity();
    let seconds = |time: x509_cert::time::Time| time.to_unix_duration().as_secs();
    if now.as_secs() < seconds(validity.not_before) {
        return Err(CertificateError::NotValidYet.into());
    }
    if now.as_secs() > seconds(validity.not_after) {
        return Err(CertificateError::Expired.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustls::pki_types::pem::PemObject;

    use super::*;

    /// `openssl req -x509 -subj /CN=registry.test -addext 'subjectAltName = DNS:registry.test'`: has `CA:TRUE`.
    const SELF_SIGNED: &str = "\
-----BEGIN CERTIFICATE-----\n\
MIIBnjCCAUWgAwIBAgIUDk+v4715yUOsRoRuy/RKfa6TfKgwCgYIKoZIzj0EAwIw\n\
GDEWMBQGA1UEAwwNcmVnaXN0cnkudGVzdDAeFw0yNjExMjkxODM0MjhaFw0zNjEx\n\
MjYxODM0MjhaMBgxFjAUBgNVBAMMDXJlZ2lzdHJ5LnRlc3QwWTATBgcqhkjOPQIB\n\
BggqhkjOPQMBBwNCAASrNyCNW3bsZkV75636uNDMB3D8SOMjxfIziWECFxDLqSqj\n\
ILeLDAD6yz5oyPvo42J97UaXQXOLlfV8LK5ub5y0o20wazAdBgNVHQ4EFgQUCWWZ\n\
/t6Pe3ZxP6a2ASai6lm1TuAwHwYDVR0jBBgwFoAUCWWZ/t6Pe3ZxP6a2ASai6lm1\n\
TuAwDwYDVR0TAQH/BAUwAwEB/zAYBgNVHREEETAPgg1yZWdpc3RyeS50ZXN0MAoG\n\
CCqGSM49BAMCA0cAMEQCIFPlqXZbXMSx1e+NDiRPdLlxAEmrPeDrqcWrsQ55Mi4B\n\
AiA78d8uPXWZI8gQEJXHEFiZMYfCBG+A1d5RfkQdxWwr8Q==\n\
-----END CERTIFICATE-----";
    const FROM: u64 = 1_795_977_268;
    const UNTIL: u64 = 2_111_337_268;

    #[test]
    fn a_certificate_of_the_directory_is_believed_for_its_name_and_time_alone() {
        let certificate = CertificateDer::from_pem_slice(SELF_SIGNED.as_bytes()).unwrap();
        let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
        let verify = |own: &[CertificateDer<'static>], verify, name: &str, at| {
            let name = ServerName::try_from(name.to_owned()).unwrap();
            let at = UnixTime::since_unix_epoch(Duration::from_secs(at));
            Verifier::new(&[], own, algorithms, verify)
                .verify_server_cert(&certificate, &[], &name, &[], at)
                .map(|_| ())
        };
        let own = std::slice::from_ref(&certificate);
        assert_eq!(verify(own, true, "registry.test", FROM), Ok(()));
        assert_eq!(verify(own, true, "registry.test", UNTIL), Ok(()));
        let expired = Err(CertificateError::Expired.into());
        assert_eq!(verify(own, true, "registry.test", UNTIL + 1), expired);
        let early = Err(CertificateError::NotValidYet.into());
        assert_eq!(verify(own, true, "registry.test", FROM - 1), early);
        assert!(verify(own, true, "other.test", FROM).is_err());
        assert!(verify(&[], true, "registry.test", FROM).is_err());
        assert_eq!(verify(&[], false, "other.test", 0), Ok(()));
    }
}
