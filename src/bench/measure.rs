//! Runs the rounds, each with every stage and whole saves in turn, and builds the report from their medians.

use std::sync::Arc;

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::advice::{self, Candidate};
use super::clock::{self, Elapsed, median};
use super::limit::{Costs, Limit, Resources};
use super::registry_process::RegistryProcess;
use super::report::{ByThreads, Codec, Node, REPORT_VERSION, Report, Save, Stage, Subject};
use super::stages::{self, Compressed, Sample, SaveOptions, Setting, Sink, Source, WorkerTimes};
use super::{Error, Options, Upload};
use crate::layer::Plan;
use crate::save::Compression;

/// Size in bytes of the part of the tar that is kept in memory for the codecs, SHA-256 and the uploads.
const SAMPLE_SIZE: u64 = 48 << 20;

/// Times of one stage, one value per round.
#[derive(Clone, Debug, Default)]
struct Rounds {
    wall: Vec<f64>,
    cpu: Vec<f64>,
}

impl Rounds {
    fn add(&mut self, spent: Elapsed) {
        self.wall.push(spent.wall);
        self.cpu.push(spent.cpu);
    }

    fn wall(&self) -> f64 {
        median(&self.wall)
    }

    fn cpu(&self) -> f64 {
        median(&self.cpu)
    }
}

/// A destination and its measurements.
struct DestinationRun<'a> {
    to: &'static str,
    place: &'a Sink,
    registry_process: RegistryProcess,
    deliver: Rounds,
    registry_cpu: Vec<f64>,
    save: Rounds,
    layers: usize,
    sent_bytes: u64,
}

/// A codec at a level and its measurements.
struct CodecRuns {
    setting: Setting,
    threads: usize,
    runs: Vec<Compressed>,
}

pub(super) struct Bench<'a> {
    pub(super) options: &'a Options,
    pub(super) source: Source,
    pub(super) cancel: &'a CancellationToken,
    pub(super) progress: &'a dyn Fn(&str),
    pub(super) cores: usize,
    pub(super) jobs: usize,
    pub(super) upload: Option<&'a Upload>,
}

impl Bench<'_> {
    /// Returns the numbers of threads to measure: the powers of two below the number of workers, and that number.
    fn threads(&self) -> Vec<usize> {
        let mut threads: Vec<usize> = std::iter::successors(Some(1), |n| Some(2 * n))
            .take_while(|&n| n < self.jobs)
            .collect();
        threads.push(self.jobs);
        threads
    }

    /// Returns the settings to measure and that of the saves, without duplicates.
    fn settings(&self) -> Vec<Setting> {
        let mut settings = self.options.settings.clone();
        settings.push(self.options.setting);
        settings.sort_by_key(|setting| (setting.codec as u8, setting.level));
        settings.dedup();
        settings
    }

    pub(super) fn measure(&self, plan: &Plan, mut subject: Subject) -> Result<Report, Error> {
        let (options, cancel) = (self.options, self.cancel);
        let (tar_bytes, jobs) = (plan.tar_size(), self.jobs);
        let first = stages::read_first(plan, jobs, cancel)?;
        let sample = Sample::new(plan, SAMPLE_SIZE, cancel)?;
        subject.sample_bytes = sample.bytes();
        let pieces = sample.pieces(options.setting, cancel)?;

        let (nothing, file) = (Sink::Nothing, Sink::File(options.scratch.clone()));
        let mut ways = vec![
            DestinationRun::new("nothing", &nothing, RegistryProcess::Remote),
            DestinationRun::new("file", &file, RegistryProcess::Remote),
        ];
        if let Some(upload) = self.upload {
            ways.push(DestinationRun::new(
                "registry",
                &upload.place,
                upload.registry_process,
            ));
        }
        let mut reads: Vec<(usize, Rounds)> = self
            .threads()
            .into_iter()
            .map(|threads| (threads, Rounds::default()))
            .collect();
        let mut tried: Vec<CodecRuns> = Vec::new();
        for setting in self.settings() {
            let runs = Vec::new;
            tried.extend(self.threads().into_iter().map(|threads| CodecRuns {
                setting,
                threads,
                runs: runs(),
            }));
        }
        let (mut scans, mut plans, mut hashes) =
            (Rounds::default(), Rounds::default(), Rounds::default());
        let mut made: Vec<WorkerTimes> = Vec::new();

        for round in 1..=options.rounds {
            let progress = |what: &str| {
                (self.progress)(&format!("round {round} of {}: {what}", options.rounds));
            };
            progress("scan");
            let clock = clock::Clock::start();
            let scan = self.source.scan(&options.rules, jobs, cancel)?;
            scans.add(clock.spent());
            let clock = clock::Clock::start();
            drop(Plan::new(Arc::new(scan), options.timestamp));
            plans.add(clock.spent());
            progress("read");
            for (threads, rounds) in &mut reads {
                rounds.add(stages::read(plan, *threads, cancel)?);
            }
            progress("SHA-256");
            hashes.add(sample.hash());
            for tried in &mut tried {
                let Setting { codec, level } = tried.setting;
                progress(&format!(
                    "{} {level}, threads: {}",
                    advice::codec_name(codec),
                    tried.threads
                ));
                tried
                    .runs
                    .push(sample.compress(tried.setting, tried.threads, cancel)?);
            }
            progress("read and compress");
            made.push(stages::make(plan, options.setting, jobs, cancel)?);
            let sent = made.last().map_or(0, |made| made.bytes);
            for way in &mut ways {
                progress(&format!("delivery alone, to: {}", way.to));
                way.deliver(&pieces, sent, cancel)?;
                progress(&format!("whole save, to: {}", way.to));
                let how = SaveOptions {
                    rules: &options.rules,
                    setting: options.setting,
                    jobs,
                    timestamp: options.timestamp,
                    layer_size: options.layer_size,
                };
                let saved = stages::save(&self.source, how, way.place, cancel)?;
                way.save.add(saved.spent);
                way.layers = saved.layers.len();
                way.sent_bytes = saved.layers.iter().map(|layer| layer.size).sum();
            }
        }

        let sha_per_byte = hashes.wall() / sample.bytes().max(1) as f64;
        let of_made =
            |part: fn(&WorkerTimes) -> f64| median(&made.iter().map(part).collect::<Vec<_>>());
        let common = Costs {
            scan: scans.cpu(),
            plan: plans.cpu(),
            read: of_made(|made| made.read),
            checksum: of_made(|made| made.checksum),
            compress: of_made(|made| made.compress),
            hash_tar: sha_per_byte * tar_bytes as f64,
            ..Costs::default()
        };
        let resources = Resources {
            cores: self.cores,
            jobs,
            layers: 1,
        };
        let saves: Vec<Save> = ways
            .iter()
            .map(|way| {
                let costs = Costs {
                    hash_compressed: sha_per_byte * way.sent_bytes as f64,
                    ..way.costs(common)
                };
                let resources = Resources {
                    layers: way.layers,
                    ..resources
                };
                let limit = Limit::of(&costs, resources);
                let seconds = way.save.wall();
                Save {
                    to: way.to,
                    compression: options.setting.codec,
                    level: options.setting.level,
                    jobs,
                    layers: way.layers,
                    seconds,
                    cpu_seconds: way.save.cpu(),
                    sent_bytes: way.sent_bytes,
                    mb_per_second: rate(tar_bytes, seconds),
                    costs,
                    limit,
                    limit_percent: percent(limit.seconds, seconds),
                }
            })
            .collect();

        let stage = |stage, threads, spent: (f64, f64), bytes, entries: Option<u64>| Stage {
            stage,
            threads,
            seconds: spent.0,
            cpu_seconds: spent.1,
            bytes,
            mb_per_second: rate(bytes, spent.0),
            entries_per_second: entries
                .map(|entries| entries as f64 / spent.0.max(f64::MIN_POSITIVE)),
        };
        let entries = Some(subject.entries);
        let mut table = vec![
            stage(
                "scan",
                jobs,
                (scans.wall(), scans.cpu()),
                tar_bytes,
                entries,
            ),
            stage("plan", 1, (plans.wall(), plans.cpu()), tar_bytes, entries),
            stage("read_first", jobs, (first.wall, first.cpu), tar_bytes, None),
        ];
        for (threads, rounds) in &reads {
            table.push(stage(
                "read",
                *threads,
                (rounds.wall(), rounds.cpu()),
                tar_bytes,
                None,
            ));
        }
        table.push(stage(
            "sha256",
            1,
            (hashes.wall(), hashes.cpu()),
            sample.bytes(),
            None,
        ));
        let of_all = (
            of_made(|made| made.spent.wall),
            of_made(|made| made.spent.cpu),
        );
        table.push(stage("make", jobs, of_all, tar_bytes, None));
        for way in &ways[1..] {
            let name = if way.to == "file" {
                "write_file"
            } else {
                "upload"
            };
            let sent = made.last().map_or(0, |made| made.bytes);
            table.push(stage(
                name,
                1,
                (way.deliver.wall(), way.deliver.cpu()),
                sent,
                None,
            ));
        }

        let codecs = codecs(&tried);
        let last = saves.last().map(|save| (save.costs, save.sent_bytes));
        let candidates =
            last.map(|(costs, sent)| self.candidates(&codecs, &costs, sent, tar_bytes));
        let advice = advice::advise(
            &candidates.unwrap_or_default(),
            options.setting,
            resources,
            tar_bytes,
        );
        Ok(Report {
            version: REPORT_VERSION,
            node: Node {
                cores: self.cores,
                jobs,
            },
            subject,
            rounds: options.rounds,
            stages: table,
            codecs,
            saves,
            advice,
            notes: self.notes(),
        })
    }

    /// Estimates the costs of the last save for every measured setting, from the measurements on the sample.
    fn candidates(
        &self,
        codecs: &[Codec],
        costs: &Costs,
        sent: u64,
        tar_bytes: u64,
    ) -> Vec<Candidate> {
        let asked = codecs.iter().find(|codec| self.is_asked(codec));
        // The sample differs from the whole tar; the measurements of the requested setting on both give the scale.
        let scale = |codec: &Codec| {
            asked.map_or(1.0, |asked| {
                codec.ratio / asked.ratio.max(f64::MIN_POSITIVE)
            })
        };
        let speed = |codec: &Codec| {
            codec
                .by_threads
                .last()
                .map_or(0.0, |by| by.cpu_seconds_per_gb)
        };
        let asked_speed = asked.map_or(1.0, speed).max(f64::MIN_POSITIVE);
        let checksum = costs.read.min(tar_bytes as f64 * CRC_SECONDS_PER_BYTE);
        let candidate = |codec: &Codec| {
            let by = scale(codec);
            let costs = Costs {
                compress: costs.compress * speed(codec) / asked_speed,
                checksum: match codec.compression {
                    Compression::Gzip if costs.checksum > 0.0 => costs.checksum,
                    Compression::Gzip => checksum,
                    _ => 0.0,
                },
                hash_compressed: costs.hash_compressed * by,
                hand_on: costs.hand_on * by,
                registry: costs.registry * by,
                hand_on_wall: costs.hand_on_wall * by,
                ..*costs
            };
            let setting = Setting {
                codec: codec.compression,
                level: codec.level,
            };
            Candidate {
                setting,
                costs,
                sent_bytes: (sent as f64 * by) as u64,
            }
        };
        codecs.iter().map(candidate).collect()
    }

    fn is_asked(&self, codec: &Codec) -> bool {
        (codec.compression, codec.level) == (self.options.setting.codec, self.options.setting.level)
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = vec![
            "Figures are medians of the rounds. Every file is first read into the page cache ('read_first'), which a save leaves as it finds it: a save of files that are not in memory waits for the disk besides.".to_owned(),
            "A whole save is scan, plan, stream and delivery; finding the container, proving its base, config and \
             manifest are not in it, and the container is not frozen."
                .to_owned(),
            "The limit: processor seconds of all stages by the cores, one core's SHA-256 over the tar, the workers' \
             part by --jobs, or the destination alone; the slowest binds. Nothing waits, and nothing disturbs anything."
                .to_owned(),
        ];
        let Some(upload) = self.upload else {
            return notes;
        };
        notes.push(
            "Uploads are confirmed by the registry up to the last byte and then cancelled: no blob and no tag is left \
             behind, and what the registry does when a blob is finished is not measured."
                .to_owned(),
        );
        if self.options.layer_size.is_some() {
            notes.push(
                "The destination alone is measured with one upload; several layers make several."
                    .to_owned(),
            );
        }
        notes.push(match upload.registry_process {
            RegistryProcess::Remote => "The registry is on another machine: it takes none of these cores.".to_owned(),
            RegistryProcess::Local(pid) => format!(
                "The registry (process {pid}) is on this machine: the processor time that it takes for an upload \
                 alone counts against these cores in the limit."
            ),
            RegistryProcess::Unknown => "The registry is on this machine, but its process cannot be seen: what it takes of \
                                  these cores is not in the limit, which is too fast by that."
                .to_owned(),
        });
        notes
    }
}

/// Assumed cost of CRC-32 if it was not measured because the save does not use gzip. It is too small to affect the
/// first two digits of any figure.
const CRC_SECONDS_PER_BYTE: f64 = 1e-10;

impl<'a> DestinationRun<'a> {
    fn new(to: &'static str, place: &'a Sink, registry_process: RegistryProcess) -> Self {
        Self {
            to,
            place,
            registry_process,
            deliver: Rounds::default(),
            registry_cpu: Vec::new(),
            save: Rounds::default(),
            layers: 1,
            sent_bytes: 0,
        }
    }

    /// Measures the delivery of the compressed bytes alone.
    fn deliver(
        &mut self,
        pieces: &[Bytes],
        bytes: u64,
        cancel: &CancellationToken,
    ) -> Result<(), Error> {
        let before = self.registry_process.cpu();
        let spent = stages::deliver(self.place, pieces, bytes, cancel)?;
        let after = self.registry_process.cpu();
        self.deliver.add(spent);
        self.registry_cpu.extend(
            before
                .zip(after)
                .map(|(before, after)| (after - before).max(0.0)),
        );
        Ok(())
    }

    fn costs(&self, common: Costs) -> Costs {
        Costs {
            hand_on: self.deliver.cpu(),
            registry: median(&self.registry_cpu),
            hand_on_wall: self.deliver.wall(),
            ..common
        }
    }
}

/// Returns the rate in MB/s.
fn rate(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 / 1e6 / seconds.max(f64::MIN_POSITIVE)
}

fn percent(part: f64, whole: f64) -> f64 {
    100.0 * part / whole.max(f64::MIN_POSITIVE)
}

/// Merges one entry per setting and number of threads into one entry per setting.
fn codecs(tried: &[CodecRuns]) -> Vec<Codec> {
    let mut codecs: Vec<Codec> = Vec::new();
    for tried in tried {
        let of = |figure: fn(&Compressed) -> f64| {
            median(&tried.runs.iter().map(figure).collect::<Vec<_>>())
        };
        let by_threads = ByThreads {
            threads: tried.threads,
            mb_per_second: of(|run| rate(run.bytes_in, run.spent.wall)),
            cpu_seconds_per_gb: of(|run| run.spent.cpu * 1e9 / run.bytes_in.max(1) as f64),
        };
        let Setting {
            codec: compression,
            level,
        } = tried.setting;
        match codecs
            .last_mut()
            .filter(|row| (row.compression, row.level) == (compression, level))
        {
            Some(row) => row.by_threads.push(by_threads),
            None => codecs.push(Codec {
                compression,
                level,
                ratio: of(|run| run.bytes_out as f64 / run.bytes_in.max(1) as f64),
                by_threads: vec![by_threads],
            }),
        }
    }
    codecs
}
