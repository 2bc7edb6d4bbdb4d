//! A list of traces for a terminal.

use std::fmt::Write as _;

use unicode_width::UnicodeWidthStr as _;

use crate::{diagram::label::duration, recorder::Page, sink::text::bounded_line, sink::text::printable};

/// Longest name in a column, bytes.
const MAX_NAME_BYTES: usize = 40;

/// A line for each trace, below a line that says what the columns are.
pub(super) fn table(page: &Page) -> String {
    let mut rows = vec![
        [
            "TRACE ID",
            "BEGAN",
            "TOOK",
            "OUTCOME",
            "WHERE",
            "MODULE",
            "EXPORT",
            "SPANS",
            "KEPT BECAUSE",
        ]
        .map(str::to_owned),
    ];
    for summary in &page.traces {
        let kept: Vec<&str> = summary.kept_because.iter().map(|kept| kept.as_str()).collect();
        let name = |text: Option<&str>| printable(&bounded_line(text.unwrap_or("?"), MAX_NAME_BYTES));
        rows.push([
            summary.trace_id.to_string(),
            summary.start.clone(),
            duration(summary.duration_ns),
            name(summary.trap.as_deref().or(Some(&summary.outcome))),
            name(Some(&summary.place())),
            name(summary.module.as_deref()),
            name(summary.export.as_deref()),
            summary.span_count.to_string(),
            kept.join(","),
        ]);
    }
    let widths: Vec<usize> = (0..rows[0].len())
        .map(|column| rows.iter().map(|row| row[column].width()).max().unwrap_or_default())
        .collect();
    let mut out = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(cell);
            line.push_str(&" ".repeat(width - cell.width() + 2));
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    let shown = page.traces.len();
    if shown < page.matching_count {
        writeln!(out, "{} more match; --limit shows more", page.matching_count - shown)
            .expect("writing to a string cannot fail");
    }
    out
}
