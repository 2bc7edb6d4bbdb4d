//! The list of kept traces as a page for a person: no scripts, nothing from elsewhere.

use std::fmt::Write as _;

use super::{Format, Page, Question, Summary};
use crate::sink::text::printable;

pub(super) const STYLE: &str = "body{font:14px system-ui,sans-serif;margin:1.5em}\
table{border-collapse:collapse}td,th{padding:.3em .8em;text-align:left;border-bottom:1px solid #ccc}\
td.number{text-align:right;font-variant-numeric:tabular-nums}tr.failed td.outcome{color:#b00}input{margin-right:.6em}";

/// The page. Whatever traced processes chose is escaped.
pub(super) fn html(page: &Page, question: &Question) -> String {
    let mut out = String::from(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>wasmscope: kept traces</title>\
         <link rel=\"stylesheet\" href=\"/ui/style.css\"></head><body><h1>Kept traces</h1>\n<form action=\"/ui\">",
    );
    let fields = [
        ("namespace", &question.namespace),
        ("pod", &question.pod),
        ("module", &question.module),
        ("export", &question.export),
        ("outcome", &question.outcome),
        ("since", &question.since),
    ];
    for (name, value) in fields {
        let value = escaped(value.as_deref().unwrap_or_default());
        write(
            &mut out,
            format_args!("<label>{name} <input name=\"{name}\" value=\"{value}\" size=\"12\"></label>"),
        );
    }
    write(
        &mut out,
        format_args!(
            "<button>show</button></form>\n<p>{} of {} kept traces match; {} are shown. \
             <a href=\"/ui?outcome=failed&amp;order=latest\">failed</a> · <a href=\"/ui?order=latest\">latest</a> · \
             <a href=\"/ui\">slowest</a></p>\n",
            page.matching_count,
            page.kept_count,
            page.traces.len()
        ),
    );
    out.push_str(
        "<table><tr><th>began<th>took<th>outcome<th>where<th>module<th>export<th>spans<th>kept because<th>open</tr>\n",
    );
    for summary in &page.traces {
        row(&mut out, summary);
    }
    out.push_str("</table></body></html>\n");
    out
}

fn row(out: &mut String, summary: &Summary) {
    let class = if summary.is_failure() { " class=\"failed\"" } else { "" };
    let kept: Vec<&str> = summary.kept_because.iter().map(|kept| kept.as_str()).collect();
    write(
        out,
        format_args!(
            "<tr{class}><td>{}<td class=\"number\">{}<td class=\"outcome\">{}<td>{}<td>{}<td>{}<td class=\"number\">{}<td>{}<td>",
            summary.start,
            crate::diagram::label::duration(summary.duration_ns),
            escaped(summary.trap.as_deref().unwrap_or(&summary.outcome)),
            escaped(&summary.place()),
            escaped(summary.module.as_deref().unwrap_or("?")),
            escaped(summary.export.as_deref().unwrap_or("?")),
            summary.span_count,
            kept.join(", "),
        ),
    );
    for format in Format::all() {
        let name = format.name();
        write(
            out,
            format_args!("<a href=\"/api/v1/traces/{}.{name}\">{name}</a> ", summary.trace_id),
        );
    }
    out.push_str("</tr>\n");
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in printable(text).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

fn write(out: &mut String, words: std::fmt::Arguments<'_>) {
    out.write_fmt(words).expect("writing to a string cannot fail");
}
