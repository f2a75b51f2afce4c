//! Says in the log, and to a service manager that asked for it (`Type=notify` of systemd), that a process is ready.

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use crate::common::escape;

/// Variable with the address of the service manager's socket.
const SOCKET: &str = "NOTIFY_SOCKET";
/// Maximum length of a status in characters.
const MAX_STATUS: usize = 300;

/// Says that the process is ready: one line in the log (which is also written without `--log`), and the status of the
/// unit.
pub(crate) fn say(text: &str) {
    tracing::info!("{}", escape::text(text));
    notify(Some("READY=1"), text);
}

/// Says that the process has started and what it still waits for. Units that are ordered after it may start.
pub(crate) fn say_started(waits_for: &str) {
    notify(Some("READY=1"), waits_for);
}

/// Changes the status that `systemctl status` shows.
pub(crate) fn say_status(text: &str) {
    notify(None, text);
}

/// Says that the process ends, which may take as long as running work.
pub(crate) fn say_stopping(text: &str) {
    notify(Some("STOPPING=1"), text);
}

fn notify(state: Option<&str>, status: &str) {
    let Some(socket) = std::env::var_os(SOCKET) else {
        return;
    };
    // A line break would begin another assignment.
    let status = escape::limited(status, MAX_STATUS);
    let state = state.map(|state| format!("{state}\n")).unwrap_or_default();
    if let Err(error) = send(socket.as_bytes(), &format!("{state}STATUS={status}\n")) {
        tracing::debug!(%error, "the service manager cannot be notified");
    }
}

/// Sends one datagram to `socket`: a path, or with `@` in front the name of an abstract socket.
fn send(socket: &[u8], message: &str) -> io::Result<()> {
    let address = match socket.split_first() {
        Some((b'@', name)) => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(socket))?,
    };
    let from = UnixDatagram::unbound()?;
    from.set_nonblocking(true)?;
    from.send_to_addr(message.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_arrives_at_a_path_and_at_an_abstract_name() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("notify");
        let name = format!("upperdeck-test-{}", std::process::id());
        let at_path = UnixDatagram::bind(&path)?;
        let abstract_address = SocketAddr::from_abstract_name(name.as_bytes())?;
        let at_name = UnixDatagram::bind_addr(&abstract_address)?;
        for (socket, address) in [
            (at_path, path.as_os_str().as_bytes().to_vec()),
            (at_name, format!("@{name}").into_bytes()),
        ] {
            send(&address, "READY=1\nSTATUS=ready\n")?;
            let mut message = [0; 100];
            let length = socket.recv(&mut message)?;
            assert_eq!(&message[..length], b"READY=1\nSTATUS=ready\n");
        }
        assert!(send(b"/nonexistent/socket", "READY=1").is_err());
        assert!(send(b"", "READY=1").is_err());
        Ok(())
    }
}
