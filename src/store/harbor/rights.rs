//! The rights that upperdeck needs in a project, and which of them an account lacks. A robot cannot read its own
//! permissions, so each right is tried on something that does not exist: Harbor checks the right first, and answers 403
//! without it and 404 with it.

use super::{BASE, Error, Harbor, escaped};

/// A repository that no image is saved to. Requests about it change nothing.
const NOWHERE: &str = "upperdeck-asks-for-its-rights";
/// A digest that no content has.
const NOTHING: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

/// What fails without a right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verb {
    /// Saving an image.
    Save,
    /// Listing images.
    List,
    /// Deleting an image or a tag.
    Delete,
    /// Showing the quota, and refusing a save that does not fit before anything is sent.
    Quota,
}

impl Verb {
    /// Returns the word for users.
    pub fn name(self) -> &'static str {
        match self {
            Self::Save => "SAVE",
            Self::List => "LIST",
            Self::Delete => "DEL",
            Self::Quota => "the quota",
        }
    }
}

/// A right of a robot account, as in Harbor's list of permissions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Right {
    /// The resource.
    pub resource: &'static str,
    /// The action.
    pub action: &'static str,
    /// What fails without it.
    pub verb: Verb,
}

const fn right(resource: &'static str, action: &'static str, verb: Verb) -> Right {
    Right {
        resource,
        action,
        verb,
    }
}

/// All rights that a robot account needs for saving, listing and deleting.
pub const NEEDED: [Right; 10] = [
    right("repository", "push", Verb::Save),
    right("repository", "pull", Verb::Save),
    right("repository", "list", Verb::List),
    right("repository", "read", Verb::List),
    right("artifact", "list", Verb::List),
    right("artifact", "read", Verb::Delete),
    right("artifact", "delete", Verb::Delete),
    right("tag", "delete", Verb::Delete),
    right("project", "read", Verb::Quota),
    right("quota", "read", Verb::Quota),
];

impl std::fmt::Display for Right {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.resource, self.action)
    }
}

impl Harbor {
    /// Returns the rights of [`NEEDED`] that this account lacks in a project, except for those to push and to pull,
    /// which are tried by a push ([`super::check_push`]).
    ///
    /// Fails with [`Error::Account`] if the account is not accepted, with [`Error::NoProject`] if there is no such
    /// project, and with [`Error::ReadOnly`] if Harbor is in read-only mode, in which the rights cannot be tried.
    pub async fn missing_rights(&self, project: &str) -> Result<Vec<Right>, Error> {
        let host = self.host().to_owned();
        if let (false, Some(user)) = (self.accepts_account().await?, self.user()) {
            return Err(Error::Account { host, user });
        }
        if !self.project_exists(project).await? {
            let project = project.to_owned();
            return Err(Error::NoProject { host, project });
        }
        let mut missing = Vec::new();
        for right in NEEDED.into_iter().filter(|right| !is_pushing(*right)) {
            if !self.has_right(project, right).await? {
                missing.push(right);
            }
        }
        Ok(missing)
    }

    /// Returns whether this account may delete images in a project, without deleting one.
    pub async fn may_delete_artifacts(&self, project: &str) -> Result<bool, Error> {
        let right = right("artifact", "delete", Verb::Delete);
        self.has_right(project, right).await
    }

    async fn has_right(&self, project: &str, right: Right) -> Result<bool, Error> {
        let project = escaped(project);
        let base = format!("{BASE}/projects/{project}");
        let repositories = format!("{base}/repositories");
        let artifact = format!("{repositories}/{NOWHERE}/artifacts/{}", escaped(NOTHING));
        let accept = &[401, 403, 404, 412];
        let answer = match (right.resource, right.action) {
            ("project", "read") => self.api.get(&base, accept).await?,
            ("quota", "read") => {
                // Without the right, the summary has no quota.
                let answer = self.api.get(&format!("{base}/summary"), accept).await?;
                let text = String::from_utf8_lossy(&answer.body);
                return Ok(answer.status == 200 && text.contains("\"quota\""));
            }
            ("repository", "list") => {
                let path = format!("{repositories}?page_size=1");
                self.api.get(&path, accept).await?
            }
            ("repository", "read") => {
                let path = format!("{repositories}/{NOWHERE}");
                self.api.get(&path, accept).await?
            }
            ("artifact", "list") => {
                let path = format!("{repositories}/{NOWHERE}/artifacts?page_size=1");
                self.api.get(&path, accept).await?
            }
            ("artifact", "read") => self.api.get(&artifact, accept).await?,
            ("artifact", "delete") => self.api.delete(&artifact, accept).await?,
            ("tag", "delete") => {
                let path = format!("{artifact}/tags/none");
                self.api.delete(&path, accept).await?
            }
            _ => return Ok(true),
        };
        if answer.status == 403 && String::from_utf8_lossy(&answer.body).contains("read only mode")
        {
            let host = self.host().to_owned();
            return Err(Error::ReadOnly { host });
        }
        Ok(!matches!(answer.status, 401 | 403))
    }
}

fn is_pushing(right: Right) -> bool {
    matches!(right.action, "push" | "pull")
}

/// Describes missing rights for the administrator, with what fails without them.
pub fn describe(missing: &[Right]) -> String {
    let mut verbs: Vec<Verb> = missing.iter().map(|right| right.verb).collect();
    verbs.sort();
    verbs.dedup();
    let parts = verbs.into_iter().map(|verb| {
        let of_verb = missing.iter().filter(|right| right.verb == verb);
        let names: Vec<String> = of_verb.map(ToString::to_string).collect();
        format!("{} (needs {})", verb.name(), names.join(", "))
    });
    parts.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_rights_are_named_by_what_fails() {
        let missing: Vec<Right> = NEEDED
            .into_iter()
            .filter(|right| {
                matches!(
                    right.to_string().as_str(),
                    "artifact:delete" | "repository:read" | "tag:delete"
                )
            })
            .collect();
        assert_eq!(
            describe(&missing),
            "LIST (needs repository:read); DEL (needs artifact:delete, tag:delete)"
        );
        assert_eq!(describe(&[]), "");
    }
}
