//! The closing note: where the time went, what was folded, what was lost, how to find the trace again.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};

use crate::span::{Capture, Loss, ProbeKind, Role, Trace};

use super::Options;
use super::label::{counted, duration, filled, grouped, visible};
use super::lifeline::callee_name;
use super::model::Totals;
use super::timeline::{Timeline, What};

/// Longest text taken over from elsewhere, characters.
const MAX_LINE_CHARS: usize = 160;
/// Lines of one kind taken over from elsewhere.
const MAX_LINES: usize = 8;

/// Signs for ends that were not seen, as far as the diagram uses them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Marks {
    at_least: bool,
    at_most: bool,
    about: bool,
}

impl Marks {
    /// The sign for a duration whose true value is at least, at most, or around the one shown.
    pub(super) fn set(&mut self, is_least: bool, is_most: bool) -> &'static str {
        match (is_least, is_most) {
            (false, false) => "",
            (true, false) => {
                self.at_least = true;
                "≥ "
            }
            (false, true) => {
                self.at_most = true;
                "≤ "
            }
            (true, true) => {
                self.about = true;
                "~ "
            }
        }
    }

    fn legend(self) -> impl Iterator<Item = String> {
        [
            (self.at_least, "≥ its start or end was not seen: it took longer"),
            (self.at_most, "≤ its end was not seen: timed up to the next event"),
            (self.about, "~ neither its start nor its end was seen"),
        ]
        .into_iter()
        .filter(|(is_used, _)| *is_used)
        .map(|(_, words)| words.to_owned())
    }
}

/// The lines of the closing note.
pub(super) fn lines(
    trace: &Trace,
    capture: &Capture,
    options: &Options,
    timeline: &Timeline,
    totals: &Totals,
    marks: Marks,
) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(origin) = &capture.replay_of {
        lines.extend(fit(&format!("REPLAY of {}", visible(origin, MAX_LINE_CHARS))));
    }
    lines.push(accounting(totals));
    if totals.helper_count > 0 {
        lines.push(format!(
            "beside that on helper threads: {}, {}",
            counted(totals.helper_count, "syscall"),
            duration(totals.helper_ns)
        ));
    }
    lines.extend(largest(timeline));
    let in_window = losses("in the whole window, perhaps from this trace", &capture.losses);
    let lost = losses("in this trace", &trace.losses);
    let lost = lost.unwrap_or_else(|| if in_window.is_some() { "no known loss" } else { "0 lost" }.into());
    lines.extend(fit(&format!(
        "{} · {}, {lost}",
        calls(totals),
        counted(trace.event_count, "event")
    )));
    if let Some(lost) = in_window {
        lines.extend(fit(&lost));
    }
    lines.extend(paused(trace).iter().flat_map(|line| fit(line)));
    lines.push(window(trace, capture));
    lines.push(format!(
        "trace {} · process {} thread {}",
        trace.id, trace.process.pid, trace.root.tid
    ));
    if let Some(parent) = &trace.parent {
        lines.push(format!(
            "under trace {} span {}, named by the {}",
            parent.trace_id,
            parent.span_id_text(),
            parent.how.as_str()
        ));
    }
    let version = trace.process.runtime_version.as_deref();
    let version = version.map_or(String::new(), |version| format!(" {}", visible(version, 16)));
    let kernel = match capture.kernel_release.as_str() {
        "" => String::new(),
        release => format!(" · Linux {}", visible(release, 32)),
    };
    lines.push(format!(
        "wasmscope {} · {}{version}{kernel}",
        env!("CARGO_PKG_VERSION"),
        visible(&trace.process.runtime_name, 24),
    ));
    lines.extend(marks.legend());
    extend_bounded(&mut lines, &trace.process.limits, "limited: ");
    extend_bounded(&mut lines, &options.remarks, "");
    lines
}

/// Lines that do not reach far beyond the lifelines they are written over.
fn fit(text: &str) -> Vec<String> {
    const MAX_CHARS: usize = 84;
    filled(text, MAX_CHARS)
}

/// `12.713 ms = guest 0.880 (7 %) + …`: rounded so that the parts add up as printed.
fn accounting(totals: &Totals) -> String {
    let parts = [
        ("guest", totals.guest_ns),
        ("host", totals.host_ns),
        ("kernel", totals.kernel_ns),
        ("suspended", totals.suspended_ns),
    ];
    let all = totals.duration_ns;
    let (unit, scale, decimals) = match all {
        0..1_000 => ("ns", 1, 0),
        1_000..1_000_000 => ("µs", 1, 3),
        1_000_000..1_000_000_000 => ("ms", 1_000, 3),
        _ => ("s", 1_000_000, 3),
    };
    // The whole is rounded, then what the rounded-down parts lack goes to those with the largest remainders.
    let whole = (all + scale / 2) / scale;
    let mut rounded = parts.map(|(_, part)| part / scale);
    let mut lacking = whole.saturating_sub(rounded.iter().sum());
    let mut by_remainder: Vec<usize> = (0..parts.len()).collect();
    by_remainder.sort_by_key(|&index| Reverse(parts[index].1 % scale));
    for index in by_remainder {
        let more = lacking.min(1);
        rounded[index] += more;
        lacking -= more;
    }
    let number = |value: u64| match decimals {
        0 => grouped(value),
        _ => format!("{}.{:03}", grouped(value / 1_000), value % 1_000),
    };
    let shown: Vec<String> = parts
        .iter()
        .zip(rounded)
        .filter(|((_, part), _)| *part > 0)
        .map(|((name, part), rounded)| format!("{name} {} ({})", number(rounded), percent(*part, all)))
        .collect();
    let shown = if shown.is_empty() {
        "no time seen".into()
    } else {
        shown.join(" + ")
    };
    format!("{} {unit} = {shown}", number(whole))
}

/// What most of the time went to, all calls of one callee together; `None` if no callee stands out from the whole.
fn largest(timeline: &Timeline) -> Option<String> {
    let mut times: HashMap<(Option<Role>, &str), u64> = HashMap::new();
    for node in &timeline.nodes {
        let What::Span(span) = node.what else { continue };
        let name = callee_name(span);
        *times.entry((Some(span.role()), name)).or_default() += node.own_ns;
        for child in node.children().map(|child| timeline.node(child)) {
            if let What::Suspend(..) = child.what {
                let time = times.entry((None, name)).or_default();
                *time = time.saturating_add(child.duration_ns());
            }
        }
    }
    // Below a twentieth of the whole nobody looks.
    let least = timeline.totals.duration_ns / 20;
    let mut times: Vec<_> = times.into_iter().filter(|(_, time)| *time > least).collect();
    times.sort_unstable_by_key(|((role, name), time)| (Reverse(*time), *role, *name));
    let words = times.iter().take(3).map(|((role, name), time)| {
        let name = visible(name, 32);
        let what = match role {
            None => format!("suspended in {name}"),
            Some(Role::Invoke) => format!("{name} itself"),
            Some(_) => name,
        };
        format!("{what} {}", duration(*time))
    });
    (times.len() > 1).then(|| format!("most in: {}", words.collect::<Vec<_>>().join(" · ")))
}

fn percent(part: u64, all: u64) -> String {
    let tenths = u128::from(part) * 1_000 / u128::from(all.max(1));
    if part > 0 && tenths < 10 {
        "under 1 %".into()
    } else {
        format!("{} %", (tenths + 5) / 10)
    }
}

fn calls(totals: &Totals) -> String {
    let mut text = format!(
        "{}: {} drawn",
        counted(totals.call_count, "call"),
        grouped(totals.drawn_count)
    );
    for (count, words) in [
        (totals.repeated_count, "more in loops"),
        (totals.folded_count, "folded into notes"),
    ] {
        if count > 0 {
            text = format!("{text}, {} {words}", grouped(count));
        }
    }
    text
}

fn losses(place: &str, losses: &[Loss]) -> Option<String> {
    let count = losses.iter().fold(0_u64, |sum, loss| sum.saturating_add(loss.count));
    if count == 0 {
        return None;
    }
    let mut named: Vec<String> = losses
        .iter()
        .take(MAX_LINES)
        .map(|loss| {
            format!(
                "{} {} {}",
                visible(&loss.layer, 24),
                visible(&loss.reason, 32),
                grouped(loss.count)
            )
        })
        .collect();
    if losses.len() > MAX_LINES {
        let rest = losses[MAX_LINES..]
            .iter()
            .fold(0_u64, |sum, loss| sum.saturating_add(loss.count));
        named.push(format!("other {}", grouped(rest)));
    }
    Some(format!("{} LOST {place} ({})", grouped(count), named.join(", ")))
}

/// How much of the trace some probes did not observe.
fn paused(trace: &Trace) -> Option<String> {
    let total_ns = trace.root.end_ns.saturating_sub(trace.root.start_ns);
    let mut by_probe: BTreeMap<ProbeKind, u64> = BTreeMap::new();
    for pause in &trace.pauses {
        *by_probe.entry(pause.probe).or_default() += pause.end_ns.saturating_sub(pause.start_ns);
    }
    let parts: Vec<_> = by_probe
        .iter()
        .map(
            |(probe, paused_ns)| match paused_ns.saturating_mul(100).checked_div(total_ns) {
                Some(percent @ 1..) => format!("{} {} %", probe.as_str(), percent.min(100)),
                _ => format!("{} less than 1 %", probe.as_str()),
            },
        )
        .collect();
    (!parts.is_empty()).then(|| format!("PROBES PAUSED for their cost, of this trace: {}", parts.join(", ")))
}

fn window(trace: &Trace, capture: &Capture) -> String {
    let seen = if capture.trace_count == 0 {
        String::new()
    } else {
        format!("1 of {} seen in ", counted(capture.trace_count, "trace"))
    };
    let window = duration(capture.end_ns.saturating_sub(capture.start_ns));
    let began = duration(trace.root.start_ns.saturating_sub(capture.start_ns));
    format!("{seen}a window of {window}, began at +{began}")
}

fn extend_bounded(lines: &mut Vec<String>, more: &[String], prefix: &str) {
    for line in more.iter().take(MAX_LINES) {
        lines.extend(fit(&format!("{prefix}{}", visible(line, MAX_LINE_CHARS))));
    }
    if more.len() > MAX_LINES {
        lines.push(format!("{} more such lines", more.len() - MAX_LINES));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_add_up_as_printed() {
        let totals = Totals {
            duration_ns: 12_713_400,
            guest_ns: 880_400,
            host_ns: 1_020_400,
            kernel_ns: 4_712_200,
            suspended_ns: 6_100_400,
            ..Totals::default()
        };
        assert_eq!(
            accounting(&totals),
            "12.713 ms = guest 0.881 (7 %) + host 1.020 (8 %) + kernel 4.712 (37 %) + suspended 6.100 (48 %)"
        );
    }

    #[test]
    fn small_parts_are_not_nothing() {
        let totals = Totals {
            duration_ns: 1_000_000_000,
            guest_ns: 999_999_999,
            host_ns: 1,
            ..Totals::default()
        };
        assert_eq!(
            accounting(&totals),
            "1.000 s = guest 1.000 (100 %) + host 0.000 (under 1 %)"
        );
        assert_eq!(accounting(&Totals::default()), "0 ns = no time seen");
    }

    #[test]
    fn many_losses_are_summed_up() {
        let many: Vec<Loss> = (1..=10)
            .map(|count| Loss {
                layer: "ring".into(),
                reason: "full".into(),
                count,
            })
            .collect();
        let text = losses("here", &many).expect("some");
        assert!(text.starts_with("55 LOST here (ring full 1, "), "{text}");
        assert!(text.ends_with(", other 19)"), "{text}");
    }
}
