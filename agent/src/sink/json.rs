//! The model itself as JSON lines, for scripts: a `trace` object for each trace, and a `capture` object at the end.
//!
//! Fields are added over time, never renamed or removed. All `_ns` fields are nanoseconds of `CLOCK_MONOTONIC`, except `start_unix_ns`.
//!
//! | object | fields |
//! |---|---|
//! | `trace` | `type` = `"trace"`, `trace_id` (32 hex digits), `start_unix_ns`, `event_count`, `losses`, `process`, `root`, `starts`, `parent` if it has one, `pauses` if there were any |
//! | `process` | `pid`, `start_ns` (boot time), `command`, `runtime_name`, `runtime_version`, `limits` |
//! | `root` and `children` | `start_ns`, `end_ns`, `start_bound`, `end_bound` (`exact`, `inferred`, `open`), `tid`, `kind`, `outcome`, `stack` (innermost first), `stack_truncated`, `children`, `suspends` |
//! | `kind` | `role` = `invoke` (`function`), `host_call` (`import`), `syscall` (`number`, `name`, `args` and `result` with 0 for addresses, `on_helper` where another thread made it for the host call), `trap` (`code`, `function`, `native_offset`, `wasm_offset`), `memory_grow` and `table_grow` (`instance`, `index`, `delta`, `old`, `new`, `page_bytes`, `maximum`, `function`, `wasm_offset`; sizes in pages or elements), `interruption` (`cause` = `fuel`, `epoch`; `function`, `wasm_offset`) |
//! | `outcome` | `outcome` = `ok`, `trap` (`code`), `host_error`, `exit`, `refused`, `errno` (`errno`), `unfinished`, `unknown` |
//! | `function`, `stack` | `module` (`name`, `hash`), `index`, `name` |
//! | `import` | `module`, `name` |
//! | `suspends` | `start_ns`, `end_ns`, `from_tid`, `to_tid` |
//! | `starts` | `is_warm` (of `root`), `cold`: `invoked_ns`, `tid`, `module`, `published_ns`, `phases` (`kind`, `start_ns`, `end_ns`, `tid`) |
//! | `losses` | `layer`, `reason`, `count` |
//! | `capture` | `type` = `"capture"`, `start_ns`, `end_ns`, `emitted_count`, `delivered_count`, `losses`, `kernel_release`, `replay_of`, `trace_count` |
//!
//! Spans nested deeper than [`MAX_DEPTH`](super::MAX_DEPTH) are left out and counted as a loss `export`/`depth` of their trace.

use std::borrow::Cow;
use std::io::{self, Write};

use serde::Serialize;

use super::MAX_DEPTH;
use crate::clock::ClockAnchor;
use crate::span::{Capture, Loss, Parent, Pause, Process, Span, Starts, Trace};

/// Writes the model as JSON lines.
#[derive(Debug)]
pub struct JsonWriter<W> {
    output: W,
    anchor: ClockAnchor,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Line<'a> {
    Trace {
        trace_id: String,
        start_unix_ns: u64,
        event_count: u64,
        losses: &'a [Loss],
        process: &'a Process,
        root: &'a Span,
        starts: &'a Starts,
        #[serde(skip_serializing_if = "Option::is_none")]
        parent: Option<&'a Parent>,
        #[serde(skip_serializing_if = "<[_]>::is_empty")]
        pauses: &'a [Pause],
    },
    Capture(&'a Capture),
}

impl<W: Write> JsonWriter<W> {
    /// `output` is best buffered.
    pub fn new(output: W, anchor: ClockAnchor) -> Self {
        Self { output, anchor }
    }

    /// Appends one trace. Fails as the writer fails.
    pub fn write(&mut self, trace: &Trace) -> io::Result<()> {
        let (root, cut_count) = within_depth(&trace.root);
        let mut losses = Cow::Borrowed(trace.losses.as_slice());
        if cut_count > 0 {
            losses.to_mut().push(Loss {
                layer: "export".to_owned(),
                reason: "depth".to_owned(),
                count: cut_count,
            });
        }
        let start_unix_ns = self
            .anchor
            .unix_ns
            .saturating_add(trace.root.start_ns)
            .saturating_sub(self.anchor.monotonic_ns);
        self.line(&Line::Trace {
            trace_id: trace.id.to_string(),
            start_unix_ns,
            event_count: trace.event_count,
            losses: &losses,
            process: &trace.process,
            root: &root,
            starts: &trace.starts,
            parent: trace.parent.as_ref(),
            pauses: &trace.pauses,
        })
    }

    /// Appends the account of the capture, flushes and gives the output back.
    pub fn finish(mut self, capture: &Capture) -> io::Result<W> {
        self.line(&Line::Capture(capture))?;
        self.output.flush()?;
        Ok(self.output)
    }

    /// Gives the output back without an account of a capture.
    pub fn into_inner(self) -> W {
        self.output
    }

    fn line(&mut self, line: &Line<'_>) -> io::Result<()> {
        serde_json::to_writer(&mut self.output, line)?;
        self.output.write_all(b"\n")
    }
}

/// The span down to [`MAX_DEPTH`], copied only when it is deeper, and how many spans that left out.
fn within_depth(root: &Span) -> (Cow<'_, Span>, u64) {
    let mut pending = vec![(root, 0)];
    let mut is_deeper = false;
    while let Some((span, depth)) = pending.pop() {
        is_deeper |= depth > MAX_DEPTH;
        pending.extend(span.children.iter().map(|child| (child, depth + 1)));
    }
    if !is_deeper {
        return (Cow::Borrowed(root), 0);
    }
    let mut cut_count = 0;
    let copy = copy_to_depth(root, MAX_DEPTH, &mut cut_count);
    (Cow::Owned(copy), cut_count)
}

fn copy_to_depth(span: &Span, depth: usize, cut_count: &mut u64) -> Span {
    let children = if depth == 0 {
        *cut_count += span.walk().count() as u64 - 1;
        Vec::new()
    } else {
        span.children
            .iter()
            .map(|child| copy_to_depth(child, depth - 1, cut_count))
            .collect()
    };
    Span {
        children,
        kind: span.kind.clone(),
        outcome: span.outcome.clone(),
        stack: span.stack.clone(),
        suspends: span.suspends.clone(),
        ..*span
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::sink::testing::{host_call, invoke, syscall, trace};

    const ANCHOR: ClockAnchor = ClockAnchor {
        monotonic_ns: 1_000,
        unix_ns: 1_700_000_000_000_000_000,
    };

    #[test]
    fn a_capture_is_a_line_for_each_trace_and_one_for_itself() {
        let mut call = host_call("fd_read\n\"", 2_000, 3_000);
        call.children = vec![syscall("read", 2_100, 2_900)];
        let mut root = invoke("handle_request", 1_500, 5_000);
        root.children = vec![call];
        let mut writer = JsonWriter::new(Vec::new(), ANCHOR);
        writer.write(&trace(root)).unwrap();
        let output = writer
            .finish(&Capture {
                trace_count: 1,
                ..Capture::default()
            })
            .unwrap();
        let lines: Vec<Value> = String::from_utf8(output)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0]["type"], json!("trace"));
        assert_eq!(lines[0]["trace_id"], json!("4b".repeat(16)));
        assert_eq!(lines[0]["start_unix_ns"], json!(1_700_000_000_000_000_500_u64));
        assert_eq!(
            lines[0]["root"]["children"][0]["kind"]["import"]["name"],
            json!("fd_read\n\"")
        );
        assert_eq!(
            lines[0]["root"]["children"][0]["children"][0]["kind"]["role"],
            json!("syscall")
        );
        assert_eq!(
            (&lines[1]["type"], &lines[1]["trace_count"]),
            (&json!("capture"), &json!(1))
        );
    }

    #[test]
    fn nesting_without_end_is_cut_counted_and_readable() {
        let mut root = invoke("leaf", 0, 1);
        root.stack = vec![crate::sink::testing::function("f")];
        for _ in 0..5_000 {
            let mut outer = invoke("run", 0, 1);
            outer.stack = root.stack.clone();
            outer.children = vec![root];
            root = outer;
        }
        let mut writer = JsonWriter::new(Vec::new(), ANCHOR);
        writer.write(&trace(root)).unwrap();
        let line: Value = serde_json::from_slice(&writer.output).unwrap();
        assert_eq!(
            line["losses"],
            json!([{"layer": "export", "reason": "depth", "count": 5_000 - MAX_DEPTH}])
        );
    }
}
