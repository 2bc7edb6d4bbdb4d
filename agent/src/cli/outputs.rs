//! Where traces go, the same for a live trace and a replay: one diagram at the end, or every trace as it completes; and
//! beside that metrics and a summary.

use std::{
    fs::File,
    io::{self, BufWriter, IsTerminal as _, LineWriter, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use clap::ValueEnum;

use super::{
    cold::ColdModules,
    pick::{Choice, Picker},
    summary::Summary,
};
use crate::{
    clock::ClockAnchor,
    diagram,
    event::Event,
    metrics::Metrics,
    sink::{
        json::JsonWriter,
        otlp::{Exporter, ExporterConfig},
        otlp_json::OtlpJsonWriter,
    },
    span::{Capture, Loss, Trace},
};

/// How long a collector may take to accept what is left at the end.
const EXPORT_DEADLINE: Duration = Duration::from_secs(10);

/// What traces are written as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// One trace as a Mermaid sequence diagram
    #[default]
    Mermaid,
    /// One trace as a sequence diagram for a terminal
    Text,
    /// Every trace, one JSON object a line
    Json,
    /// Every trace as OTLP spans: to the collector named by the `OTEL_EXPORTER_OTLP_*` variables, or as OTLP/JSON lines
    /// with --output
    Otlp,
}

/// The options that say where traces go.
#[derive(Debug, clap::Args)]
pub(super) struct OutputArguments {
    /// What traces are written as
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Write to this file instead of standard output; it appears when it is complete
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    choice: Choice,
    /// Columns of `--format text` [default: the terminal's, else 100]
    #[arg(long, value_name = "COLUMNS")]
    width: Option<usize>,
    /// Also write metrics to this file at the end, as `OpenMetrics` text
    #[arg(long, value_name = "FILE")]
    metrics_file: Option<PathBuf>,
}

/// The outputs at work.
pub(super) struct Outputs {
    arguments: OutputArguments,
    picker: Picker,
    stream: Stream,
    metrics: Arc<Metrics>,
    summary: Summary,
    cold: ColdModules,
}

enum Stream {
    None,
    Json(JsonWriter<Target>),
    OtlpJson(OtlpJsonWriter<Target>),
    Otlp(Box<Exporter>),
}

/// Of a line, written in one go.
const LINE_BYTES: usize = 64 << 10;

/// Standard output, or a file that takes its place under its name only when it is complete.
pub(super) enum Target {
    Stdout(io::StdoutLock<'static>),
    /// A device or a pipe, a line at a time.
    Special(LineWriter<File>),
    File {
        file: BufWriter<tempfile::NamedTempFile>,
        path: PathBuf,
    },
}

impl OutputArguments {
    /// Whether metrics are written to a file.
    pub(super) fn has_metrics(&self) -> bool {
        self.metrics_file.is_some()
    }
}

impl Outputs {
    /// Opens them. Fails before anything is traced if one cannot be written.
    pub(super) fn open(arguments: OutputArguments, clock: ClockAnchor, metrics: Metrics) -> anyhow::Result<Self> {
        let stream = match (arguments.format, &arguments.output) {
            (Format::Json, _) => Stream::Json(JsonWriter::new(Target::open(arguments.output.as_deref())?, clock)),
            (Format::Otlp, Some(path)) => Stream::OtlpJson(OtlpJsonWriter::new(Target::open(Some(path))?, clock)),
            (Format::Otlp, None) => {
                Stream::Otlp(Box::new(Exporter::start(&ExporterConfig::from_environment()?, clock)?))
            }
            (Format::Mermaid | Format::Text, path) => {
                if let Some(path) = path {
                    // Not kept: it only proves that the file can be made.
                    drop(Target::open(Some(path))?);
                }
                Stream::None
            }
        };
        if let Some(path) = &arguments.metrics_file {
            drop(Target::open(Some(path))?);
        }
        Ok(Self {
            picker: Picker::new(arguments.choice.clone()),
            arguments,
            stream,
            metrics: Arc::new(metrics),
            summary: Summary::default(),
            cold: ColdModules::default(),
        })
    }

    /// The metrics, to be served while they grow.
    pub(super) fn metrics(&self) -> Arc<Metrics> {
        self.metrics.clone()
    }

    pub(super) fn summary(&self) -> &Summary {
        &self.summary
    }

    pub(super) fn events<'a>(&mut self, events: impl IntoIterator<Item = &'a Event>) {
        for event in events {
            self.metrics.observe_events(event.kind.name(), 1);
            self.cold.event(event, |count| count.observe(&self.metrics));
        }
    }

    pub(super) fn losses(&mut self, losses: &[Loss]) {
        for loss in losses {
            self.metrics.observe_loss(loss);
        }
    }

    pub(super) fn traces(&mut self, traces: Vec<Trace>) -> anyhow::Result<()> {
        for trace in traces {
            let trace = Arc::new(trace);
            self.metrics.observe_trace(&trace);
            self.metrics.exemplify(&trace);
            self.cold.trace(&trace, |count| count.observe(&self.metrics));
            self.summary.add(&trace);
            self.picker.consider(&trace);
            match &mut self.stream {
                Stream::None => {}
                Stream::Json(writer) => writer.write(&trace).context("while writing traces")?,
                Stream::OtlpJson(writer) => writer.write(&trace).context("while writing spans")?,
                // It counts what it does not take.
                Stream::Otlp(exporter) => drop(exporter.offer(trace)),
            }
        }
        Ok(())
    }

    /// Writes what is written at the end.
    pub(super) async fn finish(mut self, capture: &Capture) -> anyhow::Result<()> {
        // Metrics are worth having where there is nothing to draw.
        let mut drawn = Ok(());
        match std::mem::replace(&mut self.stream, Stream::None) {
            Stream::None => drawn = self.diagram(capture),
            Stream::Json(writer) => writer.finish(capture).context("while writing traces")?.finish()?,
            Stream::OtlpJson(writer) => writer.finish().context("while writing spans")?.finish()?,
            Stream::Otlp(exporter) => {
                let counts = exporter.shutdown(EXPORT_DEADLINE).await;
                for loss in counts.losses() {
                    self.metrics.set_loss_total(&loss);
                }
                eprintln!("exported {} of {} traces", counts.exported, counts.offered);
                if counts.lost() > 0 {
                    let reasons: Vec<_> = counts
                        .losses()
                        .iter()
                        .map(|loss| format!("{} {}", loss.count, loss.reason))
                        .collect();
                    eprintln!("lost {}", reasons.join(", "));
                }
            }
        }
        self.write_metrics()?;
        drawn
    }

    /// Ends a run that has nothing but metrics.
    pub(super) fn finish_metrics_only(self) -> anyhow::Result<()> {
        self.write_metrics()
    }

    fn write_metrics(&self) -> anyhow::Result<()> {
        if let Some(path) = &self.arguments.metrics_file {
            let mut target = Target::open(Some(path))?;
            target
                .write_all(self.metrics.encode().as_bytes())
                .with_context(|| format!("while writing {}", path.display()))?;
            target.finish()?;
        }
        Ok(())
    }

    fn diagram(&self, capture: &Capture) -> anyhow::Result<()> {
        let Some(trace) = self.picker.best() else {
            anyhow::bail!("nothing to draw: {}", self.picker.nothing());
        };
        let options = diagram::Options {
            format: match self.arguments.format {
                Format::Text => diagram::Format::Text,
                _ => diagram::Format::Mermaid,
            },
            width_columns: self.arguments.width.unwrap_or_else(terminal_columns),
            ..diagram::Options::default()
        };
        let mut target = Target::open(self.arguments.output.as_deref())?;
        target
            .write_all(diagram::draw(trace, capture, &options).as_bytes())
            .context("while writing the diagram")?;
        target.finish()?;
        if let Some(path) = &self.arguments.output {
            eprintln!("wrote {}", path.display());
        }
        Ok(())
    }
}

impl Target {
    pub(super) fn open(path: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = path else {
            return Ok(Self::Stdout(io::stdout().lock()));
        };
        let cannot = || format!("cannot write {}", path.display());
        if path.exists() && !path.is_file() {
            // Written in place.
            let file = File::options().write(true).open(path).with_context(cannot)?;
            return Ok(Self::Special(LineWriter::with_capacity(LINE_BYTES, file)));
        }
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let file = tempfile::NamedTempFile::new_in(directory).with_context(cannot)?;
        Ok(Self::File {
            file: BufWriter::new(file),
            path: path.to_owned(),
        })
    }

    pub(super) fn finish(mut self) -> anyhow::Result<()> {
        self.flush().context("while writing the output")?;
        if let Self::File { file, path } = self {
            let cannot = || format!("cannot write {}", path.display());
            let file = file
                .into_inner()
                .map_err(io::IntoInnerError::into_error)
                .with_context(cannot)?;
            // Made private by default; an output is as readable as any file its user makes.
            set_default_mode(file.as_file()).with_context(cannot)?;
            file.persist(&path).map_err(|error| error.error).with_context(cannot)?;
        }
        Ok(())
    }
}

fn set_default_mode(file: &File) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let mask = rustix::process::umask(rustix::fs::Mode::empty());
    rustix::process::umask(mask);
    file.set_permissions(std::fs::Permissions::from_mode(0o666 & !mask.bits()))
}

impl Write for Target {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Stdout(output) => output.write(bytes),
            Self::Special(file) => file.write(bytes),
            Self::File { file, .. } => file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Stdout(output) => output.flush(),
            Self::Special(file) => file.flush(),
            Self::File { file, .. } => file.flush(),
        }
    }
}

/// Width of the terminal on standard output, 100 where that is none.
pub(super) fn terminal_columns() -> usize {
    let stdout = io::stdout();
    if !stdout.is_terminal() {
        return 100;
    }
    rustix::termios::tcgetwinsize(&stdout).map_or(100, |size| usize::from(size.ws_col).max(60))
}
