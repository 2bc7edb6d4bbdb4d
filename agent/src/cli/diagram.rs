//! `wasmscope diagram`: a picture of one invocation that an agent's flight recorder kept, or that is in a recording.

mod agent;
mod recorded;
mod table;

use std::{
    collections::BTreeSet,
    hash::{BuildHasher as _, RandomState},
    io::Write as _,
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Context as _, bail};
use clap::builder::{PossibleValuesParser, TypedValueParser as _};

use self::{agent::Client, recorded::Recorded};
use super::outputs::{Target, terminal_columns};
use crate::{
    diagram,
    recorder::{Format, Kept, MAX_LIMIT, Order, Page, Question},
    sink::text::printable,
};

pub(super) const EXAMPLES: &str = "\
Examples:
  wasmscope diagram                                        the slowest invocation that the agent on this host keeps
  wasmscope diagram --failed --pod shop/cart-7d4b9 --since 15m --format text
  wasmscope diagram --list --export handle_request
  wasmscope diagram --recording run.wasmscope --trace-id 4b1f93a2 -o request.mmd

The agent of another node: kubectl -n wasmscope port-forward POD 9464 &, where POD is the agent's pod on the node that
`kubectl get pod -o wide` shows for your pod; then as above.";

/// Kept exports that are named where nothing matches.
const MAX_HINTS: usize = 8;

#[derive(Debug, clap::Args)]
pub(super) struct DiagramArguments {
    /// The agent that is asked
    #[arg(
        long,
        value_name = "URL",
        env = "WASMSCOPE_AGENT",
        default_value = "http://127.0.0.1:9464"
    )]
    agent: String,
    /// Look into a recording, as written by `wasmscope trace --record`, instead of asking an agent
    #[arg(long, value_name = "FILE")]
    recording: Option<PathBuf>,
    #[command(flatten)]
    which: Which,
    /// Only invocations in this pod
    #[arg(long, value_name = "[NAMESPACE/]NAME")]
    pod: Option<String>,
    /// Only invocations in this container, by name or id
    #[arg(long, value_name = "NAME")]
    container: Option<String>,
    /// Only invocations in this process, by pid or command
    #[arg(long, value_name = "PROCESS")]
    process: Option<String>,
    /// Only invocations of this module, by name or hash
    #[arg(long, value_name = "NAME")]
    module: Option<String>,
    /// Only invocations of this exported function
    #[arg(long, value_name = "NAME")]
    export: Option<String>,
    /// Only invocations that were running then or later: 15m (ago), 2026-01-31T12:00:00Z, or seconds since the epoch. In
    /// a recording, 15m is before its end
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Only invocations that had begun by then
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Only invocations that took at least this long: 250us, 1.5ms, 10s
    #[arg(long, value_name = "DURATION")]
    min_duration: Option<String>,
    /// What to write [default: mermaid, a table with --list]
    #[arg(long, value_parser = format_parser())]
    format: Option<Format>,
    /// Write to this file instead of standard output; it appears when it is complete
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Columns of `--format text` [default: the terminal's, else 100]
    #[arg(long, value_name = "COLUMNS")]
    width: Option<usize>,
    /// Lines of --list
    #[arg(long, value_name = "COUNT", default_value_t = 20, requires = "list")]
    limit: usize,
}

#[derive(Debug, clap::Args)]
#[group(multiple = false)]
#[expect(clippy::struct_excessive_bools, reason = "flags of which at most one is given")]
struct Which {
    /// The invocation that took longest; so it is when nothing else is said
    #[arg(long)]
    slowest: bool,
    /// The latest that trapped or was unwound by an error of the host
    #[arg(long)]
    failed: bool,
    /// Any
    #[arg(long)]
    random: bool,
    /// The one with this id, or whose id begins with these 8 or more digits; the id of the application's trace will do
    #[arg(long, value_name = "ID")]
    trace_id: Option<String>,
    /// List what there is, the slowest first
    #[arg(long)]
    list: bool,
}

/// Where invocations are looked for.
enum Source {
    Agent(Client),
    Recorded(Recorded),
}

pub(super) fn run(arguments: DiagramArguments) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    runtime.block_on(diagram(arguments))
}

async fn diagram(arguments: DiagramArguments) -> anyhow::Result<ExitCode> {
    let source = match &arguments.recording {
        Some(path) => Source::Recorded(Recorded::new(path.clone())),
        None => Source::Agent(Client::new(&arguments.agent)?),
    };
    let text = if arguments.which.list {
        list(&source, &arguments).await?
    } else {
        let id = choose(&source, &arguments).await?;
        let format = arguments.format.unwrap_or(Format::Diagram(diagram::Format::Mermaid));
        let width = arguments.width.unwrap_or_else(terminal_columns);
        source.written(&id, format, width).await?
    };
    let mut target = Target::open(arguments.output.as_deref())?;
    target.write_all(text.as_bytes()).context("while writing the output")?;
    target.finish()?;
    if let Some(path) = &arguments.output {
        eprintln!("wrote {}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(source: &Source, arguments: &DiagramArguments) -> anyhow::Result<String> {
    let question = Question {
        limit: Some(arguments.limit),
        ..arguments.question()
    };
    let page = source.list(&question).await?;
    match arguments.format {
        None => Ok(table::table(&page)),
        Some(Format::Json) => Ok(serde_json::to_string_pretty(&page)? + "\n"),
        Some(other) => bail!("--list is a table, or --format json; not {}", other.name()),
    }
}

/// The id of the trace that was asked for.
async fn choose(source: &Source, arguments: &DiagramArguments) -> anyhow::Result<String> {
    let which = &arguments.which;
    let question = arguments.question();
    if which.random {
        let question = Question {
            kept_because: Some(Kept::Random),
            limit: Some(MAX_LIMIT),
            ..question
        };
        let page = source.list(&question).await?;
        let any = RandomState::new().hash_one(0_u8) as usize;
        return match page.traces.get(any % page.traces.len().max(1)) {
            Some(summary) => Ok(summary.trace_id.to_string()),
            None => Err(nothing(source, &page).await),
        };
    }
    let question = Question {
        outcome: which.failed.then(|| "failed".to_owned()),
        order: which.failed.then_some(Order::Latest),
        limit: Some(if which.trace_id.is_some() { 3 } else { 1 }),
        ..question
    };
    let page = source.list(&question).await?;
    match page.traces.as_slice() {
        [] => Err(nothing(source, &page).await),
        [first, second, ..] if which.trace_id.is_some() => bail!(
            "{} traces have that id or begin so, {} and {} among them; give more digits",
            page.matching_count,
            first.trace_id,
            second.trace_id
        ),
        [first, ..] => Ok(first.trace_id.to_string()),
    }
}

/// Why there is nothing to draw, and what there is instead.
async fn nothing(source: &Source, page: &Page) -> anyhow::Error {
    if page.kept_count == 0 {
        return anyhow::anyhow!(match source {
            Source::Agent(_) =>
                "the agent keeps no trace: it has seen no invocation yet, or none in its window; `wasmscope check` says what it can see",
            Source::Recorded(_) => "there is no complete invocation in the recording",
        });
    }
    let mut words = format!("none of the {} traces that there are matches", page.kept_count);
    let question = Question {
        limit: Some(MAX_LIMIT),
        order: Some(Order::Latest),
        ..Question::default()
    };
    if let Ok(all) = source.list(&question).await {
        let names: BTreeSet<String> = all
            .traces
            .iter()
            .map(|summary| {
                let unknown = || "?".to_owned();
                format!(
                    "{} {} {}",
                    summary.place(),
                    summary.module.clone().unwrap_or_else(unknown),
                    summary.export.clone().unwrap_or_else(unknown)
                )
            })
            .collect();
        let shown: Vec<String> = names.iter().take(MAX_HINTS).map(|name| printable(name)).collect();
        words.push_str("; there are: ");
        words.push_str(&shown.join(", "));
        if names.len() > MAX_HINTS {
            words.push_str(", …");
        }
    }
    words.push_str(" (`--list` shows them)");
    anyhow::anyhow!(words)
}

impl Source {
    async fn list(&self, question: &Question) -> anyhow::Result<Page> {
        match self {
            Self::Agent(client) => client.list(question).await,
            Self::Recorded(recorded) => recorded.list(question),
        }
    }

    async fn written(&self, id: &str, format: Format, width: usize) -> anyhow::Result<String> {
        match self {
            Self::Agent(client) => client.trace(id, format, width).await,
            Self::Recorded(recorded) => recorded.written(id, format, width),
        }
    }
}

impl DiagramArguments {
    fn question(&self) -> Question {
        let (namespace, pod) = match self.pod.as_deref().map(|pod| pod.split_once('/').ok_or(pod)) {
            None => (None, None),
            Some(Ok((namespace, pod))) => (Some(namespace.to_owned()), Some(pod.to_owned())),
            Some(Err(pod)) => (None, Some(pod.to_owned())),
        };
        Question {
            trace_id: self.which.trace_id.clone(),
            pod,
            namespace,
            container: self.container.clone(),
            process: self.process.clone(),
            module: self.module.clone(),
            export: self.export.clone(),
            min_duration: self.min_duration.clone(),
            since: self.since.clone(),
            until: self.until.clone(),
            ..Question::default()
        }
    }
}

fn format_parser() -> impl clap::builder::TypedValueParser<Value = Format> {
    PossibleValuesParser::new(Format::all().map(Format::name)).try_map(|name| name.parse::<Format>())
}
