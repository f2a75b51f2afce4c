//! The fastest that a node can save, from what each stage costs alone; and which flags follow. Pure arithmetic.
//!
//! The model. A save walks the tree and lays the tar out; before that is done not one byte can be made. Then everything
//! happens at once, on all cores: workers read, make checksums and compress, the tar is hashed, the compressed bytes
//! are hashed and handed on. No save can be faster than
//!
//! - the processor time of all of this together, divided by the cores;
//! - the workers' part of it, divided by the workers, where `--jobs` lets fewer work than there are cores;
//! - the one thing that cannot be divided, one core's SHA-256 over the tar of a layer (with `--layer-size`, four at a time, of one size);
//! - the destination, with the same bytes at hand from the start.
//!
//! The slowest of the four binds. What is assumed in favour of the node, so that the limit is one: nothing waits for
//! anything else, the layout is done on all cores, and no stage disturbs another's caches but those that a worker does
//! one after the other (they are measured so). What a registry on the same machine takes of the cores counts as
//! processor time of handing on.

/// What a save of a certain tree costs, stage by stage, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Costs {
    /// Processor time of the walk.
    pub scan: f64,
    /// Processor time of laying the tar out.
    pub plan: f64,
    /// Processor time of reading files and writing headers.
    pub read: f64,
    /// Processor time of the checksum over the tar (gzip).
    pub checksum: f64,
    /// Processor time of the codec.
    pub compress: f64,
    /// One core's time for SHA-256 over the tar.
    pub hash_tar: f64,
    /// One core's time for SHA-256 over the compressed bytes.
    pub hash_compressed: f64,
    /// This program's processor time of handing the compressed bytes on.
    pub hand_on: f64,
    /// Processor time of a registry on this machine for them.
    pub registry: f64,
    /// Time on the wall of handing them on, alone.
    pub hand_on_wall: f64,
}

impl Costs {
    /// Processor time before the first byte can be made.
    pub fn before(&self) -> f64 {
        self.scan + self.plan
    }

    /// Processor time that workers share.
    pub fn workers(&self) -> f64 {
        self.read + self.checksum + self.compress
    }

    /// Processor time of everything after the first byte.
    pub fn stream(&self) -> f64 {
        self.workers() + self.hash_tar + self.hash_compressed + self.hand_on + self.registry
    }
}

/// Who works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hands {
    /// Cores that this process may use.
    pub cores: usize,
    /// Workers.
    pub jobs: usize,
    /// Layers; no more than [`SIDE_BY_SIDE`] are hashed at once.
    pub layers: usize,
}

/// Layers that a save makes at once.
pub const SIDE_BY_SIDE: usize = 4;

/// What no save can get past.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// All cores are busy.
    Cores,
    /// All workers are, and there are fewer than cores.
    Jobs,
    /// One core hashes the tar.
    Sha256,
    /// The destination takes no more.
    Destination,
}

/// The limit of a save.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Limit {
    /// The fastest possible, in seconds.
    pub seconds: f64,
    /// What binds.
    pub bound_by: Bound,
    /// Seconds before the first byte.
    pub before: f64,
    /// Seconds that all cores need for the rest.
    pub cores: f64,
    /// Seconds that the workers need for their part.
    pub jobs: f64,
    /// Seconds of SHA-256 over the tar, one core a layer.
    pub sha256: f64,
    /// Seconds that the destination needs.
    pub destination: f64,
}

impl Limit {
    /// Of a save with these costs.
    pub fn of(costs: &Costs, hands: Hands) -> Self {
        let cores = hands.cores.max(1) as f64;
        let workers = hands.jobs.clamp(1, hands.cores.max(1)) as f64;
        let before = costs.before() / workers;
        let parts = [
            (Bound::Cores, costs.stream() / cores),
            (Bound::Jobs, costs.workers() / workers),
            (
                Bound::Sha256,
                costs.hash_tar / hands.layers.clamp(1, SIDE_BY_SIDE) as f64,
            ),
            (Bound::Destination, costs.hand_on_wall),
        ];
        // The first of equals: cores before what follows from them.
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

/// Workers beyond which more only wait for the hash or the destination; all of `hands` where the cores bind.
pub fn enough_jobs(costs: &Costs, hands: Hands) -> usize {
    let limit = Limit::of(
        costs,
        Hands {
            jobs: hands.cores,
            ..hands
        },
    );
    let slowest = limit.sha256.max(limit.destination);
    if limit.bound_by == Bound::Cores || slowest <= 0.0 {
        return hands.cores;
    }
    // A tenth more: a worker that is late must not hold everybody up.
    let jobs = (1.1 * costs.workers() / slowest).ceil() as usize;
    jobs.clamp(1, hands.cores.max(1))
}

/// Layers side by side at which the hash binds no more, and the cores or the destination do; 1 where it never did.
pub fn enough_layers(costs: &Costs, hands: Hands) -> usize {
    let limit = Limit::of(costs, Hands { layers: 1, ..hands });
    if limit.bound_by != Bound::Sha256 {
        return 1;
    }
    let next = limit.cores.max(limit.jobs).max(limit.destination);
    if next <= 0.0 {
        return SIDE_BY_SIDE;
    }
    ((costs.hash_tar / next).ceil() as usize).clamp(2, SIDE_BY_SIDE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// About what gzip 4 costs on two cores for a gigabyte.
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

    fn hands(cores: usize, jobs: usize) -> Hands {
        Hands {
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
        let limit = Limit::of(&GZIP, hands(2, 2));
        assert_eq!(limit.bound_by, Bound::Cores);
        near(limit.before, 0.1);
        near(limit.seconds, 0.1 + 16.0 / 2.0);
        // One of one: the sum of everything.
        near(Limit::of(&GZIP, hands(1, 1)).seconds, 16.2);
    }

    #[test]
    fn fewer_workers_than_cores_bind() {
        let limit = Limit::of(&GZIP, hands(8, 2));
        assert_eq!(limit.bound_by, Bound::Jobs);
        near(limit.seconds, 0.1 + 14.6 / 2.0);
        // More workers than cores are as many as cores.
        near(
            Limit::of(&GZIP, hands(2, 64)).seconds,
            Limit::of(&GZIP, hands(2, 2)).seconds,
        );
    }

    #[test]
    fn on_many_cores_the_hash_binds_until_there_are_layers() {
        let limit = Limit::of(&GZIP, hands(64, 64));
        assert_eq!(limit.bound_by, Bound::Sha256);
        near(limit.sha256, 0.7);
        assert_eq!(enough_layers(&GZIP, hands(64, 64)), 2);
        let cut = Limit::of(
            &GZIP,
            Hands {
                layers: 2,
                ..hands(64, 64)
            },
        );
        assert_eq!(cut.bound_by, Bound::Destination);
        assert_eq!(enough_jobs(&GZIP, hands(64, 64)), 23);
        // Where the cores bind there is nothing to gain.
        assert_eq!(enough_layers(&GZIP, hands(2, 2)), 1);
        assert_eq!(enough_jobs(&GZIP, hands(2, 2)), 2);
    }

    #[test]
    fn a_slow_destination_binds() {
        let slow = Costs {
            hand_on_wall: 60.0,
            ..GZIP
        };
        let limit = Limit::of(&slow, hands(8, 8));
        assert_eq!(limit.bound_by, Bound::Destination);
        near(limit.seconds, 0.2 / 8.0 + 60.0);
        assert_eq!(enough_jobs(&slow, hands(8, 8)), 1);
        assert_eq!(enough_layers(&slow, hands(8, 8)), 1);
    }

    #[test]
    fn nothing_costs_nothing() {
        let limit = Limit::of(&Costs::default(), hands(0, 0));
        near(limit.seconds, 0.0);
        assert_eq!(enough_jobs(&Costs::default(), hands(4, 4)), 4);
        assert_eq!(enough_layers(&Costs::default(), hands(4, 4)), 1);
    }
}
