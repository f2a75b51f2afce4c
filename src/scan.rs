//! The walk of the upper directory.
