//! The agent's log: lines on stderr that are never waited for.

use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, reload};

use crate::config::{LogConfig, LogFormat};

/// Lines that may wait for whoever reads stderr; later ones are dropped and counted.
const MAX_WAITING_LINES: usize = 10_000;

/// Changes what is logged, while running.
pub type SetFilter = Box<dyn Fn(&str) -> Result<(), String> + Send>;

/// Writes the log until it is dropped, which waits a second at most for lines that are still to be written.
pub struct Logs {
    dropped: ErrorCounter,
    _writer: WorkerGuard,
}

impl Logs {
    /// Starts the log of this process, and gives what changes its filter.
    ///
    /// A thread writes it: a pipe that nobody reads would hold up the event loop otherwise.
    pub fn start(config: &LogConfig) -> (Self, SetFilter) {
        // It has been checked.
        let filter = EnvFilter::try_new(&config.filter).unwrap_or_default();
        let (filter, handle) = reload::Layer::new(filter);
        let (writer, guard) = writer();
        let dropped = writer.error_counter();
        let lines = tracing_subscriber::fmt::layer().with_writer(writer);
        let lines = match config.format {
            LogFormat::Text => lines.with_ansi(false).boxed(),
            LogFormat::Json => lines.json().flatten_event(true).boxed(),
        };
        tracing_subscriber::registry().with(lines.with_filter(filter)).init();
        let set_filter = Box::new(move |directives: &str| {
            let filter = EnvFilter::try_new(directives).map_err(|error| error.to_string())?;
            handle.reload(filter).map_err(|error| error.to_string())
        });
        let logs = Self {
            dropped,
            _writer: guard,
        };
        (logs, set_filter)
    }

    /// Lines that found no room, so far.
    pub fn dropped_lines(&self) -> u64 {
        self.dropped.dropped_lines() as u64
    }
}

fn writer() -> (NonBlocking, WorkerGuard) {
    NonBlockingBuilder::default()
        .buffered_lines_limit(MAX_WAITING_LINES)
        .lossy(true)
        .thread_name("log")
        .finish(std::io::stderr())
}
