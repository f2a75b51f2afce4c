//! What every other module may use: digests, escaping of strangers' text, messages, cancellation, files with private modes.

pub mod cancel;
pub mod digest;
pub mod escape;
pub mod message;
pub mod private;
