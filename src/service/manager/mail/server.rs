//! The URL of an SMTP server.

use std::net::IpAddr;
use std::str::FromStr;

use percent_encoding::percent_decode_str;
use reqwest::Url;

/// How the connection to the server is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// TLS from the start.
    Tls,
    /// The connection changes to TLS before anything is sent (STARTTLS); a server that cannot is not used.
    StartTls,
    /// None.
    None,
}

/// An SMTP server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SmtpServer {
    /// Its name or address.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// How the connection is protected.
    pub encryption: Encryption,
    /// The user to authenticate as.
    pub user: Option<String>,
}

const EXPECTED: &str = "expected smtps://[USER@]HOST[:PORT], smtp://[USER@]HOST[:PORT] (STARTTLS) or \
     smtp://HOST[:PORT]?tls=none; the password is in a file";

impl SmtpServer {
    /// Returns whether others cannot read what is sent: the connection has TLS, or stays in this machine.
    pub(super) fn keeps_secrets(&self) -> bool {
        let loopback = |host: &str| host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
        self.encryption != Encryption::None || self.host == "localhost" || loopback(&self.host)
    }
}

impl FromStr for SmtpServer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || EXPECTED.to_owned();
        let url = Url::parse(text).map_err(|_| wrong())?;
        let (encryption, port) = match (url.scheme(), url.query()) {
            ("smtps", None) => (Encryption::Tls, 465),
            ("smtp", None) => (Encryption::StartTls, 587),
            ("smtp", Some("tls=none")) => (Encryption::None, 25),
            _ => return Err(wrong()),
        };
        let user = percent_decode_str(url.username()).decode_utf8();
        let user = user.map_err(|_| wrong())?.into_owned();
        let plain = matches!(url.path(), "" | "/") && url.fragment().is_none();
        if url.password().is_some() || !plain || user.chars().any(char::is_control) {
            return Err(wrong());
        }
        let host = url.host_str().filter(|host| !host.is_empty());
        let host = host.ok_or_else(wrong)?;
        Ok(Self {
            host: host.trim_matches(['[', ']']).to_owned(),
            port: url.port().unwrap_or(port),
            encryption,
            user: Some(user).filter(|user| !user.is_empty()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_read() {
        let server = |host: &str, port, encryption, user: Option<&str>| SmtpServer {
            host: host.to_owned(),
            port,
            encryption,
            user: user.map(str::to_owned),
        };
        for (text, expected) in [
            (
                "smtps://mail.example.org",
                server("mail.example.org", 465, Encryption::Tls, None),
            ),
            (
                "smtp://save%40example.org@mail.example.org:2587/",
                server(
                    "mail.example.org",
                    2587,
                    Encryption::StartTls,
                    Some("save@example.org"),
                ),
            ),
            (
                "smtp://127.0.0.1?tls=none",
                server("127.0.0.1", 25, Encryption::None, None),
            ),
            (
                "smtp://[::1]:25?tls=none",
                server("::1", 25, Encryption::None, None),
            ),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        for text in [
            "",
            "mail.example.org",
            "smtp://",
            "http://mail.example.org",
            "smtp://u:p@mail.example.org",
            "smtp://mail.example.org/x",
            "smtp://mail.example.org?tls=maybe",
            "smtps://mail.example.org?tls=none",
            "smtp://mail.example.org#x",
            "smtp://a%0d%0ab@mail.example.org",
        ] {
            assert!(text.parse::<SmtpServer>().is_err(), "{text}");
        }
    }
}
