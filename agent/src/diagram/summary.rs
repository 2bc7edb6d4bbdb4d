//! The closing note: where the time went, what was folded, what was lost, how to find the trace again.

use crate::span::{Capture, Loss, Trace};

use super::Options;
use super::label::{counted, duration, grouped, visible};
use super::model::Totals;

/// Longest line taken over from elsewhere, characters.
const MAX_LINE_CHARS: usize = 110;
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

    fn legend(self) -> Option<String> {
        let words = [
            (self.at_least, "≥ its start or end was not seen, it is longer"),
            (self.at_most, "≤ its end was not seen, the next event is taken"),
            (self.about, "~ neither end was seen"),
        ];
        let used: Vec<&str> = words
            .into_iter()
            .filter_map(|(is_used, words)| is_used.then_some(words))
            .collect();
        (!used.is_empty()).then(|| used.join(" · "))
    }
}

pub(super) fn lines(trace: &Trace, capture: &Capture, options: &Options, totals: &Totals, marks: Marks) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(origin) = &capture.replay_of {
        lines.push(format!("REPLAY of {}", visible(origin, MAX_LINE_CHARS)));
    }
    lines.push(accounting(totals));
    lines.push(format!(
        "{} · {}",
        calls(totals),
        losses("in this trace", &trace.losses).map_or_else(
            || format!("{}, 0 lost", counted(trace.event_count, "event")),
            |lost| format!("{}, {lost}", counted(trace.event_count, "event"))
        )
    ));
    if let Some(lost) = losses("in the whole window, perhaps from this trace", &capture.losses) {
        lines.push(lost);
    }
    lines.push(window(trace, capture));
    let version = trace
        .process
        .runtime_version
        .as_deref()
        .map(|version| format!(" {}", visible(version, 16)));
    let kernel = match capture.kernel_release.as_str() {
        "" => String::new(),
        release => format!(" · Linux {}", visible(release, 32)),
    };
    lines.push(format!(
        "trace {} · wasmscope {} · {}{}{kernel}",
        trace.id,
        env!("CARGO_PKG_VERSION"),
        visible(&trace.process.runtime_name, 24),
        version.unwrap_or_default(),
    ));
    lines.extend(marks.legend());
    extend_bounded(&mut lines, &trace.process.limits, "limited");
    extend_bounded(&mut lines, &options.remarks, "");
    lines
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
    by_remainder.sort_by_key(|&index| std::cmp::Reverse(parts[index].1 % scale));
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

fn window(trace: &Trace, capture: &Capture) -> String {
    let seen = if capture.trace_count == 0 {
        String::new()
    } else {
        format!("1 of {} seen in ", counted(capture.trace_count, "trace"))
    };
    let window = duration(capture.end_ns.saturating_sub(capture.start_ns));
    let began = duration(trace.root.start_ns.saturating_sub(capture.start_ns));
    format!(
        "{seen}a window of {window}, began at +{began} · process {} thread {}",
        trace.process.pid, trace.root.tid
    )
}

fn extend_bounded(lines: &mut Vec<String>, more: &[String], prefix: &str) {
    let separator = if prefix.is_empty() { "" } else { ": " };
    lines.extend(
        more.iter()
            .take(MAX_LINES)
            .map(|line| format!("{prefix}{separator}{}", visible(line, MAX_LINE_CHARS))),
    );
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
