//! A manager as a process of its own whose PostgreSQL goes away: what it says about that, to the log, to its callers and
//! to the service manager.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sha2::Digest as _;

use crate::site::{Outcomes, PATIENCE};
use crate::{postgres, support};

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

/// Forwards connections from a TCP port to the socket of PostgreSQL, until it is cut.
struct Relay {
    port: u16,
    target: PathBuf,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    cut: bool,
    open: Vec<(TcpStream, UnixStream)>,
}

impl Relay {
    /// Splits the URL of a test's database into a relay and the URL through it.
    fn before(url: &str) -> Fallible<(Self, String)> {
        let rest = url.strip_prefix("postgres://upperdeck@").ok_or("URL")?;
        let (host, name) = rest.split_once('/').ok_or("URL")?;
        let target = Path::new(&host.replace("%2F", "/")).join(".s.PGSQL.5432");
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let relay = Self {
            port,
            target,
            state: Arc::default(),
        };
        relay.serve(listener);
        Ok((
            relay,
            format!("postgres://upperdeck@127.0.0.1:{port}/{name}"),
        ))
    }

    fn serve(&self, listener: TcpListener) {
        let (target, state) = (self.target.clone(), Arc::clone(&self.state));
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let mut state = state
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                if state.cut {
                    return;
                }
                let Ok(server) = UnixStream::connect(&target) else {
                    continue;
                };
                let pair = |client: &TcpStream, server: &UnixStream| {
                    Some((client.try_clone().ok()?, server.try_clone().ok()?))
                };
                for to_server in [true, false] {
                    let Some((mut client, mut server)) = pair(&client, &server) else {
                        continue;
                    };
                    std::thread::spawn(move || {
                        let _ = if to_server {
                            std::io::copy(&mut client, &mut server)
                        } else {
                            std::io::copy(&mut server, &mut client)
                        };
                        let _ = client.shutdown(std::net::Shutdown::Both);
                        let _ = server.shutdown(std::net::Shutdown::Both);
                    });
                }
                state.open.push((client, server));
            }
        });
    }

    /// Breaks all connections and refuses new ones.
    fn cut(&self) {
        {
            let mut state = self
                .state
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            state.cut = true;
            for (client, server) in state.open.drain(..) {
                let _ = client.shutdown(std::net::Shutdown::Both);
                let _ = server.shutdown(std::net::Shutdown::Both);
            }
        }
        // The thread that accepts ends with this connection, and closes the port.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        while TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn restore(&self) -> std::io::Result<()> {
        let listener = TcpListener::bind(("127.0.0.1", self.port))?;
        self.state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .cut = false;
        self.serve(listener);
        Ok(())
    }
}

/// A `upperdeck manager`. It is killed when dropped.
struct Manager {
    child: Child,
    log: Receiver<String>,
}

impl Manager {
    fn start(dir: &Path, record: &str, notify: &Path) -> Fallible<Self> {
        let key = dir.join("key");
        std::fs::write(&key, "a key that is long enough for this\n")?;
        let tokens = dir.join("tokens.toml");
        let digest = hex::encode(sha2::Sha256::digest(TOKEN));
        std::fs::write(
            &tokens,
            format!(
                "[[token]]\nname = \"a\"\nrole = \"user\"\nuser = \"alice\"\nsha256 = \"{digest}\"\n"
            ),
        )?;
        for file in [&key, &tokens] {
            use std::os::unix::fs::PermissionsExt as _;
            std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o600))?;
        }
        let mut child = Command::new(support::program())
            .args([
                "manager",
                "--listen=127.0.0.1:0",
                "--redis=redis://127.0.0.1:1",
            ])
            .arg(format!("--record={record}"))
            .arg(format!("--key-file={}", key.display()))
            .arg(format!("--tokens-file={}", tokens.display()))
            .arg(format!(
                "--target=oci:{}/{{user}}/{{name}}:{{tag}}",
                dir.display()
            ))
            .env("NOTIFY_SOCKET", notify)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let stderr = BufReader::new(child.stderr.take().ok_or("stderr")?);
        let (told, log) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let _ = told.send(line);
            }
        });
        Ok(Self { child, log })
    }

    /// Returns the next log line that contains `text`.
    fn line_with(&self, text: &str) -> Fallible<String> {
        let until = Instant::now() + PATIENCE;
        let mut seen = String::new();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let line = self.log.recv_timeout(left);
            let line = line.map_err(|_| format!("no line with {text:?} in:\n{seen}"))?;
            if line.contains(text) {
                return Ok(line);
            }
            seen.push_str(&line);
            seen.push('\n');
        }
    }

    fn end(mut self) -> std::io::Result<ExitStatus> {
        self.child.wait()
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the next message to the service manager that contains `text`.
fn message_with(socket: &UnixDatagram, text: &str) -> Fallible<String> {
    socket.set_read_timeout(Some(PATIENCE))?;
    loop {
        let mut bytes = [0; 4096];
        let length = socket.recv(&mut bytes)?;
        let message = String::from_utf8_lossy(&bytes[..length]).into_owned();
        if message.contains(text) {
            return Ok(message);
        }
    }
}

/// Returns the status of the response to a GET request.
fn status_of(address: &str, token: &str, path: &str) -> Fallible<u16> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let head = format!("Host: {address}\r\nAuthorization: Bearer {token}\r\nConnection: close");
    write!(stream, "GET {path} HTTP/1.1\r\n{head}\r\n\r\n")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let status = line.split(' ').nth(1).ok_or("no status line")?;
    Ok(status.parse()?)
}

#[test]
fn a_postgresql_that_goes_away_is_named_and_requests_do_not_wait_for_it() -> Outcomes {
    let url = match postgres::database() {
        Ok(url) => url,
        Err(reason) => {
            support::ignore(&reason);
            return Ok(());
        }
    };
    let (relay, url) = Relay::before(&url)?;
    let place = format!("127.0.0.1:{}/", relay.port);
    let dir = tempfile::tempdir()?;
    let notify = dir.path().join("notify");
    let socket = UnixDatagram::bind(&notify)?;
    let manager = Manager::start(dir.path(), &url, &notify)?;

    let ready = manager.line_with("the manager is ready")?;
    assert!(
        ready.contains(&place) && ready.contains("127.0.0.1:1"),
        "{ready}"
    );
    let message = message_with(&socket, "READY=1\n")?;
    assert!(message.contains("STATUS=the manager is ready"), "{message}");
    let address = ready
        .split("listens on ")
        .nth(1)
        .and_then(|rest| rest.split(',').next());
    let address = address.ok_or("address")?;
    assert_eq!(status_of(address, TOKEN, "/api/v1/saves")?, 200);

    relay.cut();
    let at = address.to_owned();
    let early = std::thread::spawn(move || {
        status_of(&at, TOKEN, "/api/v1/saves").map_err(|error| error.to_string())
    });
    let down = manager.line_with("the record does not answer")?;
    // Reset, if it was in the backlog of the port that was closed.
    let broken = ["efused", "reset"].iter().any(|why| down.contains(why));
    assert!(down.contains(&place) && broken, "{down}");
    let message = message_with(&socket, "cannot be used")?;
    assert!(
        message.contains(&place) && !message.contains("READY"),
        "{message}"
    );
    for path in ["/api/v1/saves", "/readyz"] {
        let status = status_of(address, TOKEN, path)?;
        assert_eq!(status, 503, "{path}");
    }
    assert_eq!(status_of(address, TOKEN, "/healthz")?, 200);

    let early = early.join().map_err(|_| "a thread died")??;
    assert_eq!(early, 503, "a request before the outage was noticed");

    relay.restore()?;
    let again = manager.line_with("the record answers again")?;
    assert!(again.contains(&place), "{again}");
    assert_eq!(status_of(address, TOKEN, "/api/v1/saves")?, 200);
    Ok(())
}

#[test]
fn a_manager_that_finds_no_postgresql_ends_with_its_host_and_for_a_retry() -> Outcomes {
    let dir = tempfile::tempdir()?;
    let notify = dir.path().join("notify");
    let _socket = UnixDatagram::bind(&notify)?;
    // Port 1 is refused; no listener is expected there.
    let url = "postgres://upperdeck:hunter2@127.0.0.1:1/saves";
    let manager = Manager::start(dir.path(), url, &notify)?;
    let line = manager.line_with("upperdeck: ")?;
    assert!(
        line.contains("the record at 127.0.0.1:1/saves cannot be used") && line.contains("efused"),
        "{line}"
    );
    assert!(!line.contains("hunter2"), "{line}");
    assert_eq!(manager.end()?.code(), Some(75));
    Ok(())
}
