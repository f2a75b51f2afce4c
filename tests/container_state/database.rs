//! Writes bbolt databases: one leaf page with buckets inside buckets, as large as needed.

use std::collections::BTreeMap;

use upperdeck::node::container::bolt::{Bucket, Error, Value};

const PAGE: usize = 4096;
const PAGE_HEADER: usize = 16;
const ELEMENT: usize = 16;
const LEAF: u16 = 2;
const META: u16 = 4;
const FREELIST: u16 = 16;
/// Flag of a leaf element that is a bucket.
const IS_BUCKET: u32 = 1;

/// A value, or a bucket of values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    Value(Vec<u8>),
    Bucket(BTreeMap<Vec<u8>, Node>),
}

impl Node {
    /// Reads a whole bucket.
    pub fn read(bucket: &Bucket<'_>) -> Result<Self, Error> {
        let mut entries = BTreeMap::new();
        for (key, value) in bucket.entries()? {
            let value = match value {
                Value::Bytes(bytes) => Self::Value(bytes),
                Value::Bucket(inner) => Self::read(&inner)?,
            };
            entries.insert(key, value);
        }
        Ok(Self::Bucket(entries))
    }

    /// Returns the bucket at `path`, made if it is not there.
    ///
    /// # Panics
    /// If there is a value in its place.
    pub fn bucket(&mut self, path: &[&[u8]]) -> &mut BTreeMap<Vec<u8>, Self> {
        let Self::Bucket(entries) = self else {
            panic!("a value in place of a bucket");
        };
        match path {
            [] => entries,
            [first, rest @ ..] => entries
                .entry(first.to_vec())
                .or_insert_with(|| Self::Bucket(BTreeMap::new()))
                .bucket(rest),
        }
    }

    /// Returns the file of a database with this as its root bucket.
    pub fn file(&self) -> Vec<u8> {
        let Self::Bucket(entries) = self else {
            panic!("a value in place of the root");
        };
        let mut leaf = page(3, LEAF, entries);
        let pages = leaf.len().div_ceil(PAGE);
        leaf.resize(pages * PAGE, 0);
        leaf[12..16].copy_from_slice(&(pages as u32 - 1).to_le_bytes());
        let mut file: Vec<u8> = (0..2)
            .flat_map(|txid| meta(txid, 3 + pages as u64))
            .collect();
        let mut freelist = page(2, FREELIST, &BTreeMap::new());
        freelist.resize(PAGE, 0);
        file.extend(freelist);
        file.extend(leaf);
        file
    }
}

fn page(id: u64, flags: u16, entries: &BTreeMap<Vec<u8>, Node>) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(id.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend((entries.len() as u16).to_le_bytes());
    bytes.extend(0_u32.to_le_bytes());
    let mut data = Vec::new();
    for (at, (key, node)) in entries.iter().enumerate() {
        let (flags, value) = match node {
            Node::Value(value) => (0, value.clone()),
            // The root page number 0 and a sequence number, then the page itself.
            Node::Bucket(inner) => (IS_BUCKET, [vec![0; 16], page(0, LEAF, inner)].concat()),
        };
        // From the start of this element to its key.
        let position = (entries.len() - at) * ELEMENT + data.len();
        for field in [flags, position as u32, key.len() as u32, value.len() as u32] {
            bytes.extend(field.to_le_bytes());
        }
        data.extend_from_slice(key);
        data.extend(value);
    }
    bytes.extend(data);
    bytes
}

fn meta(txid: u64, pages: u64) -> Vec<u8> {
    let mut bytes = page(txid, META, &BTreeMap::new());
    bytes.extend(0xED0C_DAED_u32.to_le_bytes());
    bytes.extend(2_u32.to_le_bytes());
    bytes.extend((PAGE as u32).to_le_bytes());
    bytes.extend(0_u32.to_le_bytes());
    // Root page and its sequence number, free list, number of pages, transaction.
    for field in [3, 0, 2, pages, txid] {
        bytes.extend(field.to_le_bytes());
    }
    let mut sum = 0xcbf2_9ce4_8422_2325_u64;
    for byte in &bytes[PAGE_HEADER..] {
        sum = (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    bytes.extend(sum.to_le_bytes());
    bytes.resize(PAGE, 0);
    bytes
}
