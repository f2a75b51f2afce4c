use proptest::prelude::*;

use std::collections::HashMap;

use super::*;
use crate::common::digest::Digest;

type Row = (&'static str, u8, &'static str);

fn tar(rows: &[Row]) -> Vec<u8> {
    let mut out = Vec::new();
    for (number, (name, kind, text)) in rows.iter().enumerate() {
        let mut header = tar::Header::new_ustar();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(tar::EntryType::new(*kind));
        header.set_mode(0o600 + number as u32);
        header.set_uid(number as u64);
        header.set_gid(7);
        header.set_mtime(1);
        let content = if *kind == b'0' { text.as_bytes() } else { b"" };
        if *kind != b'0' {
            header.as_old_mut().linkname[..text.len()].copy_from_slice(text.as_bytes());
        }
        header.set_size(content.len() as u64);
        header.set_cksum();
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(content);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

fn run(layers: &[Vec<u8>], path: &str) -> Result<Extracted, ExtractError> {
    let mut open = |at: usize, _: Option<&[u8]>| -> LayerRead {
        Ok(Box::new(io::Cursor::new(layers[at].clone())))
    };
    find(
        path.as_bytes(),
        layers.len(),
        &mut open,
        tempfile::tempfile().unwrap(),
    )
}

/// What was found in words: metadata, first names of hard links, contents.
pub(crate) fn words(found: &Extracted) -> Vec<String> {
    use std::os::unix::fs::FileExt as _;
    let mut first: HashMap<u64, &[u8]> = HashMap::new();
    let members = found
        .members
        .iter()
        .filter(|(path, _)| !path.is_empty() || found.members.len() == 1);
    members
        .map(|(path, Member { node, at })| {
            let mut content = vec![0; node.size as usize];
            found.spool.read_exact_at(&mut content, *at).unwrap();
            assert!(
                node.content
                    .is_none_or(|digest| digest == Digest::of(&content))
            );
            let leader = first.entry(node.inode).or_insert(path);
            format!(
                "{} {:?} {:o} {} {:?} {:?} {}",
                vis::encode(path),
                node.kind,
                if node.implicit { 0 } else { node.mode },
                node.uid,
                node.target,
                String::from_utf8_lossy(&content),
                vis::encode(leader),
            )
        })
        .collect()
}

fn row() -> impl Strategy<Value = Row> {
    let names = vec![
        "a/",
        "b/",
        "a/b/",
        "a",
        "b",
        "a/x",
        "b/x",
        "a/b/x",
        "a/b/y",
        ".wh.a",
        ".wh.b",
        "a/.wh.b",
        "a/.wh.x",
        "a/.wh..wh..opq",
        ".wh..wh..opq",
        "x",
        "./",
        "b/.wh..wh..opq",
    ];
    let texts = vec![
        "", "one", "two", "a", "b", "a/x", "../b", "/a", "a/b", "x", "..",
    ];
    (
        prop::sample::select(names),
        prop::sample::select(b"0000012".to_vec()),
        prop::sample::select(texts),
    )
        .prop_map(|(name, kind, text)| {
            if name.ends_with('/') {
                (name, b'5', "")
            } else if name.contains(".wh.") {
                (name, b'0', "")
            } else {
                (name, kind, text)
            }
        })
}

/// A layer as engines make them: sorted, with all parents.
fn orderly(mut rows: Vec<Row>) -> Vec<Row> {
    for parent in ["a/", "a/b/", "b/"] {
        let below = |name: &str| name.starts_with(parent) && name != parent;
        if rows.iter().any(|row| below(row.0)) {
            rows.push((parent, b'5', ""));
        }
    }
    rows.sort_by_key(|row| {
        (
            row.0.trim_end_matches('/').replace('/', "\0"),
            row.1 != b'5',
        )
    });
    rows.dedup_by_key(|row| row.0.trim_end_matches('/'));
    rows
}

/// The layers of an image as engines make them, or in any order and with anything in them.
pub(crate) fn layers() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let layer = (prop::collection::vec(row(), 0..7), any::<bool>());
    prop::collection::vec(layer, 1..4).prop_map(|layers| {
        let tar_of = |(rows, order)| tar(&if order { orderly(rows) } else { rows });
        layers.into_iter().map(tar_of).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_found_is_what_an_unpacker_makes(
        layers in layers(),
        path in prop::sample::select(vec!["a", "b", "a/b", "a/x", "b/x", "a/b/x", "x", "", "a/../b", "/b/./x", "x/b", "x/", "a/", "b/.", "a/b/.."]),
    ) {
        let mut open = |at: usize| -> LayerRead { Ok(Box::new(io::Cursor::new(layers[at].clone()))) };
        let spool = Spool::new(tempfile::tempfile().unwrap());
        let exact = applied::find(path.trim_start_matches('/').as_bytes(), layers.len(), &mut open, spool, 0);
        let found = run(&layers, path);
        match (found, exact) {
            (Ok(found), Ok(exact)) => prop_assert_eq!(words(&found), words(&exact)),
            // Lower layers that cannot be applied are not read.
            (Err(_), Err(_)) | (Ok(_), Err(ExtractError::Archive(_))) => {}
            (found, exact) => prop_assert!(false, "{:?} {:?}", found, exact),
        }
    }
}

#[test]
fn a_hard_link_of_a_directory_to_itself_changes_nothing() -> Result<(), ExtractError> {
    let layers = [
        tar(&[("a/", b'5', ""), ("a/b/", b'5', "")]),
        tar(&[("a", b'1', "a")]),
    ];
    let found = run(&layers, "a/b")?;
    assert!(words(&found).join("\n").contains("Directory"));
    Ok(())
}

#[test]
fn no_layer_is_read_below_the_one_that_decides() -> Result<(), ExtractError> {
    let base = tar(&[
        ("etc/", b'5', ""),
        ("etc/a", b'0', "base"),
        ("etc/b", b'0', "base"),
        ("e", b'2', "etc"),
    ]);
    let middle = tar(&[
        ("etc/", b'5', ""),
        ("etc/.wh.b", b'0', ""),
        ("etc/a", b'0', "new"),
    ]);
    let top = tar(&[("var/", b'5', ""), ("var/x", b'0', "top")]);
    let layers = [base, middle, top];
    for (path, read, content) in [
        ("/var/x", 1, "top"),
        ("etc/a", 2, "new"),
        ("e/a", 5, "new"),
        ("e", 3, ""),
    ] {
        let found = run(&layers, path)?;
        let text = words(&found).join("\n");
        assert_eq!(found.layers_read, read, "{path}: {text}");
        assert!(text.contains(&format!("{content:?}")), "{path}: {text}");
    }
    assert!(matches!(
        run(&layers, "etc/b"),
        Err(ExtractError::NotFound(_))
    ));
    assert!(matches!(
        run(&layers, "etc/a/b"),
        Err(ExtractError::Path { .. } | ExtractError::NotFound(_))
    ));
    Ok(())
}
