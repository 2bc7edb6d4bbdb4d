//! What holds for a diagram of any trace.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use crate::span::{Capture, Trace};

use super::model::{Arrow, Bar, Sequence, Step};
use super::samples::any_trace;
use super::{Format, MAX_DIAGRAM_CHARS, Options, sequence};

/// Set to a directory, it receives the Mermaid text of the diagrams drawn here, for `tests/mermaid/parse.mjs`.
const DUMP_VARIABLE: &str = "WASMSCOPE_DIAGRAM_DUMP";

fn drawn(trace: &Trace, capture: &Capture, format: Format, max_calls: usize) -> (Sequence, String) {
    let options = Options {
        format,
        max_calls,
        ..Options::default()
    };
    let sequence = sequence(trace, capture, &options);
    let text = format.render(&sequence, options.width_columns);
    (sequence, text)
}

/// Bars that begin and end, loops, and lifelines named, in order.
fn check_balance(sequence: &Sequence) {
    let mut bars = vec![0_i64; sequence.participants.len()];
    let mut loops = 0_i64;
    for step in &sequence.steps {
        match step {
            Step::Message {
                from, to, bar, arrow, ..
            } => {
                assert!(*from < bars.len() && *to < bars.len());
                match bar {
                    Bar::Begin => bars[*to] += 1,
                    Bar::End => bars[*from] -= 1,
                    Bar::Keep => assert_eq!(*arrow, Arrow::Call),
                }
            }
            Step::EndBar { at } => bars[*at] -= 1,
            Step::LoopBegin { .. } => loops += 1,
            Step::LoopEnd => loops -= 1,
            Step::Note { first, last, .. } | Step::Suspended { first, last, .. } => {
                assert!(first <= last && *last < bars.len());
            }
        }
        assert!(
            loops >= 0 && bars.iter().all(|count| *count >= 0),
            "ended before it began: {step:?}"
        );
    }
    assert!(loops == 0 && bars.iter().all(|count| *count == 0), "never ended");
}

/// Few enough for every run of the tests; `PROPTEST_CASES` asks for more.
fn config() -> ProptestConfig {
    let default = ProptestConfig::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() {
        default.cases
    } else {
        64
    };
    // A trace that fails is found again from its seed only by the same generator, so seeds are not kept.
    ProptestConfig {
        cases,
        failure_persistence: None,
        max_shrink_iters: 500,
        ..default
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_trace_is_drawn_whole_within_the_limit((trace, capture) in any_trace(), max_calls in prop_oneof![Just(120_usize), 0..40_usize, Just(usize::MAX)]) {
        for format in Format::ALL {
            let (sequence, text) = drawn(&trace, &capture, *format, max_calls);
            prop_assert!(text.chars().count() < MAX_DIAGRAM_CHARS);
            check_balance(&sequence);

            let totals = sequence.totals;
            prop_assert_eq!(totals.guest_ns + totals.host_ns + totals.kernel_ns + totals.suspended_ns, totals.duration_ns);
            prop_assert_eq!(totals.duration_ns, trace.root.duration_ns());
            prop_assert_eq!(totals.drawn_count + totals.repeated_count + totals.folded_count, totals.call_count);
            prop_assert!(text.chars().all(|character| character == '\n' || !character.is_control()));
            dump(*format, &text);
        }
    }

    #[test]
    fn a_terminal_line_is_never_wider_than_asked((trace, capture) in any_trace(), width_columns in 0..200_usize) {
        let options = Options { format: Format::Text, width_columns, ..Options::default() };
        let room = width_columns.max(super::text::MIN_WIDTH_COLUMNS);
        for line in super::draw(&trace, &capture, &options).lines() {
            let width: usize = line.chars().filter_map(unicode_width::UnicodeWidthChar::width).sum();
            prop_assert!(width <= room, "{width} columns: {line}");
        }
    }

    #[test]
    fn each_statement_of_mermaid_is_one_of_ours((trace, capture) in any_trace()) {
        let (_, text) = drawn(&trace, &capture, Format::Mermaid, 120);
        let ours = ["sequenceDiagram", "title ", "autonumber", "box rgba(", "participant ", "end", "loop ", "rect rgba(", "Note over ", "deactivate "];
        for line in text.lines() {
            let line = line.trim_start();
            let is_message = ["->>", "-x"].iter().any(|arrow| line.split_once(arrow).is_some_and(|(from, _)| from.len() <= 5));
            prop_assert!(is_message || ours.iter().any(|ours| line.starts_with(ours)), "{line}");
            let entities = line.replace(';', "");
            prop_assert!(!entities.contains("<script") && !line.contains('"') && !line.contains('`'));
        }
    }
}

fn dump(format: Format, text: &str) {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    if let (Format::Mermaid, Some(directory)) = (format, std::env::var_os(DUMP_VARIABLE)) {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = PathBuf::from(directory).join(format!("any-{number:04}.mmd"));
        std::fs::write(path, text).expect("the directory for diagrams takes files");
    }
}
