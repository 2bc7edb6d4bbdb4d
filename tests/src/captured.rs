//! What `wasmscope trace --format json` says happened: counts of it, and whether it is put together as it must be.

use serde::Deserialize;
use wasmscope::span::{Bound, Capture, Function, Loss, Outcome, Parent, Pause, Process, Role, Span, SpanKind, Starts};

use crate::workload::{Counts, Numbers};

/// Syscalls that the C library and the runtime make for themselves at any time: memory, fibers' stacks and locks. The workloads do not count
/// them.
const NOT_COUNTED: [&str; 7] = ["brk", "mmap", "munmap", "mremap", "madvise", "mprotect", "futex"];
/// Where syscalls that no host call made are counted.
pub const NO_HOST_CALL: &str = "(no host call)";

/// Everything that was written.
#[derive(Debug)]
pub struct Captured {
    /// The traces.
    pub traces: Vec<Trace>,
    /// The account.
    pub capture: Capture,
}

/// One line of a trace.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[expect(missing_docs, reason = "the fields are described in wasmscope::sink::json")]
pub struct Trace {
    pub trace_id: String,
    pub start_unix_ns: u64,
    pub event_count: u64,
    pub losses: Vec<Loss>,
    pub process: Process,
    pub root: Span,
    pub starts: Starts,
    #[serde(default)]
    pub parent: Option<Parent>,
    #[serde(default)]
    pub pauses: Vec<Pause>,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Line {
    Trace(Box<Trace>),
    Capture(Capture),
}

impl Captured {
    /// Reads what was written; the account must be there, and last.
    pub fn parse<L: AsRef<str>>(lines: &[L]) -> Self {
        let mut traces = Vec::new();
        let mut account = None;
        for line in lines {
            assert_eq!(account, None, "a line after the account");
            match serde_json::from_str(line.as_ref()).unwrap_or_else(|error| panic!("{error}: {}", line.as_ref())) {
                Line::Trace(trace) => traces.push(*trace),
                Line::Capture(capture) => account = Some(capture),
            }
        }
        Self {
            traces,
            capture: account.expect("the account of the capture is written"),
        }
    }

    /// The same, of one process.
    #[must_use]
    pub fn of_process(mut self, pid: u32) -> Self {
        self.traces.retain(|trace| trace.process.pid == pid);
        self
    }

    /// The same, without invocations of modules whose names start in one way.
    #[must_use]
    pub fn without_modules(mut self, prefix: &str) -> Self {
        self.traces.retain(|trace| match &trace.root.kind {
            SpanKind::Invoke {
                function: Some(function),
            } => !function.module.name.starts_with(prefix),
            _ => true,
        });
        self
    }

    /// Counts all that was seen.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for trace in &self.traces {
            count(&trace.root, None, &mut counts);
        }
        counts
    }

    /// Fails if anything was lost anywhere, or is not accounted for.
    #[track_caller]
    pub fn assert_nothing_lost(&self) {
        assert_eq!(self.capture.losses, []);
        assert_eq!(self.capture.emitted_count, self.capture.delivered_count);
        assert_eq!(self.capture.trace_count, self.traces.len() as u64);
        for trace in &self.traces {
            assert_eq!(trace.losses, [], "of {}", trace.trace_id);
        }
    }

    /// Fails if anything was lost but syscalls of threads of which it was not known yet whether they run a guest, and the begins of host
    /// calls that ran while their probes were attached. The place of the activation is found on a thread that runs one, so a binary without
    /// symbols may start with some, and its host functions are learnt from a call.
    #[track_caller]
    pub fn assert_lost_only_before_calibration(&self) {
        let is_before = |loss: &Loss| match loss.layer.as_str() {
            "kernel" => loss.reason == "uncalibrated",
            "correlate" => loss.reason == "host_call_end_without_begin",
            _ => false,
        };
        assert!(self.capture.losses.iter().all(is_before), "{:?}", self.capture.losses);
        assert_eq!(self.capture.emitted_count, self.capture.delivered_count);
    }

    /// Losses for one reason.
    pub fn lost(&self, layer: &str, reason: &str) -> u64 {
        let matching = |loss: &&Loss| loss.layer == layer && loss.reason == reason;
        self.capture.losses.iter().filter(matching).map(|loss| loss.count).sum()
    }

    /// Fails unless every trace is nested, ordered and exact.
    #[track_caller]
    pub fn assert_well_formed(&self) {
        for trace in &self.traces {
            assert_eq!(trace.root.role(), Role::Invoke);
            assert!(trace.root.stack.is_empty());
            assert_well_formed(&trace.root);
            assert_exact(&trace.root);
        }
    }

    /// Fails unless every host call in invocations of `export`, and every syscall in those, was made by these guest functions, innermost first.
    #[track_caller]
    pub fn assert_called_from(&self, export: &str, stack: &[&str]) {
        let counts = self
            .traces
            .iter()
            .map(|trace| assert_called_from(&trace.root, false, export, stack));
        assert_ne!(counts.sum::<usize>(), 0, "nothing was called");
    }
}

/// See [`Captured::assert_called_from`].
#[track_caller]
fn assert_called_from(span: &Span, is_within: bool, export: &str, stack: &[&str]) -> usize {
    let is_within = match &span.kind {
        SpanKind::Invoke { function } => function.as_ref().is_some_and(|function| function.name == export),
        _ => is_within,
    };
    let mut count = 0;
    for child in &span.children {
        if is_within && child.role() == Role::HostCall
            || is_within && span.role() == Role::HostCall && child.role() == Role::Syscall
        {
            assert_eq!(stack_names(child), stack, "{child:?}");
            count += 1;
        }
        count += assert_called_from(child, is_within, export, stack);
    }
    count
}

/// Whether a syscall is of those that the workloads count where they make them.
pub fn is_counted(syscall: &str) -> bool {
    !NOT_COUNTED.contains(&syscall)
}

fn count(span: &Span, host_call: Option<&str>, counts: &mut Counts) {
    let mut host_call = host_call.map(str::to_owned);
    match &span.kind {
        SpanKind::Invoke { function } => {
            add(&mut counts.invocations, &name_of(function.as_deref()));
            match &span.outcome {
                Outcome::Trap { code } => add(&mut counts.traps, code),
                Outcome::HostError | Outcome::Exit => add(&mut counts.traps, span.outcome.as_str()),
                _ => {}
            }
            counts.suspends += span.suspends.len() as u64;
            for suspend in &span.suspends {
                counts.resumes += u64::from(suspend.end_ns.is_some());
                counts.moves += u64::from(suspend.to_tid.is_some_and(|tid| tid != suspend.from_tid));
            }
            host_call = None;
        }
        SpanKind::HostCall { import } => {
            let name = import
                .as_ref()
                .map_or_else(|| "?".to_owned(), |import| format!("{}.{}", import.module, import.name));
            add(&mut counts.host_calls, &name);
            host_call = Some(name);
        }
        SpanKind::Syscall { name, .. } => {
            if is_counted(name) {
                let host_call = host_call.clone().unwrap_or_else(|| NO_HOST_CALL.to_owned());
                add(counts.syscalls_by_host_call.entry(host_call).or_default(), name);
            }
        }
        SpanKind::Trap { .. } | SpanKind::MemoryGrow(_) | SpanKind::TableGrow(_) | SpanKind::Interruption(_) => {}
    }
    for child in &span.children {
        count(child, host_call.as_deref(), counts);
    }
}

fn add(numbers: &mut Numbers, name: &str) {
    *numbers.entry(name.to_owned()).or_default() += 1;
}

/// `module/function`.
pub fn name_of(function: Option<&Function>) -> String {
    function.map_or_else(
        || "?".to_owned(),
        |function| format!("{}/{}", function.module.name, function.name),
    )
}

/// Names of the guest functions on a span's stack, innermost first.
pub fn stack_names(span: &Span) -> Vec<&str> {
    span.stack.iter().map(|function| function.name.as_str()).collect()
}

/// Children lie inside of their parents, and all but those of helper threads follow each other; so do suspends.
#[track_caller]
fn assert_well_formed(span: &Span) {
    assert!(span.start_ns <= span.end_ns, "ends before it begins: {span:?}");
    let mut free_from_ns = span.start_ns;
    for child in &span.children {
        let begins_from_ns = if child.is_on_helper() {
            span.start_ns
        } else {
            free_from_ns
        };
        assert!(
            child.start_ns >= begins_from_ns && child.end_ns <= span.end_ns,
            "{:?} {}..{} is not after {free_from_ns} and inside of {:?} {}..{}",
            child.kind,
            child.start_ns,
            child.end_ns,
            span.kind,
            span.start_ns,
            span.end_ns
        );
        let fits = match span.role() {
            Role::Invoke => child.role() != Role::Invoke,
            Role::HostCall | Role::MemoryGrow | Role::TableGrow | Role::Interruption => {
                matches!(child.role(), Role::Invoke | Role::Syscall)
            }
            Role::Syscall | Role::Trap => false,
        };
        assert!(fits, "{:?} in {:?}", child.kind, span.kind);
        if !child.is_on_helper() {
            free_from_ns = child.end_ns;
        }
        assert_well_formed(child);
    }
    let mut free_from_ns = span.start_ns;
    for suspend in &span.suspends {
        let end_ns = suspend.end_ns.unwrap_or(span.end_ns);
        assert!(
            suspend.start_ns >= free_from_ns && suspend.start_ns <= end_ns,
            "{:?}: {suspend:?}",
            span.kind
        );
        assert!(end_ns <= span.end_ns, "{:?}: {suspend:?}", span.kind);
        free_from_ns = end_ns;
    }
}

/// Every end was observed, save that of a host call by which an invocation was unwound.
#[track_caller]
fn assert_exact(root: &Span) {
    for span in root.walk() {
        assert_eq!(span.start_bound, Bound::Exact, "begin of {span:?}");
        let is_unwound = span.role() == Role::HostCall && span.outcome == Outcome::HostError;
        assert!(
            span.end_bound == Bound::Exact || is_unwound,
            "end of {:?} {:?} {:?}",
            span.kind,
            span.outcome,
            span.end_bound
        );
    }
}
