//! The output of `bench`.

use super::text::{self, Align};
use crate::bench::advice::codec_name;
use crate::bench::limit::Bound;
use crate::bench::report::Report;
use crate::common::escape::text as escaped;

/// Formats `bench` as tables.
pub(crate) fn bench_table(report: &Report) -> String {
    let Report { node, subject, .. } = report;
    let mb = |bytes: u64| format!("{:.0}", bytes as f64 / 1e6);
    let mut out = format!(
        "{} {}: {} entries, {} MB of tar; {} cores, {} workers; medians of {} rounds\n\n",
        subject.kind,
        escaped(&subject.name),
        subject.entries,
        mb(subject.tar_bytes),
        node.cores,
        node.jobs,
        report.rounds
    );
    let rows = report.stages.iter().map(|stage| {
        let entries = stage
            .entries_per_second
            .map_or_else(|| "-".to_owned(), |entries| format!("{entries:.0}"));
        vec![
            stage.stage.to_owned(),
            stage.threads.to_string(),
            mb(stage.bytes),
            format!("{:.3}", stage.seconds),
            format!("{:.3}", stage.cpu_seconds),
            format!("{:.0}", stage.mb_per_second),
            entries,
        ]
    });
    let header = [
        ("STAGE ALONE", Align::Left),
        ("THREADS", Align::Right),
        ("MB", Align::Right),
        ("SECONDS", Align::Right),
        ("CPU", Align::Right),
        ("MB/S", Align::Right),
        ("ENTRIES/S", Align::Right),
    ];
    out += &text::table(&header, &rows.collect::<Vec<_>>());
    out += "\n";
    out += &codec_table(report);
    out += "\n";
    out += &save_table(report);
    for advice in &report.advice {
        out += &format!("{}\n    {}\n", advice.flags.join(" "), advice.why);
    }
    out += "\n";
    for note in &report.notes {
        out += &format!("{note}\n");
    }
    out
}

/// Formats the codec results, with one column per number of threads.
fn codec_table(report: &Report) -> String {
    let threads = report
        .codecs
        .first()
        .map_or(&[][..], |codec| &codec.by_threads);
    let names: Vec<String> = threads
        .iter()
        .map(|by| format!("MB/S x{}", by.threads))
        .collect();
    let mut header = vec![
        ("CODEC", Align::Left),
        ("LEVEL", Align::Right),
        ("SIZE", Align::Right),
    ];
    header.extend(names.iter().map(|name| (name.as_str(), Align::Right)));
    header.push(("CPU S/GB", Align::Right));
    let rows = report.codecs.iter().map(|codec| {
        let mut row = vec![
            codec_name(codec.compression).to_owned(),
            codec.level.to_string(),
            format!("{:.1} %", 100.0 * codec.ratio),
        ];
        row.extend(
            codec
                .by_threads
                .iter()
                .map(|by| format!("{:.0}", by.mb_per_second)),
        );
        row.extend(
            codec
                .by_threads
                .last()
                .map(|by| format!("{:.2}", by.cpu_seconds_per_gb)),
        );
        row
    });
    text::table(&header, &rows.collect::<Vec<_>>())
}

/// Formats the saves with what limits them, and the cost of the last one.
fn save_table(report: &Report) -> String {
    let rows = report.saves.iter().map(|save| {
        let bound = match save.limit.bound_by {
            Bound::Cores => "the cores",
            Bound::Jobs => "--jobs",
            Bound::Sha256 => "one core's SHA-256",
            Bound::Destination => "the destination",
        };
        vec![
            save.to.to_owned(),
            format!("{} {}", codec_name(save.compression), save.level),
            format!("{:.0}", save.sent_bytes as f64 / 1e6),
            format!("{:.3}", save.seconds),
            format!("{:.3}", save.cpu_seconds),
            format!("{:.0}", save.mb_per_second),
            format!("{:.3}", save.limit.seconds),
            format!("{:.0} %", save.limit_percent),
            bound.to_owned(),
        ]
    });
    let header = [
        ("WHOLE SAVE TO", Align::Left),
        ("CODEC", Align::Left),
        ("MB SENT", Align::Right),
        ("SECONDS", Align::Right),
        ("CPU", Align::Right),
        ("MB/S", Align::Right),
        ("LIMIT", Align::Right),
        ("REACHED", Align::Right),
        ("BOUND BY", Align::Left),
    ];
    let mut out = text::table(&header, &rows.collect::<Vec<_>>());
    if let Some(save) = report.saves.last() {
        let costs = &save.costs;
        let parts = [
            ("scan", costs.scan),
            ("plan", costs.plan),
            ("read", costs.read),
            ("checksum", costs.checksum),
            ("compress", costs.compress),
            ("SHA-256 of the tar", costs.hash_tar),
            ("of the compressed", costs.hash_compressed),
            ("hand on", costs.hand_on),
            ("registry", costs.registry),
        ];
        let shown = parts
            .iter()
            .filter(|(_, seconds)| *seconds >= 0.0005)
            .map(|(name, seconds)| format!("{name} {seconds:.3}"));
        let shown: Vec<String> = shown.collect();
        out += &format!("CPU seconds of the last: {}\n\n", shown.join(", "));
    }
    out
}
