//! `wasmscope check`: what works here, what does not, what that costs, and the command that mends it.

use std::process::ExitCode;

use crate::{
    bpf::{
        cost::{self, CostError},
        features::{self, Finding, Severity},
    },
    pipeline::kernel_release,
    process::{
        describe,
        hosts::{Found, Hosts},
        looks::Looks,
        maps,
        memory::ProcessMemory,
    },
    sink::text::printable,
};

/// Capabilities that tracing needs, as `setcap` names them.
pub(super) const CAPABILITIES: [&str; 5] = [
    "cap_bpf",
    "cap_perfmon",
    "cap_sys_ptrace",
    "cap_dac_read_search",
    "cap_checkpoint_restore",
];

#[derive(Debug, clap::Args)]
pub(super) struct CheckArguments {
    /// Do not look at running processes
    #[arg(long)]
    no_processes: bool,
    /// Measure what one hit of a probe costs here, by the instruction it is on
    #[arg(long)]
    costs: bool,
    /// Rounds of --costs; the median is told
    #[arg(long, value_name = "N", default_value_t = 5, requires = "costs", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
}

pub(super) fn run(arguments: &CheckArguments) -> ExitCode {
    let findings = features::probe();
    println!("kernel {}", kernel_release());
    for finding in &findings {
        println!("  {}", line(finding));
    }
    if !arguments.no_processes {
        processes();
    }
    let blocking: Vec<_> = findings
        .iter()
        .filter(|finding| finding.severity == Severity::Blocking)
        .collect();
    if blocking.is_empty() {
        println!("tracing works here");
        if arguments.costs
            && let Err(error) = costs(arguments.rounds)
        {
            super::tell(&error.into());
            return ExitCode::FAILURE;
        }
        return ExitCode::SUCCESS;
    }
    println!("tracing cannot work here:");
    for finding in blocking {
        println!("  {}: {}", finding.name, finding.remedy);
    }
    ExitCode::FAILURE
}

fn line(finding: &Finding) -> String {
    let verdict = match finding.severity {
        Severity::Fine => "ok",
        Severity::Degraded => "missing",
        Severity::Blocking => "FAILS",
    };
    let mut line = format!("{:<26} {verdict:<8} {}", finding.name, finding.detail);
    if finding.severity != Severity::Fine {
        line.push_str(" → ");
        line.push_str(finding.remedy);
    }
    line.trim_end().to_owned()
}

fn costs(rounds: u32) -> Result<(), CostError> {
    let costs = cost::measure(rounds)?;
    println!("cost of a hit, nanoseconds, medians of {rounds} rounds");
    println!("  {:<26} {:>10} {:>10}  handled by", "on", "a call", "hit adds");
    for cost in costs {
        println!(
            "  {:<26} {:>10.1} {:>10.0}  {}",
            cost.what,
            median(cost.untraced_ns),
            median(cost.added_ns),
            if cost.emulated { "emulation" } else { "single-stepping" }
        );
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn processes() {
    println!("processes that run WebAssembly");
    let mut hosts = Hosts::default();
    let mut found = 0;
    for pid in describe::all_pids().unwrap_or_default() {
        let Ok(mappings) = maps::executable_mappings(pid) else {
            continue;
        };
        let objects = ProcessMemory::open(pid).map_or(0, |memory| maps::code_objects(&mappings, &memory).len());
        if objects == 0 {
            continue;
        }
        let Ok(facts) = describe::facts(pid) else {
            continue;
        };
        found += 1;
        let views: Vec<_> = hosts
            .of_process(pid, &mappings, &mut Looks::default().at_libraries())
            .iter()
            .map(|Found { host, .. }| {
                let tier = if host.plan.coverage.activations {
                    "tiers 0 1"
                } else {
                    "tier 0"
                };
                let mut limits = host.plan.limits.join("; ");
                if host.plan.learns_host_functions {
                    limits.push_str("; stripped: host functions are learnt while they are called");
                }
                format!(
                    "{} · {tier} · {} sites {limits}",
                    host.plan.runtime_name,
                    host.plan.sites.len()
                )
            })
            .collect();
        let view = if views.is_empty() {
            "tier 0: no host binary recognised".to_owned()
        } else {
            views.join(" · ")
        };
        println!(
            "  pid {pid:<8} {:<16} {objects} code object{} · {}",
            printable(&facts.command),
            if objects == 1 { "" } else { "s" },
            view.trim_end()
        );
    }
    if found == 0 {
        println!("  none found");
    }
}
