//! Fuzzes the reader of bbolt databases: the metadata of containerd and of its snapshotters.

use upperdeck::node::container::bolt::{self, Bucket, Error, Value};

use crate::errors;
use crate::files;

/// Range of the fields in a meta page; the checksum follows.
const META: std::ops::Range<usize> = 16..72;
/// Page size of the seeds in bytes.
const PAGE: usize = 4096;
/// Maximum depth of nested buckets that are read.
const DEPTH: u32 = 6;

pub fn run(input: &[u8]) {
    let mut bytes = spread(input);
    for at in [0, PAGE] {
        seal(&mut bytes, at);
    }
    let (_file, path) = files::file(&bytes);
    let read = bolt::read(&path, |snapshot| {
        let root = snapshot.root();
        let mut found = 0;
        walk(&root, DEPTH, &mut found)?;
        for names in [&[b"v1".as_slice(), b"k8s.io"][..], &[b"v1", b"snapshots"]] {
            snapshot.bucket(names)?;
        }
        Ok::<_, Error>(found)
    });
    errors::checked(read);
}

/// Expands an input into pages. Pages are mostly empty, but inputs should not be: each part begins with two bytes for
/// the page number and two bytes for the length.
fn spread(mut input: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let [page, more, low, high, rest @ ..] = input {
        let at = (usize::from(*page) + usize::from(*more) * 256) % 256 * PAGE;
        let length = (usize::from(*low) + usize::from(*high) * 256).min(rest.len());
        let (part, rest) = rest.split_at(length);
        if bytes.len() < at + PAGE.max(part.len()) {
            bytes.resize(at + PAGE.max(part.len()), 0);
        }
        bytes[at..at + part.len()].copy_from_slice(part);
        input = rest;
    }
    bytes
}

/// Sets the checksum of a meta page (64-bit FNV-1a): a fuzzer does not guess it.
fn seal(bytes: &mut [u8], at: usize) {
    let Some(page) = bytes.get_mut(at..at + META.end + 8) else {
        return;
    };
    let mut sum = 0xcbf2_9ce4_8422_2325_u64;
    for &byte in &page[META] {
        sum = (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    page[META.end..].copy_from_slice(&sum.to_le_bytes());
}

fn walk(bucket: &Bucket<'_>, depth: u32, found: &mut u64) -> Result<(), Error> {
    for (key, value) in bucket.entries()? {
        *found += 1;
        if let Value::Bucket(inner) = value
            && depth > 0
            && *found < 1000
        {
            walk(&inner, depth - 1, found)?;
        }
        bucket.get(&key)?;
    }
    Ok(())
}
