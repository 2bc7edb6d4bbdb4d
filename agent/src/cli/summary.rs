//! A few lines for a person who has just traced something: what ran, how often, how slow, where the time went.

use std::{collections::HashMap, fmt};

use crate::{
    sink::text::printable,
    span::{Outcome, Span, SpanKind, Trace},
};

/// Exports listed.
const MAX_LINES: usize = 10;
/// Durations kept per export for percentiles; beyond that, every other one is.
const MAX_DURATIONS: usize = 8192;
/// Exports told apart.
const MAX_EXPORTS: usize = 1024;

/// Running totals.
#[derive(Debug, Default)]
pub(super) struct Summary {
    exports: HashMap<(String, String), Export>,
    invocation_count: u64,
    host_call_count: u64,
    syscall_count: u64,
}

#[derive(Debug)]
struct Export {
    count: u64,
    failed_count: u64,
    cold_count: u64,
    durations_ns: Vec<u64>,
    /// One in this many durations is kept.
    stride: u64,
    guest_ns: u64,
    host_ns: u64,
    kernel_ns: u64,
    waiting_ns: u64,
}

impl Default for Export {
    fn default() -> Self {
        Self {
            count: 0,
            failed_count: 0,
            cold_count: 0,
            durations_ns: Vec::new(),
            stride: 1,
            guest_ns: 0,
            host_ns: 0,
            kernel_ns: 0,
            waiting_ns: 0,
        }
    }
}

impl Summary {
    pub(super) fn add(&mut self, trace: &Trace) {
        for span in trace.root.walk() {
            match span.kind {
                SpanKind::Invoke { .. } => self.invocation_count += 1,
                SpanKind::HostCall { .. } => self.host_call_count += 1,
                SpanKind::Syscall { .. } => self.syscall_count += 1,
                SpanKind::Trap { .. }
                | SpanKind::MemoryGrow(_)
                | SpanKind::TableGrow(_)
                | SpanKind::Interruption(_) => {}
            }
        }
        let key = match &trace.root.kind {
            SpanKind::Invoke {
                function: Some(function),
            } => (function.module.name.clone(), function.name.clone()),
            _ => ("?".to_owned(), "?".to_owned()),
        };
        if self.exports.len() < MAX_EXPORTS || self.exports.contains_key(&key) {
            let export = self.exports.entry(key).or_default();
            export.add(&trace.root);
            export.cold_count += trace.starts.cold.len() as u64;
        }
    }

    pub(super) fn trace_count(&self) -> u64 {
        self.exports.values().map(|export| export.count).sum()
    }

    /// One line of totals, for progress.
    pub(super) fn totals(&self) -> String {
        format!(
            "{} invocations  {} host calls  {} syscalls",
            grouped(self.invocation_count),
            grouped(self.host_call_count),
            grouped(self.syscall_count)
        )
    }
}

impl Export {
    fn add(&mut self, root: &Span) {
        if self.count.is_multiple_of(self.stride) {
            self.durations_ns.push(root.duration_ns());
        }
        if self.durations_ns.len() >= MAX_DURATIONS {
            let mut keep = false;
            self.durations_ns.retain(|_| {
                keep = !keep;
                keep
            });
            self.stride *= 2;
        }
        self.count += 1;
        if matches!(root.outcome, Outcome::Trap { .. } | Outcome::HostError) {
            self.failed_count += 1;
        }
        self.waiting_ns += root.suspended_ns();
        for span in root.walk() {
            match span.kind {
                SpanKind::Invoke { .. } => self.guest_ns += span.self_ns(),
                SpanKind::HostCall { .. }
                | SpanKind::MemoryGrow(_)
                | SpanKind::TableGrow(_)
                | SpanKind::Interruption(_) => self.host_ns += span.self_ns(),
                SpanKind::Syscall { on_helper: false, .. } => self.kernel_ns += span.duration_ns(),
                // The time of helper threads is that in which the guest waited for them.
                SpanKind::Syscall { .. } | SpanKind::Trap { .. } => {}
            }
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut exports: Vec<_> = self.exports.iter().collect();
        exports.sort_by(|(a_key, a), (b_key, b)| b.count.cmp(&a.count).then(a_key.cmp(b_key)));
        for ((module, export), totals) in exports.iter().take(MAX_LINES) {
            let mut sorted = totals.durations_ns.clone();
            sorted.sort_unstable();
            let at = |percent: usize| {
                sorted
                    .get((sorted.len().saturating_sub(1)) * percent / 100)
                    .copied()
                    .unwrap_or(0)
            };
            let all = (totals.guest_ns + totals.host_ns + totals.kernel_ns + totals.waiting_ns).max(1);
            let share = |part: u64| u128::from(part) * 100 / u128::from(all);
            let name = shortened(&printable(&format!("{module} {export}")), 40);
            write!(
                f,
                "{name:<40} {:>9}×   p50 {:>8}   p99 {:>8}   guest {}% host {}% kernel {}% suspended {}%",
                grouped(totals.count),
                crate::diagram::label::duration(at(50)),
                crate::diagram::label::duration(at(99)),
                share(totals.guest_ns),
                share(totals.host_ns),
                share(totals.kernel_ns),
                share(totals.waiting_ns),
            )?;
            if totals.failed_count > 0 {
                write!(f, "   {} failed", grouped(totals.failed_count))?;
            }
            match totals.cold_count {
                0 => {}
                1 => write!(f, "   1 cold start")?,
                count => write!(f, "   {} cold starts", grouped(count))?,
            }
            writeln!(f)?;
        }
        if exports.len() > MAX_LINES {
            writeln!(f, "… and {} more exports", exports.len() - MAX_LINES)?;
        }
        Ok(())
    }
}

fn shortened(name: &str, max_chars: usize) -> String {
    if name.chars().count() <= max_chars {
        return name.to_owned();
    }
    let mut short: String = name.chars().take(max_chars - 1).collect();
    short.push('…');
    short
}

/// Digits in groups of three.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_grouped_by_three() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_234_567), "1,234,567");
    }

    #[test]
    fn long_names_are_cut_where_it_shows() {
        assert_eq!(shortened("abcdef", 4), "abc…");
        assert_eq!(shortened("abcd", 4), "abcd");
    }
}
