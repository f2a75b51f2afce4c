//! The scopes that a request needs, in the notation of token services.

/// Scopes to request from the token service, and the repository whose credentials are used for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::store::registry) struct Scopes {
    /// The repository whose credentials are used.
    pub(in crate::store::registry) repository: String,
    /// One or more `repository:NAME:ACTIONS`, requested together.
    pub(in crate::store::registry) scopes: Vec<String>,
}

impl Scopes {
    /// Returns the scope of `actions` on one repository.
    pub(in crate::store::registry) fn new(repository: &str, actions: &str) -> Self {
        Self {
            repository: repository.to_owned(),
            scopes: vec![format!("repository:{repository}:{actions}")],
        }
    }

    /// Adds the right to pull from another repository, which mounting a blob from it needs.
    pub(in crate::store::registry) fn and_pull(mut self, repository: &str) -> Self {
        self.scopes.push(format!("repository:{repository}:pull"));
        self
    }

    pub(super) fn key(&self) -> String {
        self.scopes.join(" ")
    }
}
