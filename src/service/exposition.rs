//! The format of metrics that Prometheus reads without OpenMetrics (text format 0.0.4).

/// Returns the suffix of the samples of a metric, and its type in the classic format.
fn classic_type(kind: &str) -> (&str, &str) {
    match kind {
        "counter" => ("_total", "counter"),
        "info" => ("_info", "gauge"),
        "unknown" => ("", "untyped"),
        same => ("", same),
    }
}

/// Converts a text in OpenMetrics 1.0, as the encoder writes it. The classic format names a counter by its samples, with
/// `_total`, and has neither units nor an end mark.
pub(super) fn classic(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    let mut help = None;
    for line in open_metrics.lines() {
        if let Some(of) = line.strip_prefix("# HELP ") {
            help = of.split_once(' ').map(|(_, help)| help);
        } else if let Some(of) = line.strip_prefix("# TYPE ") {
            let (name, kind) = of.split_once(' ').unwrap_or((of, "untyped"));
            let (suffix, kind) = classic_type(kind);
            let help = help.take().unwrap_or_default();
            text += &format!("# HELP {name}{suffix} {help}\n# TYPE {name}{suffix} {kind}\n");
        } else if !line.starts_with("# ") {
            text += line;
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_and_infos_are_named_by_their_samples() {
        let open = "# HELP a_b Text of it.\n# TYPE a_b counter\na_b_total{x=\"# TYPE\"} 1\n\
                    # HELP c C.\n# TYPE c info\nc_info{v=\"1\"} 1\n\
                    # HELP d_seconds D.\n# TYPE d_seconds histogram\n# UNIT d_seconds seconds\nd_seconds_sum 1\n# EOF\n";
        let text = "# HELP a_b_total Text of it.\n# TYPE a_b_total counter\na_b_total{x=\"# TYPE\"} 1\n\
                    # HELP c_info C.\n# TYPE c_info gauge\nc_info{v=\"1\"} 1\n\
                    # HELP d_seconds D.\n# TYPE d_seconds histogram\nd_seconds_sum 1\n";
        assert_eq!(classic(open), text);
    }
}
