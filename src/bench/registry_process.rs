//! Finds a registry on this machine and measures its CPU time, which counts towards the limit because it shares the
//! cores with the save.

use std::fs;
use std::net::{IpAddr, ToSocketAddrs as _, UdpSocket};

use crate::node::procfs::Stat;

/// The process that serves a registry, if it is on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RegistryProcess {
    /// The registry is on another machine.
    Remote,
    /// The registry is on this machine, but its process cannot be determined (which requires root).
    Unknown,
    /// The process with this PID serves the registry.
    Local(u32),
}

impl RegistryProcess {
    /// Looks up `host`, which is `HOST[:PORT]`.
    pub(crate) fn find(host: &str) -> Self {
        let with_port = host
            .rsplit_once(':')
            .is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let ports: &[u16] = if with_port { &[0] } else { &[443, 80] };
        let addresses = ports.iter().flat_map(|port| {
            let text = if with_port {
                host.to_owned()
            } else {
                format!("{host}:{port}")
            };
            text.to_socket_addrs().into_iter().flatten()
        });
        let here: Vec<_> = addresses.filter(|address| is_local(address.ip())).collect();
        if here.is_empty() {
            return Self::Remote;
        }
        let process = here.iter().find_map(|address| listener(address.port()));
        process.map_or(Self::Unknown, Self::Local)
    }

    /// Returns the CPU time of the process in seconds.
    pub(crate) fn cpu(self) -> Option<f64> {
        let Self::Local(pid) = self else {
            return None;
        };
        let stat = Stat::parse(&fs::read(format!("/proc/{pid}/stat")).ok()?)?;
        let ticks = rustix::param::clock_ticks_per_second();
        Some(stat.cpu_ticks as f64 / ticks as f64)
    }
}

/// Only a local address can be bound.
fn is_local(address: IpAddr) -> bool {
    UdpSocket::bind((address, 0)).is_ok()
}

/// Returns the inodes of the sockets that listen on `port`, from the text of `/proc/net/tcp` or `tcp6`.
fn listening(table: &str, port: u16) -> Vec<u64> {
    let suffix = format!(":{port:04X}");
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            // 0A is TCP_LISTEN.
            let wanted = fields.get(1)?.ends_with(&suffix) && *fields.get(3)? == "0A";
            wanted.then(|| fields.get(9)?.parse().ok()).flatten()
        })
        .collect()
}

/// Returns the process that listens on `port`.
fn listener(port: u16) -> Option<u32> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"];
    let sockets: Vec<String> = tables
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| listening(&table, port))
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    let pids = fs::read_dir("/proc").ok()?.flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .find(|pid: &u32| {
            let files = fs::read_dir(format!("/proc/{pid}/fd"))
                .into_iter()
                .flatten();
            files
                .flatten()
                .filter_map(|file| fs::read_link(file.path()).ok())
                .any(|to| {
                    to.to_str()
                        .is_some_and(|to| sockets.iter().any(|socket| socket == to))
                })
        })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn the_listener_on_this_machine_is_found() -> std::io::Result<()> {
        let socket = TcpListener::bind("127.0.0.1:0")?;
        let host = socket.local_addr()?.to_string();
        assert_eq!(
            RegistryProcess::find(&host),
            RegistryProcess::Local(std::process::id())
        );
        assert!(RegistryProcess::find(&host).cpu().is_some());
        assert_eq!(RegistryProcess::Remote.cpu(), None);
        // TEST-NET-1 is never assigned.
        assert_eq!(
            RegistryProcess::find("192.0.2.1:5000"),
            RegistryProcess::Remote
        );
        Ok(())
    }

    #[test]
    fn only_listening_sockets_of_the_port_count() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:1388 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 41 1\n\
            1: 0100007F:1388 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 42 1\n\
            2: 0100007F:1389 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 43 1\n";
        assert_eq!(listening(table, 5000), [41]);
    }
}
