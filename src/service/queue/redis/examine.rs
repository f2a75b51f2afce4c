//! Examines a Redis server for `doctor`: its version, its settings as far as they are visible, and whether the user has
//! the permissions that the queue needs. The commands are tried in one script, on keys that it creates and deletes, so
//! nothing is left behind.

use std::collections::HashMap;
use std::time::{SystemTime, UNIX_EPOCH};

use redis::{ConnectionAddr, Script};

use super::link::Connection;
use crate::service::queue::{Error, Settings};

/// Properties of a Redis server.
#[derive(Clone, Debug)]
pub struct ServerInfo {
    /// Host and port, or the path of the socket.
    pub at: String,
    /// Version of the server, if it discloses it.
    pub version: Option<String>,
    /// Names of the commands that this user is not permitted to run.
    pub refused: Vec<String>,
    /// Whether the connection uses TLS.
    pub tls: bool,
    /// Whether the server is on this machine.
    pub local: bool,
    /// Whether the client logs in with a password.
    pub password: bool,
    /// `maxmemory_policy`, if the server discloses it.
    pub policy: Option<String>,
    /// Whether `maxmemory` is set.
    pub bounded: bool,
    /// Whether the server persists to disk, if it discloses that.
    pub persistent: Option<bool>,
    /// Time of a response by the server's clock and by the local one, in milliseconds since the epoch.
    pub clock: Option<(i64, i64)>,
}

impl ServerInfo {
    /// Returns the major and minor version. Valkey continues the numbers of Redis from 7.2.
    pub(crate) fn version_number(&self) -> Option<(u32, u32)> {
        let mut parts = self.version.as_deref()?.split('.');
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    }
}

fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as i64)
}

/// Parses lines of the form `field:value`, the format of `INFO`.
fn fields(info: &str) -> HashMap<&str, &str> {
    info.lines()
        .filter_map(|line| line.trim().split_once(':'))
        .collect()
}

/// Examines the Redis server at `url`.
///
/// Fails if the URL is invalid or the server cannot be reached.
pub async fn examine(url: &str) -> Result<ServerInfo, Error> {
    let prefix = Settings::default().prefix;
    let link = Connection::new(url, &prefix)?;
    link.ask::<redis::Value>(&redis::cmd("PING")).await?;
    let before = now_ms();
    let mut refused = Vec::new();
    let clock = match link.ask::<(i64, i64)>(&redis::cmd("TIME")).await {
        Ok((seconds, micros)) => Some((
            seconds.saturating_mul(1000).saturating_add(micros / 1000),
            before.midpoint(now_ms()),
        )),
        Err(Error::Refused { .. }) => {
            refused.push("TIME".to_owned());
            None
        }
        Err(error) => return Err(error),
    };
    let script = Script::new(include_str!("examine.lua"));
    let key = format!("{prefix}doctor:{:016x}", rand::random::<u64>());
    let mut call = script.key(key.as_str());
    match link.run::<Vec<String>>(call.arg(0)).await {
        Ok(names) => refused.extend(names),
        // The reason names the commands that scripts may not call. The queue calls commands only from scripts.
        Err(Error::Refused { reason, .. }) => refused.push(format!("EVALSHA ({reason})")),
        Err(error) => return Err(error),
    }
    let info = link
        .ask::<String>(redis::cmd("INFO").arg("default"))
        .await
        .unwrap_or_default();
    let info = fields(&info);
    let told = |name: &str| info.get(name).map(|value| (*value).to_owned());
    let (tls, local) = match link.address() {
        ConnectionAddr::TcpTls { .. } => (true, false),
        ConnectionAddr::Unix(_) => (false, true),
        ConnectionAddr::Tcp(host, _) => {
            let ip = host.parse::<std::net::IpAddr>();
            (
                false,
                host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback()),
            )
        }
        _ => (false, false),
    };
    Ok(ServerInfo {
        at: link.at().to_owned(),
        version: told("valkey_version").or_else(|| told("redis_version")),
        refused,
        tls,
        local,
        password: link.has_password(),
        policy: told("maxmemory_policy"),
        bounded: told("maxmemory").is_some_and(|most| most != "0"),
        persistent: told("aof_enabled").map(|aof| {
            aof == "1"
                || told("rdb_last_save_time")
                    .is_some_and(|_| told("rdb_saves").is_none_or(|n| n != "0"))
        }),
        clock,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_info_says_is_read_by_name() {
        let text =
            "# Server\r\nredis_version:7.0.15\r\n\r\n# Memory\r\nmaxmemory_policy:noeviction\r\n";
        let fields = fields(text);
        assert_eq!(fields.get("redis_version"), Some(&"7.0.15"));
        assert_eq!(fields.get("maxmemory_policy"), Some(&"noeviction"));
        assert_eq!(fields.len(), 2);
    }
}
