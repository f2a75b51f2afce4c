//! API tokens: the manager's own, known by their digests.

use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use super::AuthError;
use crate::service::manager::target;

/// What a token's bearer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Acts for whichever user it names, and as no administrator.
    Portal,
    /// A user.
    User,
    /// Sees and does everything.
    Administrator,
}

/// A token as the file has it.
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
    /// What a sign-in with it rests on: another token of the same name is another one.
    pub(super) fn fingerprint(&self) -> String {
        hex::encode(Sha256::digest(self.sha256))
    }
}

/// API tokens, by their digests: the tokens themselves are nowhere.
#[derive(Clone, Debug, Default)]
pub struct Tokens(Vec<Token>);

impl Tokens {
    /// From TOML: `[[token]]` with `name`, `role` (`portal`, `user`, `administrator`), `user` (for a user's token and, if
    /// it shall save sessions that nobody owns, an administrator's) and `sha256`, the token's SHA-256 in hexadecimal
    /// (`printf %s TOKEN | sha256sum`).
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

    /// One more, e.g. the one that `upperdeck up` makes.
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

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The one that a sign-in rests on, if it still is one.
    pub(super) fn by_fingerprint(&self, print: &str) -> Option<&Token> {
        self.0.iter().find(|token| token.fingerprint() == print)
    }

    /// Compares with all of them, in a time that says nothing of which and how far.
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
