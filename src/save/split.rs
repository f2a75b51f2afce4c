//! Divides large saves into several layers.

use super::cores;
use crate::layer::Plan;

/// Size in tar bytes from which a save is divided into several layers by default, and the size of each: SHA-256 of that
/// much takes one core four seconds, and fewer layers are better for all consumers.
const SPLIT_THRESHOLD: u64 = 8 << 30;
const SPLIT_LAYER_SIZE: u64 = 4 << 30;
/// Number of cores that one core's SHA-256 keeps busy: fewer with a fast codec, more with a thorough one.
const CORES_PER_LAYER: usize = 4;
/// Maximum number of layers that are made concurrently.
const MAX_CONCURRENT_LAYERS: usize = 4;
/// Minimum size of a layer in tar bytes, whatever the number of cores: a sixth of a second of SHA-256.
const MIN_LAYER_SIZE: u64 = 256 << 20;

/// When another layer is begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerSize {
    /// After this many bytes of tar; 0 means never.
    Bytes(u64),
    /// So that as many layers are hashed concurrently as keep this machine's cores busy. The image then differs between
    /// machines with different numbers of cores, so this is not the default.
    ByCores,
}

/// Divides a plan into several layers if that was requested, or if one layer would be very large.
pub(crate) fn split_plan(plan: Plan, layer_size: Option<LayerSize>) -> Vec<Plan> {
    match split_size(plan.tar_size(), layer_size, cores()) {
        Some(size) => plan.split(size),
        None => vec![plan],
    }
}

/// Returns the number of tar bytes after which another layer is begun, or `None` if `tar` bytes are not divided.
fn split_size(tar: u64, layer_size: Option<LayerSize>, cores: usize) -> Option<u64> {
    let usual = (tar > SPLIT_THRESHOLD).then_some(SPLIT_LAYER_SIZE);
    match layer_size {
        Some(LayerSize::Bytes(size)) => (size > 0).then_some(size),
        None => usual,
        Some(LayerSize::ByCores) => {
            let layers = (cores / CORES_PER_LAYER).clamp(1, MAX_CONCURRENT_LAYERS) as u64;
            let size = tar.div_ceil(layers).max(MIN_LAYER_SIZE);
            let size = usual.map_or(size, |usual| usual.min(size));
            (size < tar).then_some(size)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_by_cores_are_as_many_as_cores_keep_busy_and_no_small_ones() {
        let by_cores = |tar, cores| split_size(tar, Some(LayerSize::ByCores), cores);
        for (cores, layers) in [(1, 1), (4, 1), (8, 2), (12, 3), (32, 4), (128, 4)] {
            let tar = 4 << 30;
            let expected = (layers > 1).then(|| u64::div_ceil(tar, layers));
            assert_eq!(by_cores(tar, cores), expected, "{cores} cores");
        }
        assert_eq!(by_cores(600 << 20, 128), Some(256 << 20));
        assert_eq!(by_cores(200 << 20, 128), None);
        assert_eq!(by_cores(40 << 30, 2), Some(SPLIT_LAYER_SIZE));
        // By default the same for any number of cores.
        for cores in [1, 128] {
            assert_eq!(split_size(4 << 30, None, cores), None);
            assert_eq!(split_size(40 << 30, None, cores), Some(SPLIT_LAYER_SIZE));
            assert_eq!(split_size(40 << 30, Some(LayerSize::Bytes(0)), cores), None);
            assert_eq!(split_size(5, Some(LayerSize::Bytes(3)), cores), Some(3));
        }
    }
}
