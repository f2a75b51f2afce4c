//! What a child says of the end of its save.

use crate::service::job::Event;

/// The final event of a child.
#[derive(Default)]
pub(super) struct FinalEvent {
    pub(super) saved: Option<(String, String)>,
    pub(super) failed: Option<(String, String, bool)>,
    /// Whether the child was permitted to write the tag.
    pub(super) gate_open: bool,
}

impl FinalEvent {
    /// Returns whether the event says how the save ends.
    pub(super) fn read(&mut self, event: &Event) -> bool {
        match event {
            Event::Saved {
                reference, digest, ..
            } => {
                self.saved = Some((reference.clone(), digest.to_string()));
            }
            Event::Failed {
                code,
                message,
                retryable,
                ..
            } => self.failed = Some((code.clone(), message.clone(), *retryable)),
            _ => return false,
        }
        true
    }

    /// Returns whether the tag may be written although the child has not said so: it was stopped while it wrote it.
    pub(super) fn is_tag_uncertain(&self) -> bool {
        let told = self.failed.as_ref().map(|(code, ..)| code.as_str());
        self.gate_open && told.is_none_or(|code| code == "cancelled")
    }
}
