//! The rights that a request needs, as a token service names them.

/// What is asked of the token service, and as whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::store::registry) struct Scopes {
    /// The repository whose credentials are used.
    pub(in crate::store::registry) repository: String,
    /// `repository:NAME:ACTIONS`, one or more, asked for in one request.
    pub(in crate::store::registry) scopes: Vec<String>,
}

impl Scopes {
    /// One repository.
    pub(in crate::store::registry) fn new(repository: &str, actions: &str) -> Self {
        Self {
            repository: repository.to_owned(),
            scopes: vec![format!("repository:{repository}:{actions}")],
        }
    }

    /// And another, to read a blob from it.
    pub(in crate::store::registry) fn and_pull(mut self, repository: &str) -> Self {
        self.scopes.push(format!("repository:{repository}:pull"));
        self
    }

    pub(super) fn key(&self) -> String {
        self.scopes.join(" ")
    }
}
