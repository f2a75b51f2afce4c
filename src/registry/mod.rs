//! A repository of a distribution registry.
