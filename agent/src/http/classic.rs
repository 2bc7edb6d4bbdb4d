//! The classic Prometheus text format, made from `OpenMetrics` text: what old scrapers read.

use std::collections::HashMap;

/// Content type of [`from_openmetrics`].
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The same samples. Counters and infos are described under the names of their samples, and exemplars are left out, which this format does not have.
pub(super) fn from_openmetrics(text: &str) -> String {
    let types: HashMap<&str, &str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '))
        .collect();
    let mut classic = String::with_capacity(text.len());
    for line in text.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some(word @ ("HELP" | "TYPE")), Some(name), Some(rest)) => {
                let (suffix, type_name) = match types.get(name) {
                    Some(&"counter") => ("_total", "counter"),
                    Some(&"info") => ("_info", "gauge"),
                    Some(&"unknown") | None => ("", "untyped"),
                    Some(other) => ("", *other),
                };
                let rest = if word == "TYPE" { type_name } else { rest };
                classic.extend(["# ", word, " ", name, suffix, " ", rest, "\n"]);
            }
            (Some("#"), ..) => {}
            _ => classic.extend([without_exemplar(line), "\n"]),
        }
    }
    classic
}

/// A label's value may hold what looks like the beginning of an exemplar.
fn without_exemplar(line: &str) -> &str {
    let (mut is_quoted, mut is_escaped) = (false, false);
    for (at, byte) in line.bytes().enumerate() {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if is_quoted => is_escaped = true,
            b'"' => is_quoted = !is_quoted,
            b'#' if !is_quoted => return line[..at].trim_end(),
            _ => {}
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_carry_their_suffix_and_exemplars_are_gone() {
        let open = "# HELP calls Calls.\n# TYPE calls counter\n# UNIT calls x\ncalls_total{a=\"\\\"# {\"} 3 # {trace_id=\"1\"} 1.0\n# EOF\n";
        assert_eq!(
            from_openmetrics(open),
            "# HELP calls_total Calls.\n# TYPE calls_total counter\ncalls_total{a=\"\\\"# {\"} 3\n"
        );
    }
}
