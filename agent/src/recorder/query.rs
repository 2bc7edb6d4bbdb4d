//! Which of the kept traces are asked for, and what a list says of each.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::key::Wanted;
use super::time::{duration, instant, rfc3339};
use crate::clock::ClockAnchor;
use crate::span::{Certainty, Function, Outcome, Place, Process, Trace, TraceId};

/// Most traces in one answer.
pub const MAX_LIMIT: usize = 1000;
/// Traces in one answer unless asked otherwise.
pub const DEFAULT_LIMIT: usize = 50;
/// Fewest digits of an id that stand for it.
pub const MIN_ID_DIGITS: usize = 8;

/// A trace in a list. Names in it are untrusted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// 32 hex digits.
    pub trace_id: TraceId,
    /// The application's trace that it is part of; others may be part of it too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub application_trace_id: Option<TraceId>,
    /// When it began, nanoseconds since the Unix epoch.
    pub start_unix_ns: u64,
    /// The same as RFC 3339.
    pub start: String,
    /// How long it took, nanoseconds.
    pub duration_ns: u64,
    /// [`Outcome::as_str`] of the outermost invocation.
    pub outcome: String,
    /// What trapped, in the runtime's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trap: Option<String>,
    /// Namespace of the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Name of the pod, or its UID while the name is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// UID of the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<String>,
    /// Name of the container, or its id while the name is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// How sure it is that this is where the process runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place_certainty: Option<Certainty>,
    /// The process.
    pub pid: u32,
    /// Its command name.
    pub command: String,
    /// Name of the module.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
    /// Hash of the module.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module_hash: Option<String>,
    /// The exported function.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub export: Option<String>,
    /// Why it is kept; empty for one that no recorder keeps.
    #[serde(default)]
    pub kept_because: Vec<Kept>,
    /// Spans in it.
    pub span_count: u64,
    /// Kernel records it was made of.
    pub event_count: u64,
    /// What is known to be missing from it.
    pub loss_count: u64,
}

/// Why a trace is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kept {
    /// Among the slowest of its export.
    Slowest,
    /// It failed.
    Failed,
    /// By chance.
    Random,
}

impl Kept {
    /// The word used in queries and answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Slowest => "slowest",
            Self::Failed => "failed",
            Self::Random => "random",
        }
    }
}

/// What a list is ordered by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// The slowest first.
    #[default]
    Slowest,
    /// The latest first.
    Latest,
}

/// A question as it comes in a URL; every field narrows it down.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Question {
    /// An id, its own or that of the application's trace, or its first digits: [`MIN_ID_DIGITS`] at least.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
    /// Name of a pod, or its UID.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Namespace of the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Name of a container, or its id, or the id's first digits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// A pid, or the name of a command.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<String>,
    /// Name of a module, or its hash.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
    /// An exported function.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub export: Option<String>,
    /// `ok`, `trap`, `host_error`, …; the name of a trap; or `failed` for whatever is a failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<String>,
    /// Only what is kept for one reason: `slowest`, `failed`, `random`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept_because: Option<Kept>,
    /// Only what took at least this long: `250us`, `1.5ms`, `10s`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_duration: Option<String>,
    /// Only what was running then or later: RFC 3339, seconds since the epoch, or how long ago (`15m`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// Only what had begun by then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
    /// What comes first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,
    /// How many, at most [`MAX_LIMIT`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// `next_cursor` of the answer before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

/// A checked question.
#[derive(Clone, Debug, Default)]
pub struct Query {
    question: Question,
    ids: Option<(TraceId, TraceId)>,
    min_duration_ns: u64,
    since_unix_ns: u64,
    until_unix_ns: Option<u64>,
    order: Order,
    limit: usize,
    after: Option<Position>,
}

/// Where a trace stands in a list; greater comes first.
type Position = (u64, Reverse<TraceId>);

/// An answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Page {
    /// The traces, in order.
    pub traces: Vec<Summary>,
    /// How many match, on this page and on all others.
    pub matching_count: usize,
    /// How many are kept, whether they match or not.
    pub kept_count: usize,
    /// Asks for the rest, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

impl Question {
    /// Checks it. `now_unix_ns` is what relative times are relative to. The error is in words for whoever asked.
    pub fn check(self, now_unix_ns: u64) -> Result<Query, String> {
        let limit = self.limit.unwrap_or(DEFAULT_LIMIT);
        if !(1..=MAX_LIMIT).contains(&limit) {
            return Err(format!("limit is not between 1 and {MAX_LIMIT}"));
        }
        let time = |text: &Option<String>, name| {
            let time = text.as_deref().map(|text| instant(text, now_unix_ns)).transpose();
            time.map_err(|error| format!("{name}: {error}"))
        };
        Ok(Query {
            ids: self.trace_id.as_deref().map(id_range).transpose()?,
            min_duration_ns: self
                .min_duration
                .as_deref()
                .map_or(Ok(0), duration)
                .map_err(|error| format!("min_duration: {error}"))?,
            since_unix_ns: time(&self.since, "since")?.unwrap_or(0),
            until_unix_ns: time(&self.until, "until")?,
            order: self.order.unwrap_or_default(),
            limit,
            after: self.cursor.as_deref().map(position).transpose()?,
            question: self,
        })
    }
}

impl Query {
    /// Whether a trace is one of those asked for, wherever it is in the list.
    pub fn admits(&self, view: &View<'_>) -> bool {
        let question = &self.question;
        let place = &view.process.place;
        let module = view.function.map(|function| &*function.module);
        let pid = || Some(view.process.pid.to_string());
        self.ids.is_none_or(|range| view.is_in(range))
            && view.duration_ns >= self.min_duration_ns
            && view.start_unix_ns.saturating_add(view.duration_ns) >= self.since_unix_ns
            && self.until_unix_ns.is_none_or(|until| view.start_unix_ns <= until)
            && is(
                question.pod.as_ref(),
                &[place.pod_name.as_deref(), place.pod_uid.as_deref()],
            )
            && is(question.namespace.as_ref(), &[place.namespace.as_deref()])
            && question
                .container
                .as_deref()
                .is_none_or(|asked| is_container(place, asked))
            && (is(question.process.as_ref(), &[Some(&view.process.command)]) || question.process == pid())
            && is(
                question.module.as_ref(),
                &[module.map(|module| &*module.name), module.map(|module| &*module.hash)],
            )
            && is(
                question.export.as_ref(),
                &[view.function.map(|function| &*function.name)],
            )
            && question
                .outcome
                .as_deref()
                .is_none_or(|asked| has_outcome(view.outcome, asked))
            && question.kept_because.is_none_or(|asked| view.wanted.has(asked))
    }

    /// Where a trace stands in the list; greater comes first.
    pub(crate) fn position(&self, view: &View<'_>) -> Position {
        let first = match self.order {
            Order::Slowest => view.duration_ns,
            Order::Latest => view.start_unix_ns,
        };
        (first, Reverse(view.id))
    }

    /// How many are asked for.
    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// The page that was asked for, of all the traces there are.
    pub fn page<'a>(&self, all: impl Iterator<Item = View<'a>>, kept_count: usize) -> Page {
        // Of those that come next, the last in line first.
        let mut next = BTreeMap::new();
        let (mut matching_count, mut remaining_count) = (0, 0);
        for view in all.filter(|view| self.admits(view)) {
            matching_count += 1;
            let position = self.position(&view);
            if self.after.is_some_and(|after| position >= after) {
                continue;
            }
            remaining_count += 1;
            next.insert(position, view);
            if next.len() > self.limit {
                next.pop_first();
            }
        }
        let next_cursor = (remaining_count > self.limit)
            .then(|| next.first_key_value())
            .flatten()
            .map(|((first, Reverse(id)), _)| format!("{first}-{id}"));
        Page {
            traces: next.values().rev().map(View::summary).collect(),
            matching_count,
            kept_count,
            next_cursor,
        }
    }
}

/// What a trace is asked about: as cheap as a few references.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub(super) id: TraceId,
    pub(super) application_id: Option<TraceId>,
    pub(super) start_unix_ns: u64,
    pub(super) duration_ns: u64,
    pub(super) outcome: &'a Outcome,
    pub(super) process: &'a Process,
    pub(super) function: Option<&'a Function>,
    pub(super) wanted: Wanted,
    pub(super) span_count: u64,
    pub(super) event_count: u64,
    pub(super) loss_count: u64,
}

impl<'a> View<'a> {
    /// Of a trace that no recorder keeps.
    pub fn of(trace: &'a Trace, clock: ClockAnchor) -> Self {
        Self {
            id: trace.id,
            application_id: application_id(trace),
            start_unix_ns: unix_ns(trace.root.start_ns, clock),
            duration_ns: trace.root.duration_ns(),
            outcome: &trace.root.outcome,
            process: &trace.process,
            function: super::keep::function(trace).map(AsRef::as_ref),
            wanted: Wanted::default(),
            span_count: trace.root.walk().count() as u64,
            event_count: trace.event_count,
            loss_count: loss_count(trace),
        }
    }

    /// Whether one of its ids is in a range.
    fn is_in(&self, (first, last): (TraceId, TraceId)) -> bool {
        let is = |id: TraceId| (first..=last).contains(&id);
        is(self.id) || self.application_id.is_some_and(is)
    }

    /// What a list says of it.
    pub fn summary(&self) -> Summary {
        let place = &self.process.place;
        let module = self.function.map(|function| &function.module);
        Summary {
            trace_id: self.id,
            application_trace_id: self.application_id,
            start_unix_ns: self.start_unix_ns,
            start: rfc3339(self.start_unix_ns),
            duration_ns: self.duration_ns,
            outcome: self.outcome.as_str().to_owned(),
            trap: match self.outcome {
                Outcome::Trap { code } => Some(code.clone()),
                _ => None,
            },
            namespace: place.namespace.clone(),
            pod: place.pod_name.clone().or_else(|| place.pod_uid.clone()),
            pod_uid: place.pod_uid.clone(),
            container: place.container_name.clone().or_else(|| place.container_id.clone()),
            place_certainty: place.certainty(),
            pid: self.process.pid,
            command: self.process.command.clone(),
            module: module.map(|module| module.name.clone()),
            module_hash: module.map(|module| module.hash.clone()),
            export: self.function.map(|function| function.name.clone()),
            kept_because: self.wanted.reasons(),
            span_count: self.span_count,
            event_count: self.event_count,
            loss_count: self.loss_count,
        }
    }
}

impl Summary {
    /// Whether a person looking for trouble wants to see it.
    pub fn is_failure(&self) -> bool {
        matches!(self.outcome.as_str(), "trap" | "host_error" | "errno")
    }

    /// The pod, else the process.
    pub fn place(&self) -> String {
        match (&self.namespace, &self.pod) {
            (Some(namespace), Some(pod)) => format!("{namespace}/{pod}"),
            (None, Some(pod)) => pod.clone(),
            _ => format!("{}[{}]", self.command, self.pid),
        }
    }
}

/// A monotonic time as nanoseconds since the Unix epoch.
pub(super) fn unix_ns(monotonic_ns: u64, clock: ClockAnchor) -> u64 {
    clock
        .unix_ns
        .saturating_add(monotonic_ns)
        .saturating_sub(clock.monotonic_ns)
}

/// The application's trace that a trace is part of.
pub(super) fn application_id(trace: &Trace) -> Option<TraceId> {
    trace.parent.as_ref().map(|parent| parent.trace_id)
}

/// What is known to be missing from a trace, all reasons together.
pub(super) fn loss_count(trace: &Trace) -> u64 {
    trace.losses.iter().map(|loss| loss.count).fold(0, u64::saturating_add)
}

/// Whether one of the names is the one asked for, if any is.
fn is(asked: Option<&String>, names: &[Option<&str>]) -> bool {
    asked.is_none_or(|asked| names.iter().flatten().any(|name| name == asked))
}

/// By name or id; twelve digits of the id will do, as container tools print them.
fn is_container(place: &Place, asked: &str) -> bool {
    const SHORT_ID_DIGITS: usize = 12;
    place.container_name.as_deref() == Some(asked)
        || place
            .container_id
            .as_deref()
            .is_some_and(|id| id == asked || (asked.len() >= SHORT_ID_DIGITS && id.starts_with(asked)))
}

impl Wanted {
    fn has(self, kept: Kept) -> bool {
        match kept {
            Kept::Slowest => self.slowest,
            Kept::Failed => self.failed,
            Kept::Random => self.random,
        }
    }

    pub(super) fn reasons(self) -> Vec<Kept> {
        [
            (self.slowest, Kept::Slowest),
            (self.failed, Kept::Failed),
            (self.random, Kept::Random),
        ]
        .into_iter()
        .filter_map(|(is, kept)| is.then_some(kept))
        .collect()
    }
}

fn has_outcome(outcome: &Outcome, asked: &str) -> bool {
    match asked {
        "failed" => outcome.is_failure(),
        _ => outcome.as_str() == asked || matches!(outcome, Outcome::Trap { code } if code == asked),
    }
}

/// The ids that begin with some digits.
pub(super) fn id_range(digits: &str) -> Result<(TraceId, TraceId), String> {
    let digits = digits.trim().to_ascii_lowercase();
    if !(MIN_ID_DIGITS..=32).contains(&digits.len()) || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(format!(
            "a trace id is 32 hex digits, or the first {MIN_ID_DIGITS} or more of them"
        ));
    }
    let end = |fill: char| {
        let text: String = digits.chars().chain(std::iter::repeat(fill)).take(32).collect();
        text.parse()
            .map_err(|error: crate::span::NotATraceId| error.to_string())
    };
    Ok((end('0')?, end('f')?))
}

fn position(cursor: &str) -> Result<Position, String> {
    let parsed = cursor
        .split_once('-')
        .and_then(|(first, id)| Some((first.parse().ok()?, Reverse(id.parse().ok()?))));
    parsed.ok_or_else(|| "cursor is not the next_cursor of an answer".to_owned())
}
