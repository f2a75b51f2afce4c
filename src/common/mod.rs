//! Code that every other module may use: digests, escaping of untrusted text, messages, names of images, cancellation,
//! kinds of failures, files with private modes, the opening of regular files, and what a save waits for.

pub mod cancel;
pub mod digest;
pub mod escape;
pub mod failure;
pub mod message;
pub mod pod;
pub(crate) mod private_files;
pub mod reference;
pub(crate) mod regular_file;
pub mod waits;

#[cfg(test)]
#[allow(dead_code, reason = "each test program uses its part")]
#[path = "../../tests/support/ignored.rs"]
mod ignoring;
