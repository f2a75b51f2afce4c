//! Names in archives and paths in trees, which have no leading and no trailing slash.

/// Removes leading, trailing and repeated slashes and `.` from a name.
pub(crate) fn normalise(name: &[u8]) -> Result<Vec<u8>, &'static str> {
    let mut path = Vec::with_capacity(name.len());
    for component in name.split(|&b| b == b'/') {
        match component {
            b"" | b"." => {}
            b".." => return Err("names with .. are refused"),
            _ => {
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(component);
            }
        }
    }
    Ok(path)
}

/// Splits a path into its parent and last component.
pub(crate) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&b| b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

/// Joins two parts to `parent/base`, without a leading slash.
pub(crate) fn join(parent: &[u8], base: &[u8]) -> Vec<u8> {
    if parent.is_empty() {
        base.to_vec()
    } else {
        [parent, b"/", base].concat()
    }
}
