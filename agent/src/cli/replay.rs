//! `wasmscope replay`: a recording instead of a live process, and every output that a live process has.

use std::{
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;

use super::outputs::{self, Outputs};
use crate::{
    clock::ClockAnchor,
    correlate::{Correlator, SETTLE_NS},
    event::{Event, EventKind},
    recording::{self, Header},
    span::{Capture, Trace},
};

#[derive(Debug, clap::Args)]
pub(super) struct ReplayArguments {
    /// The recording, as written by `wasmscope trace --record`
    #[arg(value_name = "RECORDING")]
    recording: PathBuf,
    /// Do not label the outputs as a replay: for scripts that record and draw in one go
    #[arg(long)]
    unlabelled: bool,
    #[command(flatten)]
    outputs: outputs::OutputArguments,
}

pub(super) fn run(arguments: ReplayArguments) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    runtime.block_on(replay(arguments))
}

async fn replay(arguments: ReplayArguments) -> anyhow::Result<ExitCode> {
    let path = &arguments.recording;
    // Read twice: the header's clock and the account at the end are needed before the first trace is written, and
    // keeping the events in between would take memory without bound.
    let (header, mut capture) = account(path)?;
    let clock: ClockAnchor = header.clock;
    let mut outputs = Outputs::open(arguments.outputs, clock, crate::metrics::Metrics::new())?;
    let mut correlator = Correlator::new();
    let mut failed = None;
    recording::read(open(path)?, |event| {
        if failed.is_some() {
            return;
        }
        outputs.events([&event]);
        push(&mut correlator, event);
        capture.trace_count = 0;
        if let Err(error) = outputs.traces(correlator.take_finished()) {
            failed = Some(error);
        }
    })?;
    if let Some(error) = failed {
        return Err(error);
    }
    correlator.finish(capture.end_ns);
    outputs.traces(correlator.take_finished())?;
    outputs.losses(&capture.losses);
    capture.trace_count = outputs.summary().trace_count();
    capture.replay_of = (!arguments.unlabelled).then(|| origin(&header));
    outputs.finish(&capture).await?;
    Ok(ExitCode::SUCCESS)
}

/// The first and the last line of a recording.
pub(super) fn account(path: &Path) -> anyhow::Result<(Header, Capture)> {
    recording::read(open(path)?, |_| {}).with_context(|| path.display().to_string())
}

/// Where a recording comes from, in words for whoever looks at a picture of it.
pub(super) fn origin(header: &Header) -> String {
    format!(
        "recording made by wasmscope {} on Linux {}",
        header.agent_version, header.kernel_release
    )
}

/// All traces of a recording, each as it completes.
pub(super) fn traces(path: &Path, mut each: impl FnMut(&Trace)) -> anyhow::Result<()> {
    let mut correlator = Correlator::new();
    let (_, capture) = recording::read(open(path)?, |event| {
        push(&mut correlator, event);
        correlator.take_finished().iter().for_each(&mut each);
    })
    .with_context(|| path.display().to_string())?;
    correlator.finish(capture.end_ns);
    correlator.take_finished().iter().for_each(&mut each);
    Ok(())
}

fn push(correlator: &mut Correlator, event: Event) {
    let at_ns = event.at_ns;
    // Others carry the agent's time, which is ahead of the records'.
    let is_record = !matches!(event.kind, EventKind::Process { .. } | EventKind::Lost { .. });
    correlator.push(event);
    if is_record {
        correlator.settle(at_ns.saturating_sub(SETTLE_NS));
    }
}

fn open(path: &Path) -> anyhow::Result<BufReader<File>> {
    File::open(path)
        .map(BufReader::new)
        .with_context(|| format!("cannot open {}", path.display()))
}
