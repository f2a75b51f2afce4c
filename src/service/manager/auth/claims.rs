//! What the claims of an identity provider, the header of a proxy and the administrator's file say of a user.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;

use serde::Deserialize;
use serde_json::Value;

use super::email::is_address;
use super::{AuthError, Rejected};
use crate::service::manager::target;

/// Maximum number of groups of a user; further ones are left out, which the log says.
const MAX_GROUPS: usize = 500;
/// Maximum length of a group's name in bytes.
const MAX_GROUP: usize = 128;

/// Which claims of an identity provider's tokens are used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    /// Claim that contains the user's name, e.g. `preferred_username`. It must be unique, and users must not be able to
    /// change it at the provider.
    pub user: String,
    /// Claim with the names of the user's groups.
    pub groups: Option<String>,
    /// Claim with the user's e-mail address.
    pub email: Option<String>,
    /// Claim (with dots for nested claims, e.g. `realm_access.roles`) and the value that it has or contains for
    /// administrators.
    pub administrator: Option<(String, String)>,
    /// Users who are administrators.
    pub administrators: Vec<String>,
}

/// What the claims say of a user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) user: String,
    pub(super) administrator: bool,
    pub(super) groups: Vec<String>,
    pub(super) email: Option<String>,
}

/// The claims of a verified token.
pub(super) type Claimed = HashMap<String, Value>;

impl Claims {
    /// Returns whether a claim that is used is not among `claims`.
    pub(super) fn lack(&self, claims: &Claimed) -> bool {
        let administrator = self.administrator.as_ref().map(|(path, _)| path);
        [Some(&self.user), self.groups.as_ref(), self.email.as_ref()]
            .into_iter()
            .chain([administrator])
            .flatten()
            .any(|path| at(claims, path).is_none())
    }

    /// Reads the claims of a verified token.
    ///
    /// Fails if they name no user, or one whose name cannot be that of a user.
    pub(super) fn identity(&self, claims: &Claimed) -> Result<Identity, Rejected> {
        let user = at(claims, &self.user)
            .and_then(Value::as_str)
            .filter(|user| target::component(user).is_ok())
            .ok_or(Rejected::Unknown(
                "the token names no user that can be one here",
            ))?;
        let verified = at(claims, "email_verified");
        // An address that its owner has not confirmed may be another person's.
        if self.user == "email" && !verified.is_some_and(is_true) {
            return Err(Rejected::Unknown(
                "the token names its user by an e-mail address that is not verified",
            ));
        }
        let email = self.email.as_ref().and_then(|path| at(claims, path));
        let unconfirmed = verified.is_some_and(|verified| !is_true(verified));
        let claimed = self.administrator.as_ref();
        let claimed = claimed.is_some_and(|(path, value)| holds(at(claims, path), value));
        let groups = self.groups.as_ref().and_then(|path| at(claims, path));
        Ok(Identity {
            user: user.to_owned(),
            administrator: claimed || self.administrators.iter().any(|name| name == user),
            groups: match groups {
                Some(Value::Array(all)) => known_groups(all.iter().filter_map(Value::as_str)),
                Some(Value::String(one)) => known_groups([one.as_str()]),
                _ => Vec::new(),
            },
            email: email
                .and_then(Value::as_str)
                .filter(|email| !unconfirmed && is_address(email))
                .map(str::to_owned),
        })
    }
}

/// Returns the claim at a path: a claim of this name, or nested ones with dots between their names.
fn at<'a>(claims: &'a Claimed, path: &str) -> Option<&'a Value> {
    if let Some(found) = claims.get(path) {
        return Some(found);
    }
    let mut parts = path.split('.');
    let first = claims.get(parts.next()?)?;
    parts.try_fold(first, |claim, part| claim.get(part))
}

fn holds(claim: Option<&Value>, value: &str) -> bool {
    match claim {
        Some(Value::String(text)) => text == value,
        Some(Value::Array(all)) => all.iter().any(|one| one.as_str() == Some(value)),
        Some(Value::Bool(yes)) => *yes && value == "true",
        _ => false,
    }
}

/// Some providers write booleans as text.
fn is_true(claim: &Value) -> bool {
    claim.as_bool() == Some(true) || claim.as_str() == Some("true")
}

/// Returns whether this can be the name of a group.
pub(in super::super) fn is_group(name: &str) -> bool {
    let plain = !name.chars().any(char::is_control) && name.trim() == name;
    !name.is_empty() && name.len() <= MAX_GROUP && plain
}

/// Returns the names that can be those of groups, sorted.
pub(super) fn known_groups<'a>(names: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let (known, other): (Vec<&str>, Vec<&str>) = names.into_iter().partition(|name| is_group(name));
    let mut groups: Vec<String> = BTreeSet::from_iter(known)
        .into_iter()
        .map(str::to_owned)
        .collect();
    let left_out = groups.len().saturating_sub(MAX_GROUPS) + other.len();
    groups.truncate(MAX_GROUPS);
    if left_out > 0 {
        tracing::debug!(
            left_out,
            "groups of a user are left out: too many, or no names"
        );
    }
    groups
}

/// Groups of users by the administrator's file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Groups(BTreeMap<String, Vec<String>>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupFile {
    #[serde(default)]
    groups: BTreeMap<String, Vec<String>>,
}

impl Groups {
    /// Parses the TOML file of groups: a table `[groups]` with `NAME = ["USER", …]`.
    ///
    /// Fails with [`AuthError::Groups`], which names the wrong entry.
    pub fn parse(text: &str) -> Result<Self, AuthError> {
        let file: GroupFile =
            toml::from_str(text).map_err(|error| AuthError::Groups(error.message().to_owned()))?;
        let mut groups = Self::default();
        for (name, users) in file.groups {
            if !is_group(&name) {
                return Err(AuthError::Groups(format!("{name:?} is no name of a group")));
            }
            for user in users {
                target::component(&user).map_err(|_| {
                    AuthError::Groups(format!("{name:?}: {user:?} is no name of a user"))
                })?;
                groups.0.entry(user).or_default().push(name.clone());
            }
        }
        Ok(groups)
    }

    /// Adds the groups that the file says of `user`.
    pub(super) fn add(&self, user: &str, to: &mut Vec<String>) {
        let Some(more) = self.0.get(user) else { return };
        to.extend(more.iter().cloned());
        to.sort();
        to.dedup();
    }
}

/// Returns groups as one text, for the record: each on a line.
pub(in super::super) fn as_text(groups: &[String]) -> String {
    groups.iter().fold(String::new(), |mut text, group| {
        // Writing to a `String` cannot fail.
        let _ = writeln!(text, "{group}");
        text
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rules(user: &str) -> Claims {
        Claims {
            user: user.to_owned(),
            groups: Some("realm.groups".to_owned()),
            email: Some("email".to_owned()),
            administrator: None,
            administrators: Vec::new(),
        }
    }

    fn read(user: &str, claims: &Value) -> Result<Identity, Rejected> {
        rules(user).identity(&serde_json::from_value(claims.clone()).unwrap())
    }

    #[test]
    fn groups_are_those_of_the_claim_and_have_names() {
        let long = "x".repeat(MAX_GROUP + 1);
        let claims = json!({"sub": "a", "realm": {"groups": ["staff", "/hpc/gpu", 7, "", "a\nb", long, "staff", " x"]}});
        assert_eq!(read("sub", &claims).unwrap().groups, ["/hpc/gpu", "staff"]);
        let claims = json!({"sub": "a", "realm": {"groups": "a, b"}});
        assert_eq!(read("sub", &claims).unwrap().groups, ["a, b"]);
        let many: Vec<_> = (0..2 * MAX_GROUPS).map(|n| n.to_string()).collect();
        let claims = json!({"sub": "a", "realm": {"groups": many}});
        assert_eq!(read("sub", &claims).unwrap().groups.len(), MAX_GROUPS);
    }

    #[test]
    fn an_unverified_address_names_no_user() {
        let said = |verified: Value| json!({"sub": "a", "email": "a@example.org", "email_verified": verified});
        for (verified, user, email) in [
            (json!(true), true, true),
            (json!("true"), true, true),
            (json!(false), false, false),
            (json!("false"), false, false),
            (json!(1), false, false),
        ] {
            assert_eq!(read("email", &said(verified.clone())).is_ok(), user);
            let found = read("sub", &said(verified)).unwrap();
            assert_eq!(found.email.is_some(), email);
        }
        assert!(read("email", &json!({"email": "a@example.org"})).is_err());
        let found = read("sub", &json!({"sub": "a", "email": "a@example.org"}));
        assert_eq!(found.unwrap().email.as_deref(), Some("a@example.org"));
    }

    #[test]
    fn groups_of_the_file_are_read_and_wrong_ones_named() {
        let groups = Groups::parse("[groups]\nstaff = ['a', 'b']\ngpu = ['a']\n").unwrap();
        let mut found = vec!["x".to_owned(), "staff".to_owned()];
        groups.add("a", &mut found);
        assert_eq!(found, ["gpu", "staff", "x"]);
        for (bad, says) in [
            ("[groups]\n'' = ['a']", "\"\""),
            ("[groups]\nstaff = ['']", "staff"),
            ("[group]\n", "group"),
            ("[groups]\nstaff = 'a'", "sequence"),
        ] {
            let error = Groups::parse(bad).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
