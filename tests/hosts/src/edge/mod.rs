//! A small HTTP service that runs a guest for each request, as edge platforms do: one module per route, a new store and
//! instance per request.

mod functions;
mod guests;
mod request;
mod routes;
mod threads;

use std::future::IntoFuture as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Parser;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::report;

/// Serves guests over HTTP: /policy, /transform?op=upper|rot13|words|gray, /faulty?kind=…, and /counts with what has
/// been done so far as JSON.
///
/// Prints `listening on ADDRESS` when it is ready. Ends on SIGINT or SIGTERM, after the requests that it is working on.
#[expect(clippy::struct_excessive_bools, reason = "independent flags of a command line")]
#[derive(Clone, Debug, Parser)]
#[command(name = "edge-host", version)]
pub struct Options {
    /// Address to listen on; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,

    /// Worker threads of the runtime.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub threads: u16,

    /// Use wasmtime's pooling allocator.
    #[arg(long)]
    pub pooling: bool,

    /// Compile all guests before listening, instead of each at its first request.
    #[arg(long)]
    pub eager: bool,

    /// How long the upstream takes to answer, milliseconds.
    #[arg(long, default_value_t = 4)]
    pub upstream_ms: u64,

    /// How long a request waits before its guest is called, milliseconds.
    #[arg(long, default_value_t = 0)]
    pub before_ms: u64,

    /// Run each guest in a task of its own rather than in its connection's.
    #[arg(long)]
    pub hand_over: bool,

    /// Serve each connection on a thread of its own, with blocking reads and no asynchronous runtime. There is one guest,
    /// of which each request calls two exports.
    #[arg(long, conflicts_with_all = ["before_ms", "hand_over"])]
    pub blocking: bool,

    /// Run the guest's `_start` once, when there is a line on standard input, and end.
    #[arg(long, conflicts_with_all = ["before_ms", "hand_over", "blocking"])]
    pub command: bool,

    /// File that guests' log lines are appended to; `edge.log` in a temporary directory if not given.
    #[arg(long)]
    pub log: Option<PathBuf>,
}

impl Options {
    fn upstream(&self) -> Duration {
        Duration::from_millis(self.upstream_ms)
    }
}

/// Serves until told to end.
pub fn run(options: &Options) -> Result<()> {
    if options.command {
        return threads::run_command(options);
    }
    if options.blocking {
        return threads::serve(options);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(usize::from(options.threads))
        .thread_name("edge-worker")
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(serve(options))
}

async fn serve(options: &Options) -> Result<()> {
    let guests = guests::Guests::new(options)?;
    if options.eager {
        guests.compile_all().await?;
    }
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let listener = TcpListener::bind(options.listen).await;
    let listener = listener.with_context(|| format!("cannot listen on {}", options.listen))?;
    report::print_line(&format!("listening on {}", listener.local_addr()?))?;
    let told_to_end = async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    let server = axum::serve(listener, routes::router(guests)).with_graceful_shutdown(told_to_end);
    server.into_future().await.context("the server failed")
}
