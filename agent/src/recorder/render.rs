//! A kept trace in every format that there is: one table for the API, the page and the command line.

use std::fmt::Write as _;
use std::str::FromStr;

use super::compact::Bounded;
use super::{Context, Kept};
use crate::clock::ClockAnchor;
use crate::diagram;
use crate::sink::{json::JsonWriter, otlp_json::OtlpJsonWriter};
use crate::span::{Capture, Trace};

/// Largest text of one trace, bytes.
pub const MAX_TEXT_BYTES: usize = 16 << 20;

/// What a trace is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A sequence diagram.
    Diagram(diagram::Format),
    /// The model, one JSON object.
    Json,
    /// OTLP/JSON.
    Otlp,
}

impl Format {
    /// All of them, diagrams first.
    pub fn all() -> impl Iterator<Item = Self> {
        let diagrams = diagram::Format::ALL.iter().copied().map(Self::Diagram);
        diagrams.chain([Self::Json, Self::Otlp])
    }

    /// The word for it in URLs and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Diagram(format) => format.name(),
            Self::Json => "json",
            Self::Otlp => "otlp",
        }
    }

    /// How its files end, without the dot.
    pub fn extension(self) -> &'static str {
        match self {
            Self::Diagram(format) => format.extension(),
            Self::Json => "json",
            Self::Otlp => "otlp.json",
        }
    }

    /// Its media type.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Diagram(diagram::Format::Mermaid) => "text/vnd.mermaid; charset=utf-8",
            Self::Diagram(diagram::Format::Text) => "text/plain; charset=utf-8",
            Self::Json | Self::Otlp => "application/json",
        }
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        Self::all().find(|format| format.name() == word).ok_or_else(|| {
            let names: Vec<_> = Self::all().map(Self::name).collect();
            format!("no format of that name; there are: {}", names.join(", "))
        })
    }
}

/// Why a trace cannot be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the trace is larger than {} MiB in this format; a diagram of it is not", MAX_TEXT_BYTES >> 20)]
pub struct TooLong;

/// Writes one trace. `width_columns` matters to diagrams for a terminal.
pub fn render(trace: &Trace, context: &Context, format: Format, width_columns: usize) -> Result<String, TooLong> {
    let bounded = Bounded {
        output: Vec::new(),
        max_bytes: MAX_TEXT_BYTES,
    };
    let bytes = match format {
        Format::Diagram(format) => return Ok(drawn(trace, context, format, width_columns)),
        Format::Json => {
            let mut writer = JsonWriter::new(bounded, context.clock);
            writer.write(trace).map_err(|_| TooLong)?;
            writer.into_inner().output
        }
        Format::Otlp => {
            let mut writer = OtlpJsonWriter::new(bounded, context.clock);
            writer.write(trace).map_err(|_| TooLong)?;
            writer.finish().map_err(|_| TooLong)?.output
        }
    };
    String::from_utf8(bytes).map_err(|_| TooLong)
}

fn drawn(trace: &Trace, context: &Context, format: diagram::Format, width_columns: usize) -> String {
    let options = diagram::Options {
        format,
        width_columns,
        remarks: remarks(trace, context),
        ..diagram::Options::default()
    };
    diagram::draw(trace, &context.capture, &options)
}

fn remarks(trace: &Trace, context: &Context) -> Vec<String> {
    let start_unix_ns = super::query::unix_ns(trace.root.start_ns, context.clock);
    let mut lines = vec![format!("began {}", super::time::rfc3339(start_unix_ns))];
    let reasons: Vec<&str> = context.kept_because.iter().map(|kept| kept.as_str()).collect();
    if !reasons.is_empty() {
        lines.push(format!("kept by the recorder because: {}", reasons.join(", ")));
    }
    let place = &trace.process.place;
    if let Some(pod) = place.pod_name.as_ref().or(place.pod_uid.as_ref()) {
        let mut line = String::from("pod ");
        if let Some(namespace) = &place.namespace {
            let _ = write!(line, "{namespace}/");
        }
        line.push_str(pod);
        if let Some(container) = place.container_name.as_ref().or(place.container_id.as_ref()) {
            let _ = write!(line, ", container {container}");
        }
        if let Some(certainty) = place.certainty() {
            let _ = write!(line, " ({})", certainty.as_str());
        }
        lines.push(line);
    }
    lines
}

impl Context {
    /// Of a trace that no recorder keeps.
    pub fn of_capture(clock: ClockAnchor, capture: Capture) -> Self {
        Self {
            clock,
            capture,
            kept_because: Vec::<Kept>::new(),
        }
    }
}
