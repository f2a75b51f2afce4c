//! Fuzzes text from the kernel that a tenant controls: mount tables, overlay options, attribute values.

use std::os::unix::ffi::OsStrExt as _;

use upperdeck::node::overlay::id_map::{IdMapping, container_id, on_disk_map};
use upperdeck::node::overlay::mount::OverlayOptions;
use upperdeck::node::overlay::xattr::{
    Namespace, XattrAction, acl_inside, capability_inside, classify, classify_plain,
};
use upperdeck::node::procfs::{MountInfo, parse_mountinfo, root_mount};

use crate::errors;
use crate::files::selected;

pub fn run(input: &[u8]) {
    let (selector, rest) = selected(input);
    match selector % 3 {
        0 => mounts(rest),
        1 => options(rest),
        _ => attributes(rest),
    }
}

fn mounts(text: &[u8]) {
    let Some(mounts) = errors::checked(parse_mountinfo(text)) else {
        return;
    };
    if let Some(root) = root_mount(&mounts) {
        assert_eq!(root.mount_point, std::path::Path::new("/"));
    }
    let printed: Vec<u8> = mounts.iter().flat_map(line).collect();
    let again = parse_mountinfo(&printed).expect("what was printed as the kernel prints it");
    assert_eq!(again, mounts);
    for mount in mounts.iter().filter(|mount| mount.fs_type == "overlay") {
        options(&mount.super_options);
    }
}

/// Formats a mount as `fs/proc_namespace.c` does.
fn line(mount: &MountInfo) -> Vec<u8> {
    let (major, minor) = mount.device;
    let mut out = format!("{} {} {major}:{minor} ", mount.id, mount.parent).into_bytes();
    escape(mount.root.as_os_str().as_bytes(), &mut out);
    out.push(b' ');
    escape(mount.mount_point.as_os_str().as_bytes(), &mut out);
    let access = if mount.writable { "rw" } else { "ro" };
    out.extend(format!(" {access} shared:1 - ").bytes());
    escape(mount.fs_type.as_bytes(), &mut out);
    out.push(b' ');
    escape(mount.source.as_bytes(), &mut out);
    out.push(b' ');
    out.extend(&mount.super_options);
    out.push(b'\n');
    out
}

fn escape(text: &[u8], out: &mut Vec<u8>) {
    for &byte in text {
        match byte {
            b' ' | b'\t' | b'\n' | b'\\' | b'#' | b',' | b'=' => {
                out.extend(format!("\\{byte:03o}").bytes());
            }
            _ => out.push(byte),
        }
    }
}

fn options(text: &[u8]) {
    let Some(options) = errors::checked(OverlayOptions::parse(text)) else {
        return;
    };
    assert!(!options.lowers.is_empty() && !options.upper.is_empty());
    assert!(options.lowers.len() + options.data_only.len() <= 500);
    // Printed with `lowerdir+` and `datadir+`, which take paths without escapes.
    let mut printed = Vec::new();
    let lists = [
        ("lowerdir+", &options.lowers),
        ("datadir+", &options.data_only),
    ];
    for (name, paths) in lists {
        for path in paths {
            printed.extend(name.bytes());
            printed.push(b'=');
            escape(path.as_os_str().as_bytes(), &mut printed);
            printed.push(b',');
        }
    }
    printed.extend(b"upperdir=/u");
    let again = OverlayOptions::parse(&printed).expect("what was printed as the kernel prints it");
    assert_eq!(again.lowers, options.lowers);
    assert_eq!(again.data_only, options.data_only);
    // No path exists: the error must say that, and no more.
    let nowhere = |_: &std::path::Path| Err(std::io::ErrorKind::NotFound.into());
    let bases = ["/a".into(), "/b".into()];
    errors::check(&options.locate_upper(&bases, &nowhere).expect_err("nothing"));
    errors::check(
        &options
            .locate_lowers(&bases, &nowhere)
            .expect_err("nothing"),
    );
}

fn attributes(input: &[u8]) {
    let (length, rest) = selected(input);
    let (name, value) = rest.split_at(usize::from(length).min(rest.len()));
    for namespace in [Namespace::Trusted, Namespace::User] {
        if let XattrAction::Keep(kept) = classify(name, namespace) {
            assert!(!kept.contains(&b'='), "a pax record ends its keyword there");
            assert!(
                !kept.starts_with(b"trusted.") || name.starts_with(b"trusted.overlay.overlay.")
            );
        }
    }
    if let XattrAction::Keep(kept) = classify_plain(name) {
        assert_eq!(&*kept, name);
    }
    let map = [
        IdMapping {
            inside: 0,
            outside: 100_000,
            count: 65_536,
        },
        IdMapping {
            inside: u32::MAX - 1,
            outside: 7,
            count: u32::MAX,
        },
    ];
    let own = on_disk_map(&map);
    for map in [&map[..], &own, &[]] {
        let id = |id| container_id(map, id);
        if let Some(inside) = errors::checked(capability_inside(value, id)) {
            assert!(inside.len() <= value.len());
        }
        if let Some(inside) = errors::checked(acl_inside(value, id, id)) {
            assert_eq!(inside.len(), value.len());
        }
    }
}
