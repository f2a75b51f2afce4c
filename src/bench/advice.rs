//! Derives recommended flags from the measurements. Pure: another level is never recommended without its cost in bytes.

use super::limit::{Bound, Costs, Limit, Resources, enough_jobs, enough_layers};
use super::report::Advice;
use super::stages::Setting;
use crate::layer::Compression;

/// Factor on the time up to which a smaller layer counts as free.
const FREE_FACTOR: f64 = 1.05;
/// Minimum speedup for which another setting is recommended.
const MIN_SPEEDUP: f64 = 1.2;
/// Minimum size of a layer, in bytes. For a smaller one, its own requests cost more than a second hash gains.
const SMALLEST_LAYER: u64 = 64 << 20;

/// The estimated cost of a save with a codec and level.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    /// Codec and level.
    pub(crate) setting: Setting,
    /// Costs of the whole save.
    pub(crate) costs: Costs,
    /// Number of compressed bytes.
    pub(crate) sent_bytes: u64,
}

/// Returns recommendations in order: first the one that suits all consumers, then faster and smaller ones with their
/// price. `asked` is the setting of the measured saves; the result is empty if it is not among the candidates.
pub(crate) fn advise(
    candidates: &[Candidate],
    asked: Setting,
    resources: Resources,
    tar_bytes: u64,
) -> Vec<Advice> {
    let seconds = |c: &Candidate| Limit::of(&c.costs, resources).seconds;
    let of = |codec: Compression| candidates.iter().filter(move |c| c.setting.codec == codec);
    let Some(asked) = candidates.iter().find(|c| c.setting == asked) else {
        return Vec::new();
    };
    // A smaller layer that takes no more time is better in any case.
    let free = of(asked.setting.codec)
        .filter(|c| c.sent_bytes < asked.sent_bytes && seconds(c) <= FREE_FACTOR * seconds(asked))
        .min_by_key(|c| c.sent_bytes);
    let best = free.unwrap_or(asked);
    let bound = Limit::of(&best.costs, resources).bound_by;
    let why = match (bound, free.is_some()) {
        (Bound::Cores, false) => {
            "the cores bind: this level's layer costs all of their time".to_owned()
        }
        (Bound::Jobs, false) => {
            "the workers bind: more of them, up to the cores, are faster".to_owned()
        }
        (Bound::Sha256, _) => "one core's SHA-256 over the tar binds, not the codec".to_owned(),
        (Bound::Destination, _) => "the destination binds, not the codec".to_owned(),
        (_, true) => "a higher level costs next to no time here".to_owned(),
    };
    let mut advice = vec![advice_for(best, resources, tar_bytes, why)];
    let compared = |c: &Candidate, note: &str| {
        let (faster, larger) = (
            seconds(best) / seconds(c),
            c.sent_bytes as f64 / best.sent_bytes as f64,
        );
        format!("{faster:.1} times as fast, the layer {larger:.2} of the size{note}")
    };
    // The fastest setting of the same codec.
    let fastest = of(asked.setting.codec).min_by(|a, b| seconds(a).total_cmp(&seconds(b)));
    if let Some(c) = fastest.filter(|c| seconds(best) >= MIN_SPEEDUP * seconds(c)) {
        advice.push(advice_for(c, resources, tar_bytes, compared(c, "")));
    }
    // The fastest zstd setting, among those that are no larger if there are any.
    if asked.setting.codec != Compression::Zstd {
        let both = of(Compression::Zstd)
            .filter(|c| seconds(c) <= seconds(best) && c.sent_bytes <= best.sent_bytes)
            .min_by(|a, b| seconds(a).total_cmp(&seconds(b)));
        let zstd =
            both.or_else(|| of(Compression::Zstd).min_by(|a, b| seconds(a).total_cmp(&seconds(b))));
        if let Some(c) =
            zstd.filter(|c| seconds(c) < seconds(best) || c.sent_bytes < best.sent_bytes)
        {
            advice.push(advice_for(
                c,
                resources,
                tar_bytes,
                compared(c, "; only where everything that pulls reads zstd"),
            ));
        }
    }
    advice
}

/// Returns the flags for a candidate, with as many workers and layers as are useful.
fn advice_for(
    candidate: &Candidate,
    resources: Resources,
    tar_bytes: u64,
    mut why: String,
) -> Advice {
    let Setting { codec, level } = candidate.setting;
    let mut flags = vec!["--compression".to_owned(), codec_name(codec).to_owned()];
    if codec != Compression::None {
        flags.extend(["--compression-level".to_owned(), level.to_string()]);
    }
    let mut resources = resources;
    let layers = enough_layers(&candidate.costs, resources);
    let size = tar_bytes.div_ceil(layers as u64).next_multiple_of(1 << 20);
    if layers > 1 && size >= SMALLEST_LAYER {
        flags.extend(["--layer-size".to_owned(), format!("{}M", size >> 20)]);
        why += &format!(
            "; {} hashed side by side",
            crate::common::message::count(layers, "layer", "layers")
        );
        resources.layers = layers;
    }
    let jobs = enough_jobs(&candidate.costs, resources);
    if jobs < resources.cores {
        flags.extend(["--jobs".to_owned(), jobs.to_string()]);
        why += &format!("; more than {jobs} workers would only wait");
    }
    Advice {
        flags,
        limit_seconds: Limit::of(&candidate.costs, resources).seconds,
        sent_bytes: candidate.sent_bytes,
        why,
    }
}

/// Returns the value of the flag `--compression`.
pub(crate) fn codec_name(codec: Compression) -> &'static str {
    match codec {
        Compression::Gzip => "gzip",
        Compression::Zstd => "zstd",
        Compression::None => "none",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: u64 = 1_000_000_000;

    fn candidate(codec: Compression, level: u32, compress: f64, sent_bytes: u64) -> Candidate {
        let costs = Costs {
            read: 0.5,
            compress,
            hash_tar: 0.6,
            hand_on_wall: sent_bytes as f64 / 1e9,
            ..Costs::default()
        };
        Candidate {
            setting: Setting { codec, level },
            costs,
            sent_bytes,
        }
    }

    fn candidates() -> [Candidate; 4] {
        [
            candidate(Compression::Gzip, 1, 6.0, 400_000_000),
            candidate(Compression::Gzip, 4, 14.0, 310_000_000),
            candidate(Compression::Gzip, 6, 19.0, 300_000_000),
            candidate(Compression::Zstd, 2, 4.0, 290_000_000),
        ]
    }

    const ASKED: Setting = Setting {
        codec: Compression::Gzip,
        level: 4,
    };

    fn flags(advice: &[Advice]) -> Vec<String> {
        advice.iter().map(|advice| advice.flags.join(" ")).collect()
    }

    #[test]
    fn where_the_cores_bind_speed_has_its_price() {
        let resources = Resources {
            cores: 2,
            jobs: 2,
            layers: 1,
        };
        let advice = advise(&candidates(), ASKED, resources, GB);
        assert_eq!(
            flags(&advice),
            [
                "--compression gzip --compression-level 4",
                "--compression gzip --compression-level 1",
                "--compression zstd --compression-level 2",
            ]
        );
        assert!(
            advice[1].why.contains("2.1 times as fast, the layer 1.29"),
            "{}",
            advice[1].why
        );
        assert!(advice[2].why.contains("reads zstd"), "{}", advice[2].why);
    }

    #[test]
    fn a_slow_destination_makes_a_smaller_layer_free_and_workers_idle() {
        let slow = candidates().map(|c| Candidate {
            costs: Costs {
                hand_on_wall: c.sent_bytes as f64 / 10e6,
                ..c.costs
            },
            ..c
        });
        let resources = Resources {
            cores: 8,
            jobs: 8,
            layers: 1,
        };
        let advice = advise(&slow, ASKED, resources, GB);
        assert_eq!(
            flags(&advice),
            [
                "--compression gzip --compression-level 6 --jobs 1",
                "--compression zstd --compression-level 2 --jobs 1",
            ]
        );
    }

    #[test]
    fn many_cores_are_worth_several_layers() {
        let many = candidates().map(|c| Candidate {
            costs: Costs {
                hand_on_wall: 0.01,
                ..c.costs
            },
            ..c
        });
        let resources = Resources {
            cores: 64,
            jobs: 64,
            layers: 1,
        };
        let advice = advise(&many, ASKED, resources, GB);
        assert_eq!(
            advice[0].flags[..4],
            ["--compression", "gzip", "--compression-level", "6"]
        );
        assert_eq!(advice[0].flags[4..6], ["--layer-size", "477M"]);
        assert!(
            advise(
                &many,
                Setting {
                    codec: Compression::None,
                    level: 0
                },
                resources,
                GB
            )
            .is_empty()
        );
        // A small save gains nothing from several layers.
        let small = advise(&many, ASKED, resources, 50_000_000);
        assert!(
            !small[0].flags.contains(&"--layer-size".to_owned()),
            "{small:?}"
        );
    }
}
