//! Fuzzes the readers of the files in which package managers record packages, which a container controls.

use upperdeck::image::packages::{Installed, Packages, layers, metadata_file};

use crate::files::selected;
use crate::{archives, errors};

/// One path for each kind of file.
const PATHS: [&[u8]; 9] = [
    b"usr/lib/python3.11/site-packages/x-1.dist-info/METADATA",
    b"usr/lib/python3.11/site-packages/x-1.dist-info/INSTALLER",
    b"opt/conda/conda-meta/x-1-0.json",
    b"usr/local/lib/R/site-library/x/DESCRIPTION",
    b"usr/lib/node_modules/x/package.json",
    b"var/lib/dpkg/status",
    b"var/lib/dpkg/status.d/x",
    b"lib/apk/db/installed",
    b"var/lib/rpm/rpmdb.sqlite",
];

pub fn run(input: &[u8]) {
    let (selector, rest) = selected(input);
    let mut installed = Installed::default();
    match selector % 12 {
        // The rest is a layer.
        9 | 10 => {
            let read = layers::apply(&mut installed, &archives::sealed(rest)[..]);
            if errors::checked(read).is_none() {
                return;
            }
        }
        // The rest is a path and the content behind it.
        11 => {
            let end = rest.iter().position(|&b| b == 0).unwrap_or(rest.len());
            let (path, content) = rest.split_at(end);
            let Some(file) = metadata_file(path) else {
                return;
            };
            installed.add(path, file, content.get(1..).unwrap_or_default(), false);
        }
        kind => {
            let path = PATHS[usize::from(kind)];
            let file = metadata_file(path).expect("a path of such a file");
            installed.add(path, file, rest, selector >= 128);
        }
    }
    check(&installed);
}

/// Checks what is promised of every list.
fn check(installed: &Installed) {
    let nothing = Installed::default();
    let all = Packages::between(&nothing, installed);
    let gone = Packages::between(installed, &nothing);
    assert_eq!(all.packages.len(), gone.packages.len());
    assert_eq!(Packages::between(installed, installed).packages, []);
    for package in &all.packages {
        let versions = package.version.iter().chain(&package.previous);
        for text in versions.chain([&package.name, &package.location]) {
            assert!(!text.chars().any(char::is_control), "{text:?}");
        }
        assert!(!package.name.is_empty() && package.name.len() <= 256);
    }
    for unread in &all.unread {
        let texts = [&unread.path, &unread.reason];
        assert!(texts.iter().all(|text| !text.chars().any(char::is_control)));
    }
    assert_eq!(all.since(&all).packages, []);
    assert_eq!(all.since(&Packages::default()).packages, all.packages);
    let few = all.clone().limited(1, 1 << 20);
    assert_eq!(
        few.packages.len() as u64 + few.more,
        all.packages.len() as u64
    );
}
