//! Code that every other module may use: digests, escaping of untrusted text, messages, names of images, cancellation,
//! kinds of failures, and files with private modes.

pub mod cancel;
pub mod digest;
pub mod escape;
pub mod failure;
pub mod message;
pub(crate) mod private_files;
pub mod reference;
