//! Sequence diagrams: one model of a sequence, drawn from a [`Trace`], and one file per format.
//!
//! ```text
//! Trace ─ timeline (flat tree, exact accounting) ─ fold (repeats) ─ select (what to show) ─ draw ─> Sequence ─ mermaid | text
//! ```
//!
//! [`sequence`] decides what is shown and how much of it is folded; a format only writes down what it is given. A diagram of any
//! trace has fewer than [`MAX_DIAGRAM_CHARS`] characters and says what it left out. To add a format, write its file and add it to
//! [`Format`]; nothing else has to know.

mod draw;
mod fold;
pub(crate) mod label;
mod lifeline;
pub mod mermaid;
mod model;
mod runtime;
mod select;
mod summary;
mod syscall;
pub mod text;
mod timeline;
mod words;

#[cfg(test)]
mod properties;
#[cfg(test)]
mod samples;
#[cfg(test)]
mod tests;

use std::str::FromStr;

use crate::span::{Capture, Trace};

pub use model::{Arrow, Bar, Group, Participant, ParticipantId, ParticipantKind, Sequence, Step, Totals};

use fold::Fold;
use timeline::Timeline;

/// Every diagram is shorter than this, in characters: Mermaid's default `maxTextSize`, which renderers rarely raise.
pub const MAX_DIAGRAM_CHARS: usize = 50_000;

/// How a sequence is written down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Format {
    /// Mermaid's `sequenceDiagram`, as GitHub, GitLab, Grafana and most wikis draw it.
    #[default]
    Mermaid,
    /// Unicode box characters for a terminal.
    Text,
}

impl Format {
    /// All of them, in the order in which help should list them.
    pub const ALL: &'static [Self] = &[Self::Mermaid, Self::Text];

    /// The word for it on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mermaid => "mermaid",
            Self::Text => "text",
        }
    }

    /// How its files end, without the dot.
    pub fn extension(self) -> &'static str {
        match self {
            Self::Mermaid => "mmd",
            Self::Text => "txt",
        }
    }

    /// Writes a sequence down; `width_columns` matters to [`Format::Text`] only.
    pub fn render(self, sequence: &Sequence, width_columns: usize) -> String {
        match self {
            Self::Mermaid => mermaid::render(sequence),
            Self::Text => text::render(sequence, width_columns),
        }
    }
}

/// The word is not the name of a [`Format`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no diagram format of that name; there are: {}", names())]
pub struct UnknownFormat;

fn names() -> String {
    Format::ALL
        .iter()
        .map(|format| format.name())
        .collect::<Vec<_>>()
        .join(", ")
}

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(word: &str) -> Result<Self, UnknownFormat> {
        Self::ALL
            .iter()
            .copied()
            .find(|format| format.name() == word)
            .ok_or(UnknownFormat)
    }
}

/// What the reader wants to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The format that the sequence has to fit in [`MAX_DIAGRAM_CHARS`].
    pub format: Format,
    /// Width for [`Format::Text`], terminal columns; [`text::MIN_WIDTH_COLUMNS`] at least.
    pub width_columns: usize,
    /// Calls that are drawn before the least important ones are folded; a diagram of more than a few hundred is hard to read.
    pub max_calls: usize,
    /// Lines added to the closing note by a caller who knows more: pod, wall time, paused probes. At most 8 are shown.
    pub remarks: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            format: Format::default(),
            width_columns: text::DEFAULT_WIDTH_COLUMNS,
            max_calls: 120,
            remarks: Vec::new(),
        }
    }
}

/// How much is shown; tried from generous to terse until the diagram fits.
#[derive(Clone, Copy, Debug)]
struct Detail {
    /// Calls drawn at most, the root included.
    max_calls: usize,
    /// Longest name, characters.
    max_name_chars: usize,
}

/// Draws one trace: who called whom, for how long, what was folded, what was lost.
///
/// The sequence fits [`MAX_DIAGRAM_CHARS`] when it is rendered with the format and width of `options`.
/// Takes time and space linear in the number of spans, and no stack that grows with their depth.
pub fn sequence(trace: &Trace, capture: &Capture, options: &Options) -> Sequence {
    let timeline = Timeline::new(&trace.root);
    let attempt = |fold: &Fold, detail: Detail| {
        let selection = select::Selection::new(&timeline, fold, detail.max_calls);
        let complete = selection.is_complete();
        let sequence = draw::draw(trace, capture, options, &timeline, &selection, detail.max_name_chars);
        (sequence, complete)
    };
    let fits = |sequence: &Sequence| {
        options.format.render(sequence, options.width_columns).chars().count() < MAX_DIAGRAM_CHARS
    };

    let generous = Detail {
        max_calls: options.max_calls.clamp(1, MAX_CALLS),
        max_name_chars: 48,
    };
    let exact = Fold::exact(&timeline);
    let (sequence, complete) = attempt(&exact, generous);
    if complete && fits(&sequence) {
        return sequence;
    }
    drop(exact);
    // Folding calls that differ only inside often makes room for all; else the least important go, more and more of them.
    let loose = Fold::loose(&timeline);
    let mut detail = generous;
    loop {
        let (sequence, _) = attempt(&loose, detail);
        if detail.max_calls == 1 || fits(&sequence) {
            return sequence;
        }
        detail = Detail {
            max_calls: detail.max_calls * 2 / 3,
            max_name_chars: (detail.max_name_chars * 3 / 4).max(16),
        };
        detail.max_calls = detail.max_calls.max(1);
    }
}

/// No diagram shows more calls, whatever was asked for: each takes more than 25 characters.
const MAX_CALLS: usize = MAX_DIAGRAM_CHARS / 25;

/// [`sequence`], rendered with the format and width of `options`; shorter than [`MAX_DIAGRAM_CHARS`].
pub fn draw(trace: &Trace, capture: &Capture, options: &Options) -> String {
    options
        .format
        .render(&sequence(trace, capture, options), options.width_columns)
}
