//! The manager's own API tokens, of which only digests are stored.

use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use super::AuthError;
use crate::service::manager::target;

/// Role of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Acts for the user that each request names, without administrator permissions.
    Portal,
    /// Acts as one user.
    User,
    /// May see and do everything.
    Administrator,
}

/// A token in the token file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenEntry {
    name: String,
    role: Role,
    user: Option<String>,
    sha256: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenFile {
    #[serde(default)]
    token: Vec<TokenEntry>,
}

#[derive(Clone, Debug)]
pub(super) struct Token {
    pub(super) name: String,
    pub(super) role: Role,
    pub(super) user: Option<String>,
    sha256: [u8; 32],
}

impl Token {
    /// Returns the identity of the token for sign-ins. It differs between tokens of the same name.
    pub(super) fn fingerprint(&self) -> String {
        hex::encode(Sha256::digest(self.sha256))
    }
}

/// API tokens, stored as digests only.
#[derive(Clone, Debug, Default)]
pub struct Tokens(Vec<Token>);

impl Tokens {
    /// Parses the TOML token file: `[[token]]` with `name`, `role` (`portal`, `user`, `administrator`), `user` (for a
    /// user's token, and for an administrator's that should be able to save sessions without an owner) and `sha256`,
    /// the SHA-256 of the token in hexadecimal (`printf %s TOKEN | sha256sum`).
    ///
    /// Fails with [`AuthError::Tokens`], which names the invalid entry.
    pub fn parse(text: &str) -> Result<Self, AuthError> {
        let file: TokenFile =
            toml::from_str(text).map_err(|error| AuthError::Tokens(error.message().to_owned()))?;
        let mut tokens = Self::default();
        for (at, entry) in file.token.into_iter().enumerate() {
            let wrong = |reason: &str| {
                AuthError::Tokens(format!("token {} ({:?}): {reason}", at + 1, entry.name))
            };
            let digest = hex::decode(&entry.sha256).ok();
            let sha256 = digest
                .and_then(|bytes| bytes.try_into().ok())
                .ok_or_else(|| wrong("sha256 is not 64 hexadecimal digits"))?;
            tokens
                .add(entry.name.clone(), entry.role, entry.user.clone(), sha256)
                .map_err(|reason| wrong(&reason))?;
        }
        Ok(tokens)
    }

    /// Adds a token, e.g. the one that `upperdeck up` creates.
    ///
    /// Fails with [`AuthError::Tokens`] if the name, the role or the user is invalid.
    pub fn with(
        mut self,
        name: &str,
        role: Role,
        user: Option<&str>,
        token: &str,
    ) -> Result<Self, AuthError> {
        let sha256 = Sha256::digest(token).into();
        self.add(name.to_owned(), role, user.map(str::to_owned), sha256)
            .map_err(AuthError::Tokens)?;
        Ok(self)
    }

    fn add(
        &mut self,
        name: String,
        role: Role,
        user: Option<String>,
        sha256: [u8; 32],
    ) -> Result<(), String> {
        if name.is_empty() || name.len() > 64 || name.chars().any(char::is_control) {
            return Err("name is empty, too long or not printable".to_owned());
        }
        if self.0.iter().any(|token| token.name == name) {
            return Err("there is another one of this name".to_owned());
        }
        match (role, &user) {
            (Role::User, None) => return Err("role user needs a user".to_owned()),
            (Role::Portal, Some(_)) => {
                return Err("a portal names its users itself: no user here".to_owned());
            }
            _ => {}
        }
        if let Some(user) = &user {
            target::component(user).map_err(|_| format!("user {user:?} is no name of a user"))?;
        }
        self.0.push(Token {
            name,
            role,
            user,
            sha256,
        });
        Ok(())
    }

    /// Returns whether there are no tokens.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the token that a sign-in is based on, if it still exists.
    pub(super) fn by_fingerprint(&self, print: &str) -> Option<&Token> {
        self.0.iter().find(|token| token.fingerprint() == print)
    }

    /// Returns the entry of a token. Compares with all entries in constant time, so that the duration reveals nothing
    /// about them.
    pub(super) fn find(&self, token: &str) -> Option<&Token> {
        let given: [u8; 32] = Sha256::digest(token).into();
        let mut found = None;
        for token in &self.0 {
            if bool::from(token.sha256.ct_eq(&given)) {
                found = Some(token);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_read_and_wrong_ones_named() {
        let digest = hex::encode(Sha256::digest("secret"));
        let text = format!("[[token]]\nname='p'\nrole='portal'\nsha256='{digest}'\n");
        let tokens = Tokens::parse(&text).unwrap();
        assert_eq!(tokens.find("secret").map(|t| t.role), Some(Role::Portal));
        assert!(tokens.find("Secret").is_none());
        for (bad, says) in [
            ("[[token]]\nname='a'\nrole='king'\nsha256=''", "king"),
            ("[[token]]\nname='a'\nrole='portal'\nsha256='ab'", "sha256"),
            (
                &format!("[[token]]\nname='a'\nrole='user'\nsha256='{digest}'"),
                "needs a user",
            ),
            (&format!("{text}{text}"), "another one"),
            ("[[tokens]]\n", "tokens"),
        ] {
            let error = Tokens::parse(bad).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
