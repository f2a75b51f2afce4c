//! A real, small token service: it signs what docker-registry verifies.
//!
//! Format: distribution's "Token Authentication Specification" (JWT, ES256, the certificate in `x5c`).

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use serde_json::{Value, json};

use crate::http::{Request, Response, Server};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

pub const USER: (&str, &str) = ("user", "hunter2");
pub const ISSUER: &str = "upperdeck tests";
pub const SERVICE: &str = "rough registry";
/// Docker-registry takes a token so long after its end.
const LEEWAY: i64 = 60;

pub struct Tokens {
    pub server: Server,
    pub dir: tempfile::TempDir,
    pub given: Arc<AtomicU64>,
    /// Seconds that a token lives, as the registry sees it.
    pub life: Arc<AtomicI64>,
    /// It answers 503 to every third request.
    pub fails: Arc<AtomicBool>,
    /// Scopes of each token.
    pub scopes: Arc<Mutex<Vec<Vec<String>>>>,
}

impl Tokens {
    /// None where openssl is missing.
    pub fn start() -> Result<Option<Self>> {
        let dir = tempfile::tempdir()?;
        let at = |name: &str| dir.path().join(name).display().to_string();
        let made = Command::new("openssl")
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
            ])
            .args([
                "-keyout",
                &at("key.pem"),
                "-out",
                &at("cert.pem"),
                "-days",
                "2",
                "-subj",
                "/CN=tokens",
            ])
            .stderr(Stdio::null())
            .status();
        if !made.is_ok_and(|status| status.success()) {
            return Ok(None);
        }
        let pem = |name: &str| -> Result<Vec<u8>> {
            let text = std::fs::read_to_string(at(name))?;
            let lines: String = text.lines().filter(|line| !line.starts_with('-')).collect();
            Ok(STANDARD.decode(lines)?)
        };
        let random = SystemRandom::new();
        let key =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &pem("key.pem")?, &random)
                .map_err(|e| e.to_string())?;
        let certificate = STANDARD.encode(pem("cert.pem")?);
        let given = Arc::new(AtomicU64::new(0));
        let (life, fails) = (
            Arc::new(AtomicI64::new(300)),
            Arc::new(AtomicBool::new(false)),
        );
        let scopes = Arc::new(Mutex::new(Vec::new()));
        let (count, seconds, failing, log) = (
            Arc::clone(&given),
            Arc::clone(&life),
            Arc::clone(&fails),
            Arc::clone(&scopes),
        );
        let server = Server::start(move |request: Request| {
            let n = count.fetch_add(1, Ordering::SeqCst);
            if failing.load(Ordering::SeqCst) && n % 3 == 1 {
                return Response::new(503);
            }
            let known = request
                .basic()
                .is_some_and(|(u, p)| u == USER.0 && p == USER.1);
            if !known {
                let body =
                    json!({"errors": [{"code": "UNAUTHORIZED", "message": "wrong password"}]});
                return Response::json(401, &body);
            }
            let asked = request.all("scope");
            let access: Vec<Value> = asked
                .iter()
                .filter_map(|scope| {
                    let mut parts = scope.splitn(3, ':');
                    let (kind, name, actions) = (parts.next()?, parts.next()?, parts.next()?);
                    let actions: Vec<&str> = actions.split(',').collect();
                    Some(json!({"type": kind, "name": name, "actions": actions}))
                })
                .collect();
            log.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(asked);
            let now = std::time::SystemTime::UNIX_EPOCH
                .elapsed()
                .map_or(0, |t| t.as_secs() as i64);
            let seconds = seconds.load(Ordering::SeqCst);
            let head = json!({"typ": "JWT", "alg": "ES256", "x5c": [certificate]});
            let claims = json!({
                "iss": ISSUER, "sub": USER.0, "aud": SERVICE, "exp": now + seconds - LEEWAY, "nbf": now - 600,
                "iat": now - 600, "jti": n.to_string(), "access": access,
            });
            let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
            let signed = format!("{}.{}", encode(&head), encode(&claims));
            let Ok(signature) = key.sign(&random, signed.as_bytes()) else {
                return Response::new(500);
            };
            let token = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()));
            Response::json(200, &json!({"token": token, "expires_in": seconds}))
        })?;
        Ok(Some(Self {
            server,
            dir,
            given,
            life,
            fails,
            scopes,
        }))
    }

    /// What docker-registry has to be told.
    pub fn config(&self, realm: &str) -> String {
        let bundle: PathBuf = self.dir.path().join("cert.pem");
        format!(
            "auth:\n  token:\n    realm: {realm}\n    service: {SERVICE}\n    issuer: {ISSUER}\n    rootcertbundle: {}\n",
            bundle.display()
        )
    }
}
