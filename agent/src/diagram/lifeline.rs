//! The lifelines of a diagram: which call belongs to which, and what is written on top of them.

use crate::span::{Interruption, Module, Span, SpanKind};

use super::draw::Drawing;
use super::label::visible;
use super::model::{Participant, ParticipantId, ParticipantKind};

/// Lifelines for guest modules; the rest share one.
const MAX_GUESTS: usize = 4;
/// Lifelines for modules of imports; the rest share one.
const MAX_INTERFACES: usize = 6;
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Lifeline<'t> {
    Host,
    Guest(Option<&'t Module>),
    OtherGuests,
    Interface(Option<&'t str>),
    OtherInterfaces,
    Kernel,
}

impl<'t> Drawing<'_, 't> {
    /// The lifeline that a call goes to.
    pub(super) fn callee(&mut self, span: &'t Span) -> ParticipantId {
        let wanted = lifeline_of(span);
        if let Some(known) = self.lifelines.iter().position(|known| *known == wanted) {
            return known;
        }
        let count =
            |is_counted: fn(&Lifeline) -> bool| self.lifelines.iter().filter(|lifeline| is_counted(lifeline)).count();
        let lifeline = match wanted {
            Lifeline::Guest(_) if count(|known| matches!(known, Lifeline::Guest(_))) == MAX_GUESTS => {
                Lifeline::OtherGuests
            }
            Lifeline::Interface(_) if count(|known| matches!(known, Lifeline::Interface(_))) == MAX_INTERFACES => {
                Lifeline::OtherInterfaces
            }
            _ => wanted,
        };
        self.lifelines
            .iter()
            .position(|known| *known == lifeline)
            .unwrap_or_else(|| {
                self.lifelines.push(lifeline);
                self.lifelines.len() - 1
            })
    }

    pub(super) fn participant(&self, lifeline: Lifeline) -> Participant {
        let process = &self.trace.process;
        let (kind, lines) = match lifeline {
            Lifeline::Host => {
                let version = process
                    .runtime_version
                    .as_deref()
                    .map(|version| format!(" {}", visible(version, 16)))
                    .unwrap_or_default();
                let runtime = format!("{}{version}", visible(&process.runtime_name, 24));
                (ParticipantKind::Host, vec![self.name(&process.command), runtime])
            }
            Lifeline::Guest(Some(module)) => (
                ParticipantKind::Guest,
                vec![self.name(&module.name), format!("sha256 {}", visible(&module.hash, 12))],
            ),
            Lifeline::Guest(None) => (ParticipantKind::Guest, vec!["guest".into(), "module not known".into()]),
            Lifeline::OtherGuests => (ParticipantKind::Guest, vec!["other guest modules".into()]),
            Lifeline::Interface(Some(module)) => (ParticipantKind::Interface, vec![self.name(module)]),
            Lifeline::Interface(None) => (ParticipantKind::Interface, vec!["host (unnamed import)".into()]),
            Lifeline::OtherInterfaces => (ParticipantKind::Interface, vec!["other interfaces".into()]),
            Lifeline::Kernel => {
                let mut lines = vec!["kernel".to_owned()];
                if !self.capture.kernel_release.is_empty() {
                    lines.push(format!("Linux {}", visible(&self.capture.kernel_release, 32)));
                }
                (ParticipantKind::Kernel, lines)
            }
        };
        Participant { kind, lines }
    }
}

/// Where a call goes; traps and what the runtime does for guests stay with the host that it is part of.
pub(super) fn lifeline_of(span: &Span) -> Lifeline<'_> {
    match &span.kind {
        SpanKind::Invoke { function } => Lifeline::Guest(function.as_ref().map(|function| &*function.module)),
        SpanKind::HostCall { import } => Lifeline::Interface(import.as_ref().map(|import| import.module.as_str())),
        SpanKind::Syscall { .. } => Lifeline::Kernel,
        SpanKind::Trap { .. } | SpanKind::MemoryGrow(_) | SpanKind::TableGrow(_) | SpanKind::Interruption(_) => {
            Lifeline::Host
        }
    }
}

/// What is called, without its module.
pub(super) fn callee_name(span: &Span) -> &str {
    match &span.kind {
        SpanKind::Invoke {
            function: Some(function),
        } => &function.name,
        SpanKind::Invoke { function: None } => "unknown function",
        SpanKind::HostCall { import: Some(import) } => &import.name,
        SpanKind::HostCall { import: None } => "unnamed host call",
        SpanKind::Syscall { name, .. } => name,
        SpanKind::Trap { .. } => "trap",
        SpanKind::MemoryGrow(_) => "memory.grow",
        SpanKind::TableGrow(_) => "table.grow",
        SpanKind::Interruption(Interruption { cause, .. }) => super::runtime::interruption(*cause),
    }
}
