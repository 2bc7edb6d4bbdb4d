//! The command line: what can be asked, and how errors are told. One file per subcommand.

mod agent;
mod check;
pub(crate) mod cold;
mod diagram;
mod outputs;
mod pick;
mod replay;
mod summary;
mod trace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// eBPF-backed observability of WebAssembly workloads: who called what, down to the syscall.
#[derive(Debug, Parser)]
#[command(name = "wasmscope", version, about, max_term_width = 100)]
#[command(
    after_help = "Logging: WASMSCOPE_LOG=debug (same syntax as RUST_LOG). Exit status: 0 done, 1 failed, 2 wrong usage."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Trace processes that run WebAssembly and draw what happened
    #[command(after_help = trace::EXAMPLES)]
    Trace(trace::TraceArguments),
    /// Watch every process of this node for good: metrics, traces to a collector, health
    #[command(after_help = agent::EXAMPLES)]
    Agent(agent::AgentArguments),
    /// Draw or export a recording: needs no privileges and no kernel support
    Replay(replay::ReplayArguments),
    /// Draw an invocation that a running agent kept, or one of a recording: the slowest, a failed one, any
    #[command(after_help = diagram::EXAMPLES)]
    Diagram(diagram::DiagramArguments),
    /// Say what this kernel, these privileges and these processes allow, and what to do about the rest
    Check(check::CheckArguments),
}

/// Runs the command that the process was started with.
pub fn run() -> ExitCode {
    let arguments = Arguments::parse();
    // The agent's logs are part of its configuration.
    let command = match arguments.command {
        Command::Agent(arguments) => return agent::run(&arguments),
        command => command,
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("WASMSCOPE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let result = match command {
        Command::Agent(_) => unreachable!("it has been run"),
        Command::Trace(arguments) => trace::run(arguments),
        Command::Replay(arguments) => replay::run(arguments),
        Command::Diagram(arguments) => diagram::run(arguments),
        Command::Check(arguments) => Ok(check::run(&arguments)),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            tell(&error);
            ExitCode::FAILURE
        }
    }
}

/// An error in one line, its causes after colons, and what to do about it where that is known.
fn tell(error: &anyhow::Error) {
    let mut line = String::new();
    for cause in error.chain() {
        let words = cause.to_string();
        // Some errors repeat their source in their own words.
        if !line.contains(&words) {
            if !line.is_empty() {
                line.push_str(": ");
            }
            line.push_str(&words);
        }
    }
    eprintln!("wasmscope: {}", crate::sink::text::printable(&line));
    if matches!(
        error.downcast_ref::<crate::bpf::LoadError>(),
        Some(crate::bpf::LoadError::NotPermitted)
    ) {
        eprintln!(
            "  try: sudo wasmscope …   or: setcap {}+ep wasmscope",
            check::CAPABILITIES.join(",")
        );
        eprintln!("  `wasmscope check` says what is missing");
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_pid_and_a_command_exclude_each_other() {
        assert!(Arguments::try_parse_from(["wasmscope", "trace", "--pid", "1", "--", "true"]).is_err());
    }

    #[test]
    fn durations_and_ring_sizes_are_checked() {
        for bad in [
            ["--duration", "0"],
            ["--duration", "-1"],
            ["--duration", "x"],
            ["--ring-mib", "3"],
            ["--pid", "0"],
        ] {
            assert!(
                Arguments::try_parse_from(["wasmscope", "trace", bad[0], bad[1]]).is_err(),
                "{bad:?} was accepted"
            );
        }
    }
}
