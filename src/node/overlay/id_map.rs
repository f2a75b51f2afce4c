//! Maps file owners between user namespaces: the IDs on disk are the host's, those in the image are the container's.

/// One line of `/proc/PID/uid_map`: `count` IDs starting at `inside` are mapped to those starting at `outside` on the
/// host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct IdMapping {
    /// First ID as seen in the container.
    pub inside: u32,
    /// First ID as seen on the host (and on disk).
    pub outside: u32,
    /// Number of ids.
    pub count: u32,
}

/// Returns the container's ID for the host's `outside`. An empty map is the identity.
pub fn container_id(map: &[IdMapping], outside: u32) -> Option<u32> {
    if map.is_empty() {
        return Some(outside);
    }
    map.iter().find_map(|m| {
        let offset = outside.checked_sub(m.outside)?;
        if offset < m.count {
            m.inside.checked_add(offset)
        } else {
            None
        }
    })
}

/// Returns the map of a directory that is mounted ID-mapped for a container with `map`: its IDs on disk are the
/// container's, as far as the container has them.
pub fn on_disk_map(map: &[IdMapping]) -> Vec<IdMapping> {
    let stored = |m: &IdMapping| IdMapping {
        outside: m.inside,
        ..*m
    };
    map.iter().map(stored).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_outside_every_range_have_no_inside() {
        let map = [
            IdMapping {
                inside: 0,
                outside: 100_000,
                count: 1000,
            },
            IdMapping {
                inside: 1000,
                outside: 1000,
                count: 1,
            },
        ];
        for (outside, expected) in [
            (100_000, Some(0)),
            (100_999, Some(999)),
            (101_000, None),
            (1000, Some(1000)),
            (0, None),
        ] {
            assert_eq!(container_id(&map, outside), expected, "{outside}");
        }
        assert_eq!(container_id(&[], 7), Some(7));
        let stored = on_disk_map(&map[..1]);
        for (on_disk, expected) in [(0, Some(0)), (999, Some(999)), (1000, None)] {
            assert_eq!(container_id(&stored, on_disk), expected, "{on_disk}");
        }
        assert_eq!(container_id(&super::on_disk_map(&[]), 7), Some(7));
    }
}
