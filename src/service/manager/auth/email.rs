//! E-mail addresses of users: which texts can be one, and those that the administrator states.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::AuthError;
use crate::service::manager::target;

/// Maximum length of an address in bytes (RFC 5321).
const MAX_ADDRESS: usize = 254;
/// Maximum length of what is before the `@`.
const MAX_LOCAL: usize = 64;

fn is_local(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-/=?^_`{|}~.".contains(&b);
    let dots = text.starts_with('.') || text.ends_with('.') || text.contains("..");
    (1..=MAX_LOCAL).contains(&text.len()) && text.bytes().all(plain) && !dots
}

/// Returns whether this can be the domain of an address: names, not an IP address.
fn is_domain(text: &str) -> bool {
    let label = |label: &str| {
        let plain = label
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-');
        (1..=63).contains(&label.len()) && plain && !label.starts_with('-') && !label.ends_with('-')
    };
    let named = text.bytes().any(|b| b.is_ascii_alphabetic());
    named && text.split('.').all(label)
}

/// Returns whether this is an e-mail address that the service sends to: ASCII, without quotes, comments and white space,
/// so that nothing in it can end a command or a header.
pub(super) fn is_address(text: &str) -> bool {
    text.len() <= MAX_ADDRESS
        && text
            .rsplit_once('@')
            .is_some_and(|(local, domain)| is_local(local) && is_domain(domain))
}

/// Addresses of users by the administrator's settings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    users: BTreeMap<String, String>,
    domain: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AddressFile {
    #[serde(default)]
    addresses: BTreeMap<String, String>,
}

impl Addresses {
    /// Parses the TOML file of addresses: a table `[addresses]` with `USER = "ADDRESS"`.
    ///
    /// Fails with [`AuthError::Addresses`], which names the wrong entry.
    pub fn parse(text: &str) -> Result<Self, AuthError> {
        let file: AddressFile = toml::from_str(text)
            .map_err(|error| AuthError::Addresses(error.message().to_owned()))?;
        for (user, address) in &file.addresses {
            let wrong = |what: &str| AuthError::Addresses(format!("{user:?}: {what}"));
            target::component(user).map_err(|_| wrong("this is no name of a user"))?;
            if !is_address(address) {
                return Err(wrong(&format!("{address:?} is no e-mail address")));
            }
        }
        Ok(Self {
            users: file.addresses,
            domain: None,
        })
    }

    /// Gives users without another address `USER@DOMAIN`.
    ///
    /// Fails if this is no domain.
    pub fn with_domain(mut self, domain: &str) -> Result<Self, AuthError> {
        if !is_domain(domain) {
            return Err(AuthError::Addresses(format!("{domain:?} is no domain")));
        }
        self.domain = Some(domain.to_owned());
        Ok(self)
    }

    /// Returns the address of `user`: that of the file, that of the credential, or the one in the domain.
    pub(super) fn of(&self, user: &str, stated: Option<String>) -> Option<String> {
        let in_domain = || {
            let address = format!("{user}@{}", self.domain.as_ref()?);
            Some(address).filter(|address| is_address(address))
        };
        let listed = self.users.get(user).cloned();
        listed.or(stated).or_else(in_domain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_plain() {
        for good in [
            "a@b.example",
            "alice.smith+saves@mail-1.example.org",
            "o'neil@example.org",
            "root@localhost",
        ] {
            assert!(is_address(good), "{good}");
        }
        let long = format!("{}@example.org", "x".repeat(MAX_LOCAL + 1));
        for bad in [
            "",
            "a",
            "@b",
            "a@",
            "a@b@c.example",
            "a b@c.example",
            "\"a b\"@c.example",
            "a@c.example\r\nBcc: x@y.example",
            "a@c.example>",
            "<a@c.example>",
            "a,b@c.example",
            "a@c..example",
            "a@-c.example",
            "a@[127.0.0.1]",
            "a@127.0.0.1",
            ".a@c.example",
            "a..b@c.example",
            "ä@c.example",
            "a@c.example, d@e.example",
            long.as_str(),
        ] {
            assert!(!is_address(bad), "{bad}");
        }
    }

    #[test]
    fn the_file_comes_before_the_credential_and_that_before_the_domain() {
        let text = "[addresses]\nalice = 'a@file.example'\n";
        let addresses = Addresses::parse(text).unwrap();
        let addresses = addresses.with_domain("site.example").unwrap();
        let stated = || Some("x@token.example".to_owned());
        for (user, stated, address) in [
            ("alice", stated(), Some("a@file.example")),
            ("bob", stated(), Some("x@token.example")),
            ("bob", None, Some("bob@site.example")),
            ("bob@other.example", None, None),
            ("b ob", None, None),
        ] {
            assert_eq!(addresses.of(user, stated).as_deref(), address, "{user}");
        }
        for (bad, says) in [
            ("[addresses]\nalice = 'x'", "alice"),
            ("[addresses]\n'' = 'a@b.example'", "\"\""),
            ("[address]\n", "address"),
        ] {
            let error = Addresses::parse(bad).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        assert!(Addresses::default().with_domain("a b").is_err());
    }
}
