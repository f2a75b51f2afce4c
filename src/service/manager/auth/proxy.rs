//! Authentication by a proxy, which is trusted only if it connects from a configured address.

use axum::http::{HeaderMap, HeaderName};

use super::AuthError;
use super::claims::known_groups;
use super::email::is_address;
use crate::service::connections::{Range, RangeError};

/// Proxies that authenticate users and pass the name in a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxies {
    /// Header with the user's name, e.g. `X-Forwarded-User`. The proxy must remove it from incoming requests.
    pub header: HeaderName,
    /// Addresses of trusted proxies.
    pub from: Vec<Range>,
    /// Header with the names of the user's groups, separated by commas, e.g. `X-Forwarded-Groups`. The proxy must remove
    /// it from incoming requests.
    pub groups_header: Option<HeaderName>,
    /// Header with the user's e-mail address, e.g. `X-Forwarded-Email`. The proxy must remove it from incoming requests.
    pub email_header: Option<HeaderName>,
    /// Users who are administrators.
    pub administrators: Vec<String>,
}

impl Proxies {
    /// Parses the settings from the text in flags and files.
    ///
    /// Fails if the header's name or a range is invalid.
    pub fn new(
        header: &str,
        from: &[String],
        administrators: Vec<String>,
    ) -> Result<Self, AuthError> {
        let name = header
            .parse()
            .map_err(|_| AuthError::Header(header.to_owned()))?;
        let from = from
            .iter()
            .map(|range| range.parse())
            .collect::<Result<_, RangeError>>()?;
        Ok(Self {
            header: name,
            from,
            groups_header: None,
            email_header: None,
            administrators,
        })
    }

    /// Also accepts the names of the user's groups in this header.
    ///
    /// Fails if the header's name is invalid.
    pub fn with_groups(mut self, header: &str) -> Result<Self, AuthError> {
        let name = header.parse();
        self.groups_header = Some(name.map_err(|_| AuthError::Header(header.to_owned()))?);
        Ok(self)
    }

    /// Also accepts the user's e-mail address in this header.
    ///
    /// Fails if the header's name is invalid.
    pub fn with_email(mut self, header: &str) -> Result<Self, AuthError> {
        let name = header.parse();
        self.email_header = Some(name.map_err(|_| AuthError::Header(header.to_owned()))?);
        Ok(self)
    }

    /// Returns the e-mail address that the proxy states, if it is one.
    pub(super) fn email_of(&self, headers: &HeaderMap) -> Option<String> {
        let mut said = headers.get_all(self.email_header.as_ref()?).iter();
        let email = said.next()?.to_str().ok()?;
        let alone = said.next().is_none();
        (alone && is_address(email)).then(|| email.to_owned())
    }

    /// Returns the groups that the proxy states.
    pub(super) fn groups_of(&self, headers: &HeaderMap) -> Vec<String> {
        let Some(name) = &self.groups_header else {
            return Vec::new();
        };
        let said = headers.get_all(name).iter();
        let said = said.filter_map(|value| std::str::from_utf8(value.as_bytes()).ok());
        known_groups(said.flat_map(|value| value.split(',')).map(str::trim))
    }
}
