//! Computes the fastest possible save on a node from the cost of each stage, and the flags that follow. Pure
//! arithmetic.
//!
//! The model: a save scans the tree and plans the tar, and no byte can be produced before that is done. Then everything
//! happens at once on all cores: workers read, compute checksums and compress; the tar is hashed; the compressed bytes
//! are hashed and delivered. No save can be faster than
//!
//! - the CPU time of all of this together, divided by the number of cores;
//! - the workers' share of it, divided by the number of workers, if `--jobs` permits fewer workers than cores;
//! - the one part that cannot be divided, SHA-256 over the tar of a layer on one core (with `--layer-size`, four layers
//!   of equal size at a time);
//! - the destination, with the same bytes available from the start.
//!
//! The slowest of the four is the limit. For it to be a true lower bound, the assumptions favour the node: nothing
//! waits for anything else, planning uses all cores, and no stage disturbs the caches of another, except for the stages
//! that a worker runs in sequence (they are measured that way). The CPU time of a registry on the same machine counts
//! as CPU time of the delivery.

/// The cost of each stage in a save of a given tree, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub(crate) struct Costs {
    /// CPU time of the scan.
    pub(crate) scan: f64,
    /// CPU time of planning the tar.
    pub(crate) plan: f64,
    /// CPU time of reading files and writing headers.
    pub(crate) read: f64,
    /// CPU time of the checksum over the tar (gzip).
    pub(crate) checksum: f64,
    /// CPU time of the codec.
    pub(crate) compress: f64,
    /// Time of SHA-256 over the tar on one core.
    pub(crate) hash_tar: f64,
    /// Time of SHA-256 over the compressed bytes on one core.
    pub(crate) hash_compressed: f64,
    /// CPU time of this program for delivering the compressed bytes.
    pub(crate) hand_on: f64,
    /// CPU time of a registry on this machine for receiving them.
    pub(crate) registry: f64,
    /// Wall time of delivering them, without other stages.
    pub(crate) hand_on_wall: f64,
}

impl Costs {
    /// Returns the CPU time before the first byte can be produced.
    pub(crate) fn before(&self) -> f64 {
        self.scan + self.plan
    }

    /// Returns the CPU time that the workers share.
    pub(crate) fn workers(&self) -> f64 {
        self.read + self.checksum + self.compress
    }

    /// Returns the CPU time of everything after the first byte.
    pub(crate) fn stream(&self) -> f64 {
        self.workers() + self.hash_tar + self.hash_compressed + self.hand_on + self.registry
    }
}

/// The resources of a save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Resources {
    /// Number of cores that this process may use.
    pub(crate) cores: usize,
    /// Number of workers.
    pub(crate) jobs: usize,
    /// Number of layers, of which at most [`MAX_CONCURRENT_LAYERS`] are hashed concurrently.
    pub(crate) layers: usize,
}

/// Number of layers that a save creates concurrently.
pub(crate) const MAX_CONCURRENT_LAYERS: usize = 4;

/// The resource that limits a save.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Bound {
    /// All cores are busy.
    Cores,
    /// All workers are busy, and there are fewer of them than cores.
    Jobs,
    /// SHA-256 over the tar keeps one core busy.
    Sha256,
    /// The destination accepts no more data.
    Destination,
}

/// The lower bound on the duration of a save.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub(crate) struct Limit {
    /// Shortest possible duration in seconds.
    pub(crate) seconds: f64,
    /// The limiting resource.
    pub(crate) bound_by: Bound,
    /// Seconds before the first byte.
    pub(crate) before: f64,
    /// Seconds that all cores need for the rest.
    pub(crate) cores: f64,
    /// Seconds that the workers need for their share.
    pub(crate) jobs: f64,
    /// Seconds of SHA-256 over the tar, one core per layer.
    pub(crate) sha256: f64,
    /// Seconds that the destination needs.
    pub(crate) destination: f64,
}

impl Limit {
    /// Computes the limit for the given costs.
    pub(crate) fn of(costs: &Costs, resources: Resources) -> Self {
        let cores = resources.cores.max(1) as f64;
        let workers = resources.jobs.clamp(1, resources.cores.max(1)) as f64;
        let before = costs.before() / workers;
        let parts = [
            (Bound::Cores, costs.stream() / cores),
            (Bound::Jobs, costs.workers() / workers),
            (
                Bound::Sha256,
                costs.hash_tar / resources.layers.clamp(1, MAX_CONCURRENT_LAYERS) as f64,
            ),
            (Bound::Destination, costs.hand_on_wall),
        ];
        // Of equal parts the first is taken, so the cores precede what depends on them.
        let (bound_by, longest) =
            parts.into_iter().fold(
                parts[0],
                |most, part| if part.1 > most.1 { part } else { most },
            );
        Self {
            seconds: before + longest,
            bound_by,
            before,
            cores: parts[0].1,
            jobs: parts[1].1,
            sha256: parts[2].1,
            destination: parts[3].1,
        }
    }
}

/// Returns the number of workers beyond which more would only wait for the hash or the destination, or that of the
/// cores if they are the limit.
pub(crate) fn enough_jobs(costs: &Costs, resources: Resources) -> usize {
    let limit = Limit::of(
        costs,
        Resources {
            jobs: resources.cores,
            ..resources
        },
    );
    let slowest = limit.sha256.max(limit.destination);
    if limit.bound_by == Bound::Cores || slowest <= 0.0 {
        return resources.cores;
    }
    // A reserve of a tenth, so that a late worker does not delay all others.
    let jobs = (1.1 * costs.workers() / slowest).ceil() as usize;
    jobs.clamp(1, resources.cores.max(1))
}

/// Returns the number of concurrent layers at which hashing is no longer the limit, or 1 if it never is.
pub(crate) fn enough_layers(costs: &Costs, resources: Resources) -> usize {
    let limit = Limit::of(
        costs,
        Resources {
            layers: 1,
            ..resources
        },
    );
    if limit.bound_by != Bound::Sha256 {
        return 1;
    }
    let next = limit.cores.max(limit.jobs).max(limit.destination);
    if next <= 0.0 {
        return MAX_CONCURRENT_LAYERS;
    }
    ((costs.hash_tar / next).ceil() as usize).clamp(2, MAX_CONCURRENT_LAYERS)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Approximate costs of gzip level 4 for a gigabyte on two cores.
    const GZIP: Costs = Costs {
        scan: 0.1,
        plan: 0.1,
        read: 0.5,
        checksum: 0.1,
        compress: 14.0,
        hash_tar: 0.7,
        hash_compressed: 0.2,
        hand_on: 0.2,
        registry: 0.3,
        hand_on_wall: 0.5,
    };

    fn resources(cores: usize, jobs: usize) -> Resources {
        Resources {
            cores,
            jobs,
            layers: 1,
        }
    }

    fn near(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-9, "{found} is not {expected}");
    }

    #[test]
    fn few_cores_bind() {
        let limit = Limit::of(&GZIP, resources(2, 2));
        assert_eq!(limit.bound_by, Bound::Cores);
        near(limit.before, 0.1);
        near(limit.seconds, 0.1 + 16.0 / 2.0);
        // With one worker on one core, the sum of all costs.
        near(Limit::of(&GZIP, resources(1, 1)).seconds, 16.2);
    }

    #[test]
    fn fewer_workers_than_cores_bind() {
        let limit = Limit::of(&GZIP, resources(8, 2));
        assert_eq!(limit.bound_by, Bound::Jobs);
        near(limit.seconds, 0.1 + 14.6 / 2.0);
        // More workers than cores have no effect.
        near(
            Limit::of(&GZIP, resources(2, 64)).seconds,
            Limit::of(&GZIP, resources(2, 2)).seconds,
        );
    }

    #[test]
    fn on_many_cores_the_hash_binds_until_there_are_layers() {
        let limit = Limit::of(&GZIP, resources(64, 64));
        assert_eq!(limit.bound_by, Bound::Sha256);
        near(limit.sha256, 0.7);
        assert_eq!(enough_layers(&GZIP, resources(64, 64)), 2);
        let cut = Limit::of(
            &GZIP,
            Resources {
                layers: 2,
                ..resources(64, 64)
            },
        );
        assert_eq!(cut.bound_by, Bound::Destination);
        assert_eq!(enough_jobs(&GZIP, resources(64, 64)), 23);
        // If the cores are the limit, nothing can be gained.
        assert_eq!(enough_layers(&GZIP, resources(2, 2)), 1);
        assert_eq!(enough_jobs(&GZIP, resources(2, 2)), 2);
    }

    #[test]
    fn a_slow_destination_binds() {
        let slow = Costs {
            hand_on_wall: 60.0,
            ..GZIP
        };
        let limit = Limit::of(&slow, resources(8, 8));
        assert_eq!(limit.bound_by, Bound::Destination);
        near(limit.seconds, 0.2 / 8.0 + 60.0);
        assert_eq!(enough_jobs(&slow, resources(8, 8)), 1);
        assert_eq!(enough_layers(&slow, resources(8, 8)), 1);
    }

    #[test]
    fn nothing_costs_nothing() {
        let limit = Limit::of(&Costs::default(), resources(0, 0));
        near(limit.seconds, 0.0);
        assert_eq!(enough_jobs(&Costs::default(), resources(4, 4)), 4);
        assert_eq!(enough_layers(&Costs::default(), resources(4, 4)), 1);
    }
}
