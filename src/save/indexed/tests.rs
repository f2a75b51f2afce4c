use std::io::Write as _;
use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::image::extract::tests::{layers, words};
use crate::image::extract::{self, Extracted, LayerRead};
use crate::layer::Compression;
use crate::layer::codec::tests::noise;
use crate::layer::index::{self, Blocks, Listing};
use crate::layer::sequential::SequentialLayer;

/// An entry's path, kind, length of its headers and size.
type Listed = (Vec<u8>, Kind, u64, u64);

/// A stored layer, and its index if it has one.
struct Stored {
    tar: Vec<u8>,
    blob: Arc<Vec<u8>>,
    index: Option<Arc<Index>>,
    /// Bytes of each request.
    read: Arc<Mutex<Vec<u64>>>,
}

impl Stored {
    fn fetch(&self) -> Fetch {
        let (blob, read) = (Arc::clone(&self.blob), Arc::clone(&self.read));
        Box::new(move |offset, length| {
            read.lock().unwrap().push(length);
            let part = blob[offset as usize..(offset + length) as usize].to_vec();
            Ok(Some(part.into()))
        })
    }
}

/// Lists the entries of a tar; `None` if one has no place in an index.
fn list(tar: &[u8], mut push: impl FnMut(index::Entry<'_>)) -> Option<()> {
    let mut archive = Archive::new(tar);
    let mut entries = Vec::new();
    while let Some(entry) = archive.next_entry().ok()? {
        entries.push(entry);
    }
    let ends = entries.iter().skip(1).map(|entry| entry.offset);
    let ends: Vec<u64> = ends.chain([tar.len() as u64 - END]).collect();
    for (entry, end) in entries.iter().zip(ends) {
        let kind = match entry.kind {
            EntryKind::File => Kind::File,
            EntryKind::Hardlink => Kind::Hardlink,
            EntryKind::Directory => Kind::Directory,
            _ => Kind::Other,
        };
        let link = normalise(&entry.link).ok()?;
        push(index::Entry {
            path: &normalise(&entry.name).ok()?,
            kind,
            header: end - entry.offset - entry.size.next_multiple_of(RECORD),
            size: entry.size,
            link: if kind == Kind::Hardlink { &link } else { b"" },
        });
    }
    Some(())
}

/// A layer of one block with an index, however small it is.
fn small(tar: Vec<u8>, compression: Compression) -> Stored {
    let mut listing = Listing::default();
    let listed = list(&tar, |entry| listing.push(entry));
    let mut codec = crate::layer::codec::Codec::new(compression, 1);
    let block = codec.compress(&tar).unwrap();
    let mut blocks = Blocks::default();
    blocks.push(
        block.len() as u64,
        &crate::common::digest::Digest::of(&block),
    );
    let blob = [compression.head(), &block].concat();
    let end = blob.len() as u64;
    let (bytes, place) = index::make(listing, &blocks, tar.len() as u64, compression, end);
    let index = listed.and_then(|()| Index::parse(&bytes, &place).ok());
    Stored {
        tar,
        blob: Arc::new(blob),
        index: index.map(Arc::new),
        read: Arc::default(),
    }
}

fn find(layers: &[Stored], path: &[u8], indexed: bool) -> Result<Extracted, ExtractError> {
    let mut open = |at: usize, path: Option<&[u8]>| -> LayerRead {
        let layer = &layers[at];
        match (&layer.index, path) {
            (Some(index), Some(path)) if indexed => {
                Ok(super::open(Arc::clone(index), path, layer.fetch()))
            }
            _ => Ok(Box::new(io::Cursor::new(layer.tar.clone()))),
        }
    };
    extract::find(path, layers.len(), &mut open, tempfile::tempfile().unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_found_by_index_is_what_is_found_in_the_whole_layer(
        layers in layers(),
        zstd in any::<bool>(),
        path in prop::sample::select(vec!["a", "b", "a/b", "a/x", "b/x", "a/b/x", "x", "", "a/../b", "x/b", "x/", "a/"]),
    ) {
        let compression = if zstd { Compression::Zstd } else { Compression::Gzip };
        let layers: Vec<Stored> = layers.into_iter().map(|tar| small(tar, compression)).collect();
        let by_index = find(&layers, path.as_bytes(), true);
        match (by_index, find(&layers, path.as_bytes(), false)) {
            (Ok(by_index), Ok(whole)) => prop_assert_eq!(words(&by_index), words(&whole)),
            // Entries that do not concern the path are not read.
            (Err(_), Err(_)) | (Ok(_), Err(ExtractError::Archive(_))) => {}
            (by_index, whole) => prop_assert!(false, "{:?} {:?}", by_index, whole),
        }
    }
}

/// A layer of several blocks with files, links and names whose headers are long.
fn large(compression: Compression) -> Stored {
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |name: &str, kind: u8, link: &str, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_mode(0o640);
        header.set_mtime(1);
        header.set_size(content.len() as u64);
        match link {
            "" => builder.append_data(&mut header, name, content).unwrap(),
            link => builder.append_link(&mut header, name, link).unwrap(),
        }
    };
    add("d/", b'5', "", b"");
    add("d/e/", b'5', "", b"");
    for n in 0..25u64 {
        let name = format!("d/e/{}{n}", "n".repeat(n as usize * 37 % 300));
        add(&name, b'0', "", &noise((n * 57_919 % 200_000) as usize, n));
    }
    add("d/large", b'0', "", &noise(3 << 20, 999));
    add("link", b'2', "d/e", b"");
    add("z", b'1', "d/large", b"");
    add("d/.wh.gone", b'0', "", b"");
    let tar = builder.into_inner().unwrap();
    let mut blob = Vec::new();
    let mut layer = SequentialLayer::new(&mut blob, compression).unwrap();
    list(&tar, |entry| layer.list(entry)).unwrap();
    layer.write_all(&tar).unwrap();
    let place = layer.finish().unwrap().index.unwrap();
    let bytes = &blob[place.offset as usize..];
    let index = Some(Arc::new(Index::parse(bytes, &place).unwrap()));
    let (blob, read) = (Arc::new(blob), Arc::default());
    Stored {
        tar,
        blob,
        index,
        read,
    }
}

#[test]
fn one_file_costs_its_own_blocks() {
    for compression in [Compression::Gzip, Compression::Zstd] {
        let layers = [large(compression)];
        let index = Arc::clone(layers[0].index.as_ref().unwrap());
        for row in index.rows().filter(|row| marked(row.entry.path).is_none()) {
            layers[0].read.lock().unwrap().clear();
            let found = find(&layers, row.entry.path, true).unwrap();
            let whole = find(&layers, row.entry.path, false).unwrap();
            assert_eq!(words(&found), words(&whole));
            assert_eq!(found.path, whole.path);
            if row.entry.kind == Kind::File {
                let end = row.offset + row.entry.header + row.entry.size;
                let blocks = end.div_ceil(BLOCK) - row.offset / BLOCK;
                let read: u64 = layers[0].read.lock().unwrap().iter().sum();
                assert!(read <= blocks * (BLOCK + 1000), "{row:?}: {read}");
            }
        }
        // The index alone says that it is not there, or was removed.
        for path in ["d/e/absent", "d/gone", "absent/x"] {
            layers[0].read.lock().unwrap().clear();
            assert!(matches!(
                find(&layers, path.as_bytes(), true),
                Err(ExtractError::NotFound(_))
            ));
            assert!(layers[0].read.lock().unwrap().is_empty(), "{path}");
        }
        // Blocks that follow each other are one request.
        layers[0].read.lock().unwrap().clear();
        find(&layers, b"", true).unwrap();
        assert_eq!(layers[0].read.lock().unwrap().len(), 1);
    }
}

#[test]
fn a_block_without_its_digest_is_an_error() {
    let mut one = large(Compression::Gzip);
    one.blob = Arc::new(vec![0; one.blob.len()]);
    let error = find(&[one], b"d/large", true).unwrap_err().to_string();
    assert!(error.contains("the copy of a layer is damaged"), "{error}");
}

#[test]
fn an_index_that_is_wrong_about_an_entry_is_an_error() {
    let rows = [("a/", b'5', ""), ("a/x", b'0', "one"), ("a/y", b'0', "two")];
    let mut builder = tar::Builder::new(Vec::new());
    for (name, kind, content) in rows {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_size(content.len() as u64);
        builder
            .append_data(&mut header, name, content.as_bytes())
            .unwrap();
    }
    let tar = builder.into_inner().unwrap();
    let compression = Compression::Gzip;
    let block = crate::layer::codec::Codec::new(compression, 1)
        .compress(&tar)
        .unwrap();
    let mut blocks = Blocks::default();
    blocks.push(
        block.len() as u64,
        &crate::common::digest::Digest::of(&block),
    );
    let lie = |change: &dyn Fn(&mut Vec<Listed>)| {
        let mut entries: Vec<Listed> = Vec::new();
        list(&tar, |e| {
            entries.push((e.path.to_vec(), e.kind, e.header, e.size));
        })
        .unwrap();
        change(&mut entries);
        let mut listing = Listing::default();
        for (path, kind, header, size) in &entries {
            let (kind, header, size) = (*kind, *header, *size);
            listing.push(index::Entry {
                path,
                kind,
                header,
                size,
                link: b"",
            });
        }
        let blob = [compression.head(), &block].concat();
        let end = blob.len() as u64;
        let (bytes, place) = index::make(listing, &blocks, tar.len() as u64, compression, end);
        let index = Some(Arc::new(Index::parse(&bytes, &place).unwrap()));
        let (tar, blob, read) = (tar.clone(), Arc::new(blob), Arc::default());
        find(
            &[Stored {
                tar,
                blob,
                index,
                read,
            }],
            b"a/x",
            true,
        )
    };
    assert!(lie(&|_| {}).is_ok());
    // One file under the name of another.
    let swapped = lie(&|entries| {
        entries[1].0 = b"a/y".to_vec();
        entries[2].0 = b"a/x".to_vec();
    });
    assert!(
        swapped
            .unwrap_err()
            .to_string()
            .contains("is wrong about /a/x")
    );
    // A header that reaches into the content, another size, another type.
    for (header, size) in [(1024, 0), (512, 4), (512, 1)] {
        let found = lie(&|entries| (entries[1].2, entries[1].3) = (header, size));
        assert!(found.is_err(), "{header} {size}");
    }
    // Headers that reach over the entry that follows.
    let over = lie(&|entries| {
        let next = entries.remove(2);
        entries[1].2 += next.2 + next.3.next_multiple_of(512);
    });
    assert!(
        over.unwrap_err()
            .to_string()
            .contains("is wrong about /a/x")
    );
    assert!(
        lie(&|entries| {
            entries[1].1 = Kind::Other;
            (entries[1].2, entries[1].3) = (1024, 0);
        })
        .is_err()
    );
}

#[test]
fn an_index_outside_its_layer_is_not_asked_for() {
    let nothing = crate::common::digest::Digest::of("");
    for place in ["0+0", "100+0", "90+11", "101+1", "18446744073709551615+1"] {
        let mut descriptor = Descriptor::new(
            oci_spec::image::MediaType::ImageLayerGzip,
            100,
            nothing
                .to_string()
                .parse::<oci_spec::image::Digest>()
                .unwrap(),
        );
        let annotation = (ANNOTATION.to_owned(), format!("{place} {nothing}"));
        descriptor.set_annotations(Some([annotation].into()));
        let mut fetch: Fetch = Box::new(|_, _| unreachable!("it is asked for"));
        let found = load(&descriptor, &mut fetch);
        assert!(matches!(found, Err(NoIndex::Unusable(_))), "{place}");
    }
}
