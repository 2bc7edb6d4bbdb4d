//! `wasmscope agent`: the node agent, from its flags to its logs.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;

use crate::agent::{self, Logs};
use crate::config::Sources;

pub(super) const EXAMPLES: &str = "\
Examples:
  wasmscope agent                                    watch this node, metrics on http://127.0.0.1:9464/metrics
  wasmscope agent --config /etc/wasmscope.toml       with a file; SIGHUP reads it again
  wasmscope agent --set log.format=json --tier 0
  wasmscope agent --config agent.toml --print-config what is in force, and who set it
  OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318 wasmscope agent

Every key can also be set as WASMSCOPE_SECTION__KEY, for example WASMSCOPE_HTTP__LISTEN.
Exit status: 0 everything was delivered, 1 failed, 2 wrong usage or configuration, 3 told to end and not everything was delivered.";

#[derive(Debug, clap::Args)]
pub(super) struct AgentArguments {
    /// Read this file, TOML
    #[arg(long, value_name = "FILE", env = "WASMSCOPE_CONFIG")]
    config: Option<PathBuf>,
    /// Print the configuration that would be in force, and end
    #[arg(long)]
    print_config: bool,
    /// Check the configuration and the files for TLS that it names, and end
    #[arg(long)]
    check_config: bool,
    /// Serve HTTP here [default: 127.0.0.1:9464]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// What to log, a level or directives as in `RUST_LOG` [default: info]
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
    /// 0 = syscalls with their guest functions, no probe in the process; 1 = every crossing [default: 1]
    #[arg(long, value_name = "TIER", value_parser = clap::value_parser!(u8).range(0..=1))]
    tier: Option<u8>,
    /// Size of the buffer between kernel and agent [default: 16]
    #[arg(long, value_name = "MIB")]
    ring_mib: Option<u32>,
    /// Set any key of the configuration; may be given several times
    #[arg(long, value_name = "SECTION.KEY=VALUE", value_parser = setting)]
    set: Vec<(String, String)>,
}

fn setting(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .filter(|(key, _)| key.contains('.'))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .ok_or_else(|| "must be section.key=value".to_owned())
}

impl AgentArguments {
    fn sources(&self) -> Sources {
        let own = [
            (
                "--listen",
                "http.listen",
                self.listen.map(|address| address.to_string()),
            ),
            ("--log", "log.filter", self.log.clone()),
            ("--tier", "capture.tier", self.tier.map(|tier| tier.to_string())),
            (
                "--ring-mib",
                "capture.ring_mib",
                self.ring_mib.map(|mib| mib.to_string()),
            ),
        ];
        let own = own
            .into_iter()
            .filter_map(|(flag, key, value)| Some((flag.to_owned(), key.to_owned(), value?)));
        let set = self
            .set
            .iter()
            .map(|(key, value)| ("--set".to_owned(), key.clone(), value.clone()));
        Sources {
            file: self.config.clone(),
            // A variable that is not text is none that the agent knows.
            variables: std::env::vars_os()
                .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
                .collect(),
            flags: set.chain(own).collect(),
        }
    }
}

pub(super) fn run(arguments: &AgentArguments) -> ExitCode {
    let sources = arguments.sources();
    let loaded = match sources.load() {
        Ok(loaded) => loaded,
        Err(error) => {
            eprintln!("wasmscope: {error}");
            return ExitCode::from(2);
        }
    };
    if arguments.print_config {
        print!("{}", loaded.to_toml());
        return ExitCode::SUCCESS;
    }
    if arguments.check_config {
        if let Err(error) = loaded.config.check_files() {
            eprintln!("wasmscope: {error}");
            return ExitCode::from(2);
        }
        eprintln!("the configuration is valid");
        return ExitCode::SUCCESS;
    }
    let (logs, set_filter) = Logs::start(&loaded.config.log);
    let result = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the event loop")
        .and_then(|runtime| {
            let result = runtime.block_on(agent::run(loaded, sources, &logs, set_filter));
            // A thread that is over its deadline is not waited for.
            runtime.shutdown_background();
            result
        });
    match result {
        Ok(code) => code,
        Err(error) => {
            super::tell(&error);
            ExitCode::FAILURE
        }
    }
}
