//! The host's own counts beside the agent's: whether they are equal is the demo's proof.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::{Context as _, Result};
use serde_json::Value;

/// Rows shown for one kind.
const MAX_ROWS: usize = 40;

type Numbers = BTreeMap<String, u64>;

/// Both sides, by kind and name.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Comparison {
    rows: Vec<Row>,
}

#[derive(Debug, PartialEq, Eq)]
struct Row {
    name: String,
    host: u64,
    agent: u64,
}

impl Comparison {
    /// Of what the host counted between `before` and `after` with what is in `traces`, one JSON document or one a line.
    pub(crate) fn new(before: &Value, after: &Value, traces: &str) -> Result<Self> {
        let seen = Seen::read(traces)?;
        let mut comparison = Self::default();
        for (kind, key, seen) in [
            ("invocations", "invocations", &seen.invocations),
            ("host calls", "host_calls", &seen.host_calls),
            ("traps", "traps", &seen.traps),
        ] {
            comparison.add(kind, &difference(before, after, key), seen);
        }
        // Host and runtime make syscalls of their own too (to wake a thread, to get memory); the host counts those that a host function
        // makes on purpose, so only pairs that it has counted are compared.
        let syscalls = syscall_difference(before, after);
        let seen_of_those = seen
            .syscalls
            .into_iter()
            .filter(|(name, _)| syscalls.contains_key(name))
            .collect();
        comparison.add("syscalls made on purpose", &syscalls, &seen_of_those);
        let suspends = |value: &Value| value["suspends"].as_u64().unwrap_or(0);
        let host = suspends(after).saturating_sub(suspends(before));
        comparison.rows.push(Row {
            name: "suspensions".to_owned(),
            host,
            agent: seen.suspends,
        });
        Ok(comparison)
    }

    /// Whether every row is.
    pub(crate) fn is_equal(&self) -> bool {
        self.rows.iter().all(|row| row.host == row.agent)
    }

    fn add(&mut self, kind: &str, host: &Numbers, agent: &Numbers) {
        self.rows.push(Row {
            name: kind.to_owned(),
            host: host.values().sum(),
            agent: agent.values().sum(),
        });
        let names: BTreeSet<_> = host.keys().chain(agent.keys()).collect();
        for name in names.into_iter().take(MAX_ROWS) {
            let of = |numbers: &Numbers| numbers.get(name).copied().unwrap_or(0);
            self.rows.push(Row {
                name: format!("  {}", name.escape_debug()),
                host: of(host),
                agent: of(agent),
            });
        }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
        writeln!(
            formatter,
            "{:<width$}  {:>14}  {:>14}",
            "", "host counted", "wasmscope saw"
        )?;
        for Row { name, host, agent } in &self.rows {
            let verdict = if host == agent { "equal" } else { "NOT EQUAL" };
            writeln!(formatter, "{name:<width$}  {host:>14}  {agent:>14}  {verdict}")?;
        }
        let verdict = if self.is_equal() {
            "every count is equal"
        } else {
            "the counts are NOT EQUAL"
        };
        write!(formatter, "{verdict}")
    }
}

/// What the agent saw, by the names that the host uses.
#[derive(Debug, Default)]
struct Seen {
    invocations: Numbers,
    host_calls: Numbers,
    syscalls: Numbers,
    traps: Numbers,
    suspends: u64,
}

impl Seen {
    fn read(traces: &str) -> Result<Self> {
        let mut seen = Self::default();
        for document in serde_json::Deserializer::from_str(traces).into_iter::<Value>() {
            let document = document.context("while reading the traces")?;
            let mut pending = vec![(&document, None)];
            while let Some((value, host_call)) = pending.pop() {
                match value {
                    Value::Array(values) => pending.extend(values.iter().map(|value| (value, host_call))),
                    Value::Object(fields) => {
                        let role = fields.get("kind").and_then(|kind| kind["role"].as_str());
                        if let Some(role) = role {
                            seen.add(role, value, host_call);
                        }
                        let within = if role == Some("host_call") {
                            Some(value)
                        } else {
                            host_call
                        };
                        pending.extend(fields.values().map(|value| (value, within)));
                    }
                    _ => {}
                }
            }
        }
        Ok(seen)
    }

    fn add(&mut self, role: &str, span: &Value, host_call: Option<&Value>) {
        let kind = &span["kind"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let count = |numbers: &mut Numbers, name: String| *numbers.entry(name).or_default() += 1;
        match role {
            "invoke" => {
                let function = &kind["function"];
                count(
                    &mut self.invocations,
                    format!("{}/{}", text(&function["module"]["name"]), text(&function["name"])),
                );
                match span["outcome"]["outcome"].as_str() {
                    Some("trap") => count(&mut self.traps, text(&span["outcome"]["code"])),
                    Some("host_error") => count(&mut self.traps, "host_error".to_owned()),
                    _ => {}
                }
                self.suspends += span["suspends"].as_array().map_or(0, |suspends| suspends.len() as u64);
            }
            "host_call" => count(&mut self.host_calls, import(span)),
            "syscall" => {
                if let Some(host_call) = host_call {
                    count(
                        &mut self.syscalls,
                        format!("{} in {}", text(&kind["name"]), import(host_call)),
                    );
                }
            }
            _ => {}
        }
    }
}

/// The function that the span of a host call is of.
fn import(host_call: &Value) -> String {
    let import = &host_call["kind"]["import"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    format!("{}.{}", text(&import["module"]), text(&import["name"]))
}

/// What was added to the counters of syscalls, by syscall and host call.
fn syscall_difference(before: &Value, after: &Value) -> Numbers {
    const KEY: &str = "syscalls_by_host_call";
    let host_calls = after[KEY].as_object().into_iter().flatten();
    let pairs = host_calls.flat_map(|(host_call, _)| {
        let syscalls = difference(&before[KEY], &after[KEY], host_call);
        syscalls
            .into_iter()
            .map(move |(name, count)| (format!("{name} in {host_call}"), count))
    });
    pairs.collect()
}

/// What was added to the counters below `key` between two snapshots, without those that stayed.
fn difference(before: &Value, after: &Value, key: &str) -> Numbers {
    let Some(after) = after[key].as_object() else {
        return Numbers::new();
    };
    let added = after.iter().map(|(name, count)| {
        let earlier = before[key].get(name).and_then(Value::as_u64).unwrap_or(0);
        (name.clone(), count.as_u64().unwrap_or(0).saturating_sub(earlier))
    });
    added.filter(|(_, count)| *count > 0).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn trace() -> Value {
        let module = json!({ "name": "policy", "hash": "3f9ac2000000" });
        let write = json!({ "kind": { "role": "syscall", "name": "write" }, "children": [], "suspends": [] });
        let futex = json!({ "kind": { "role": "syscall", "name": "futex" }, "children": [], "suspends": [] });
        let host_call = json!({
            "kind": { "role": "host_call", "import": { "module": "host", "name": "log" } },
            "outcome": { "outcome": "ok" }, "children": [write, futex], "suspends": [],
        });
        let other = json!({
            "kind": { "role": "host_call", "import": { "module": "host", "name": "fetch" } },
            "outcome": { "outcome": "ok" }, "children": [write], "suspends": [],
        });
        json!({ "root": {
            "kind": { "role": "invoke", "function": { "module": module, "index": 3, "name": "handle" } },
            "outcome": { "outcome": "trap", "code": "unreachable" },
            "children": [host_call, write.clone(), other], "suspends": [{ "start_ns": 1 }],
        } })
    }

    fn counts(log_calls: u64) -> Value {
        json!({
            "invocations": { "policy/handle": 4 }, "host_calls": { "host.fetch": 2, "host.log": log_calls },
            "syscalls_by_host_call": { "host.log": { "write": 7 } }, "traps": { "unreachable": 1 }, "suspends": 1,
        })
    }

    fn before() -> Value {
        json!({
            "invocations": { "policy/handle": 3 }, "host_calls": { "host.fetch": 1, "host.log": 5 },
            "syscalls_by_host_call": { "host.log": { "write": 6 } }, "traps": {},
        })
    }

    #[test]
    fn what_happened_before_the_trace_is_left_out() {
        let comparison = Comparison::new(&before(), &counts(6), &trace().to_string()).unwrap();
        assert!(comparison.is_equal(), "{comparison}");
    }

    #[test]
    fn one_host_call_missed_is_not_equal() {
        let comparison = Comparison::new(&before(), &counts(7), &trace().to_string()).unwrap();
        assert!(!comparison.is_equal());
        assert!(comparison.to_string().contains("NOT EQUAL"), "{comparison}");
    }

    #[test]
    fn what_only_the_agent_saw_is_not_equal() {
        let mut after = counts(6);
        after["invocations"] = json!({});
        assert!(
            !Comparison::new(&before(), &after, &trace().to_string())
                .unwrap()
                .is_equal()
        );
    }

    #[test]
    fn traces_may_come_one_a_line() {
        let lines = format!("{}\n{}\n", trace(), trace());
        assert_eq!(
            Seen::read(&lines).unwrap().host_calls,
            [("host.fetch".to_owned(), 2), ("host.log".to_owned(), 2)].into()
        );
    }
}
