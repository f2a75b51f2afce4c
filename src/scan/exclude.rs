//! Stub until merged.
#![allow(missing_docs)]
use rustix::fs::FileType;
#[derive(Debug, Default)]
pub struct Exclusions;
#[derive(Debug, Default)]
pub struct Rules<'a> { pub mounts: &'a [Vec<u8>], pub user: &'a [String], pub credentials: bool, pub caches: bool, pub gpu: bool }
#[derive(Debug, thiserror::Error)]
#[error("bad pattern")]
pub struct PatternError;
pub struct Facts<'a> { pub file_type: Option<FileType>, pub size: u64, pub link: Option<&'a [u8]>, pub in_base: bool }
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "reason", content = "pattern", rename_all = "snake_case")]
pub enum Reason { Mount, MountStub, RuntimeDevice, Gpu, Credential, Cache, Pattern(String) }
impl Exclusions {
    pub fn new(_: Rules<'_>) -> Result<Self, PatternError> { Ok(Self) }
    pub fn check(&self, _: &[u8], _: &Facts<'_>) -> Option<Reason> { None }
    pub fn mount_ancestor(&self, _: &[u8]) -> bool { false }
}
