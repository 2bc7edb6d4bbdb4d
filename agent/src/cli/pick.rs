//! Which of many traces is drawn.

use std::{fmt::Write as _, sync::Arc};

use clap::ValueEnum;

use crate::span::{SpanKind, Trace};

/// Which trace is drawn when there are many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Pick {
    /// The one that took longest
    #[default]
    Slowest,
    /// The slowest of those that trapped or were unwound by a host error
    Failed,
    /// The first that ended
    First,
    /// The last that ended
    Last,
}

/// Which traces are considered.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct Choice {
    /// Which trace to draw when there are many
    #[arg(long, value_enum, default_value_t)]
    pick: Pick,
    /// Only traces whose outermost call entered this exported function
    #[arg(long, value_name = "NAME")]
    export: Option<String>,
    /// Only the trace with this id (32 hex digits), as the diagram's last note and the OTLP spans give it
    #[arg(long, value_name = "ID")]
    trace_id: Option<String>,
}

/// Keeps the one trace that will be drawn.
#[derive(Debug)]
pub(super) struct Picker {
    choice: Choice,
    best: Option<Arc<Trace>>,
}

impl Picker {
    pub(super) fn new(choice: Choice) -> Self {
        Self { choice, best: None }
    }

    pub(super) fn consider(&mut self, trace: &Arc<Trace>) {
        if self.choice.admits(trace) && self.best.as_ref().is_none_or(|best| self.choice.prefers(trace, best)) {
            self.best = Some(trace.clone());
        }
    }

    pub(super) fn best(&self) -> Option<&Arc<Trace>> {
        self.best.as_ref()
    }

    /// Why nothing was picked, in words for a person.
    pub(super) fn nothing(&self) -> String {
        let mut words = String::from("no invocation was seen");
        if let Some(export) = &self.choice.export {
            write!(words, " of {export:?}").expect("writing to a string cannot fail");
        }
        if let Some(id) = &self.choice.trace_id {
            write!(words, " with trace id {id:?}").expect("writing to a string cannot fail");
        }
        if self.choice.pick == Pick::Failed {
            words.push_str(" that failed");
        }
        words
    }
}

impl Choice {
    fn admits(&self, trace: &Trace) -> bool {
        let function = match &trace.root.kind {
            SpanKind::Invoke { function } => function.as_ref().map(|function| function.name.as_str()),
            _ => None,
        };
        self.export
            .as_ref()
            .is_none_or(|export| function == Some(export.as_str()))
            && self
                .trace_id
                .as_ref()
                .is_none_or(|id| id.eq_ignore_ascii_case(&trace.id.to_string()))
            && (self.pick != Pick::Failed || trace.root.outcome.is_failure())
    }

    fn prefers(&self, new: &Trace, best: &Trace) -> bool {
        match self.pick {
            Pick::Slowest | Pick::Failed => new.root.duration_ns() > best.root.duration_ns(),
            Pick::First => false,
            Pick::Last => true,
        }
    }
}
