//! `docs/configuration.md`: every key of the agent's configuration. Names and words are those of the types, and what is said of a key is tried out: its default, its values and its
//! range, whether a restart is needed, the variables and the flag that set it.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::process::Command;

use serde::Deserialize as _;
use toml::{Table, Value};
use wasmscope::config::{Config, Sources};
use wasmscope_tests::environment;

use super::types::{Field, Types};

const HEAD: &str = "# Configuration

<!-- Made of the types in agent/src by `cargo xtask docs`; a test compares. -->

Every key of `wasmscope agent`. From lowest to highest: the default, the file (`--config FILE` or `WASMSCOPE_CONFIG`, TOML), the standard `OTEL_…` variables, `WASMSCOPE_…` variables, flags.

```toml
[http]
listen = \"0.0.0.0:9464\"

[traces.target]
endpoint = \"http://collector.observability:4318\"
```

* `wasmscope agent --print-config` shows what would be in force and who set each value that is not a default, and ends. Values of headers, passwords and tokens are shown as `***`.
  `--check-config` only says whether it is valid, files for TLS included. With a key that does not exist or a value out of its range, the agent does not start: status 2.
* A variable is named after its key: `WASMSCOPE_`, then the sections and the key in capitals, with two underscores between them. Its value is TOML (`true`, `30`, `[\"team\"]`, `{ authorization = \"Bearer …\" }`);
  what is not TOML is taken as text.
* `--set SECTION.KEY=VALUE` sets any key.
* *at once*: SIGHUP reads file and configuration again and puts the key in force; *restart*: the new value is in force after a restart, and the log says so. A configuration with an error changes nothing.
  With the chart, a changed `config` makes new pods, so both are in force then.
* The signal's own `OTEL_…` variable wins over the common one; an empty one is not set. `OTEL_EXPORTER_OTLP_INSECURE=true` puts `http://` before an endpoint that has no scheme.
";

/// Keys whose range ends where another key says: what else to set when they are tried.
const COMPANIONS: [(&str, &str, &str); 4] = [
    ("inventory.interval_seconds", "inventory.nfd_expiry_seconds", "86400"),
    ("recorder.memory_mib", "recorder.max_trace_kib", "16"),
    ("recorder.max_trace_kib", "recorder.memory_mib", "4096"),
    ("inventory.nfd_expiry_seconds", "inventory.interval_seconds", "1"),
];

/// One key.
struct Key {
    path: String,
    field: Field,
    /// What is said of it, without its default.
    text: String,
}

/// One table of keys.
struct Section {
    path: String,
    text: String,
    keys: Vec<Key>,
}

/// The sections, in the order of the types; each before those inside it.
fn sections() -> Vec<Section> {
    let types = Types::of_the_agent();
    let mut sections = Vec::new();
    walk(&types, "Config", "", "", &mut sections);
    sections
}

fn walk(types: &Types, name: &str, path: &str, text: &str, sections: &mut Vec<Section>) {
    let structure = types.get(name).unwrap();
    let place = sections.len();
    let mut keys = Vec::new();
    for field in &structure.fields {
        let path = if path.is_empty() {
            field.name.clone()
        } else {
            format!("{path}.{}", field.name)
        };
        if types.get(&field.inner).is_some() {
            walk(types, &field.inner, &path, &field.text, sections);
            continue;
        }
        let stated = sentence(&field.text, "Default:").unwrap_or_default();
        let text = field
            .text
            .replacen(stated, "", 1)
            .replace("Changing it takes a restart.", "");
        keys.push(Key {
            path,
            text: text.split_whitespace().collect::<Vec<_>>().join(" "),
            field: Field {
                name: field.name.clone(),
                text: field.text.clone(),
                inner: field.inner.clone(),
                wrapper: field.wrapper.clone(),
            },
        });
    }
    if !keys.is_empty() {
        let restart = format!("{text} {}", structure.text).contains("takes a restart");
        if restart {
            for key in &keys {
                assert!(
                    takes_a_restart(key),
                    "{}: its section says that it takes a restart",
                    key.path
                );
            }
        }
        let section = Section {
            path: path.to_owned(),
            text: text.replace("Changing it takes a restart.", "").trim().to_owned(),
            keys,
        };
        sections.insert(place, section);
    }
}

/// The sentence that begins so, up to a full stop that ends one.
fn sentence<'a>(text: &'a str, begin: &str) -> Option<&'a str> {
    let from = text.find(begin)?;
    let rest = &text[from..];
    let end = rest.find(". ").map_or(rest.len(), |end| end + 1);
    Some(&rest[..end])
}

fn defaults() -> Config {
    let mut config = Config::default();
    // It is taken from the environment.
    config.kubernetes.node_name.clear();
    config
}

fn lookup<'a>(table: &'a Table, path: &str) -> Option<&'a Value> {
    match path.split_once('.') {
        None => table.get(path),
        Some((section, rest)) => lookup(table.get(section)?.as_table()?, rest),
    }
}

fn default_of(key: &Key) -> Option<Value> {
    lookup(&Table::try_from(defaults()).unwrap(), &key.path).cloned()
}

/// As people write numbers.
fn grouped(number: i64) -> String {
    let digits = number.to_string();
    let groups: Vec<_> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|group| String::from_utf8_lossy(group))
        .collect();
    groups.join(",")
}

fn shown_default(key: &Key) -> String {
    match default_of(key) {
        None => "none".to_owned(),
        Some(Value::Integer(number)) => grouped(number),
        Some(Value::Float(number)) => number.to_string(),
        Some(Value::String(text)) if text.is_empty() => "none".to_owned(),
        Some(Value::String(text)) => format!("`{text}`"),
        Some(Value::Array(values)) if values.is_empty() => "none".to_owned(),
        Some(Value::Table(values)) if values.is_empty() => "none".to_owned(),
        Some(value) => value.to_string(),
    }
}

fn with(path: &str, value: &str) -> Sources {
    Sources {
        flags: vec![("--set".to_owned(), path.to_owned(), value.to_owned())],
        ..Sources::default()
    }
}

/// What it takes.
fn kind(key: &Key) -> String {
    let inner = match key.field.inner.as_str() {
        "bool" => "true, false".to_owned(),
        "u8" | "u32" | "u64" | "usize" => "whole number".to_owned(),
        "f64" => "number".to_owned(),
        "String" => "text".to_owned(),
        "PathBuf" => "path".to_owned(),
        "SocketAddr" => "address and port".to_owned(),
        _ => variants(key)
            .iter()
            .map(|name| format!("`{name}`"))
            .collect::<Vec<_>>()
            .join(", "),
    };
    match key.field.wrapper.as_deref() {
        None | Some("Option") => inner,
        Some("Vec") => format!("list of {inner}s"),
        Some("BTreeMap") => format!("table of {inner}s"),
        Some(other) => panic!("{}: what is a {other}?", key.path),
    }
}

/// The values of a choice, as serde names them when it is given another.
fn variants(key: &Key) -> Vec<String> {
    let error = with(&key.path, "no-such-choice").load().unwrap_err().to_string();
    let (_, expected) = error
        .split_once("expected ")
        .unwrap_or_else(|| panic!("{}: {error}", key.path));
    expected.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Whether a value that is not the default takes a restart, as the agent itself says when it reloads.
fn takes_a_restart(key: &Key) -> bool {
    let old = defaults();
    let candidates = [
        "true",
        "false",
        "7",
        "0.5",
        "\"x\"",
        "[\"x\"]",
        "{ x = \"y\" }",
        "\"127.0.0.1:1\"",
    ]
    .map(str::to_owned);
    let choices = match key.field.inner.as_str() {
        "bool" | "u8" | "u32" | "u64" | "usize" | "f64" | "String" | "PathBuf" | "SocketAddr" => Vec::new(),
        _ => variants(key).iter().map(|name| format!("\"{name}\"")).collect(),
    };
    let new = candidates.into_iter().chain(choices).find_map(|candidate| {
        let text = format!("{} = {candidate}", key.path);
        let mut new = Config::deserialize(toml::from_str::<Table>(&text).unwrap()).ok()?;
        if !key.path.ends_with(".node_name") {
            new.kubernetes.node_name.clear();
        }
        (new != old).then_some(new)
    });
    let new = new.unwrap_or_else(|| panic!("{}: no other value found", key.path));
    !old.needs_restart(&new).is_empty()
}

fn variable(path: &str) -> String {
    format!("WASMSCOPE_{}", path.to_uppercase().replace('.', "__"))
}

/// The standard variables that set keys, found by setting each that the agent asks for. The signal's own come first.
fn standard_variables() -> BTreeMap<String, Vec<String>> {
    let mut found = BTreeMap::<String, Vec<String>>::new();
    let old = Config::default().traces.target;
    for (section, signal) in [("traces", "TRACES"), ("otlp_metrics", "METRICS")] {
        let asked = RefCell::new(Vec::new());
        old.clone()
            .from_environment(signal, |name| {
                let mut asked = asked.borrow_mut();
                if !asked.iter().any(|known| known == name) {
                    asked.push(name.to_owned());
                }
                None
            })
            .unwrap();
        for name in asked.into_inner() {
            let values = ["http://collector:1", "grpc", "gzip", "7", "a=b"];
            let set = values.iter().find_map(|value| {
                let mut new = old.clone();
                let one = |asked: &str| (asked == name).then(|| (*value).to_owned());
                new.from_environment(signal, one).ok()?;
                let [old, new] = [&old, &new].map(|target| Table::try_from(target).unwrap());
                difference("", &old, &new)
            });
            let key = set.unwrap_or_else(|| panic!("{name} sets nothing"));
            found.entry(format!("{section}.target.{key}")).or_default().push(name);
        }
    }
    found
        .entry("kubernetes.node_name".to_owned())
        .or_default()
        .push("NODE_NAME".to_owned());
    found
}

/// The key in which `new` differs.
fn difference(prefix: &str, old: &Table, new: &Table) -> Option<String> {
    new.iter().find_map(|(key, value)| {
        let path = format!("{prefix}{key}");
        match (value, old.get(key)) {
            (_, before) if before == Some(value) => None,
            (Value::Table(inner), Some(Value::Table(before))) if key == "tls" => {
                difference(&format!("{path}."), before, inner)
            }
            _ => Some(path),
        }
    })
}

/// The flags that set a key, as `--print-config` says who set it.
fn flags() -> BTreeMap<String, String> {
    let run = |words: &[&str]| {
        let output = Command::new(environment::agent())
            .arg("agent")
            .args(words)
            .env_clear()
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let help = run(&["--help"]);
    let names = help.lines().filter_map(|line| line.trim().strip_prefix("--"));
    let names: BTreeSet<_> = names.filter_map(|line| line.split([' ', '=']).next()).collect();
    let mut found = BTreeMap::new();
    for name in names {
        let flag = format!("--{name}");
        for value in ["127.0.0.1:1", "0", "8", "warn"] {
            let printed = run(&[&flag, value, "--print-config"]);
            let mut section = "";
            for line in printed.lines() {
                if let Some(name) = line.strip_prefix('[') {
                    section = name.trim_end_matches(']');
                }
                if let Some((key, _)) = line
                    .split_once(" = ")
                    .filter(|_| line.ends_with(&format!("# flag {flag}")))
                {
                    found.insert(format!("{section}.{key}"), flag.clone());
                }
            }
        }
    }
    found
}

fn page() -> String {
    let (standard, flags) = (standard_variables(), flags());
    let mut page = HEAD.to_owned();
    let mut used = BTreeSet::new();
    for section in sections() {
        let _ = write!(page, "\n## `[{}]`\n\n{}\n\n", section.path, section.text);
        page.push_str("| key, variable, flag | default | takes | what it is | changed |\n|---|---|---|---|---|\n");
        for key in &section.keys {
            let mut names = vec![
                format!("**`{}`**", key.field.name),
                format!("`{}`", variable(&key.path)),
            ];
            let others = standard
                .get(&key.path)
                .into_iter()
                .flatten()
                .chain(flags.get(&key.path));
            names.extend(others.map(|name| format!("`{name}`")));
            used.extend(standard.get_key_value(&key.path).map(|(path, _)| path.clone()));
            used.extend(flags.get_key_value(&key.path).map(|(path, _)| path.clone()));
            let changed = if takes_a_restart(key) { "restart" } else { "at once" };
            let text = key.text.replace('|', "\\|");
            let _ = writeln!(
                page,
                "| {} | {} | {} | {text} | {changed} |",
                names.join("<br>"),
                shown_default(key),
                kind(key)
            );
        }
    }
    let known: BTreeSet<_> = standard.into_keys().chain(flags.into_keys()).collect();
    assert_eq!(known, used, "each variable and flag belongs to a key of the page");
    page
}

#[test]
fn the_configuration_reference_is_that_of_the_code() {
    super::assert_current("configuration.md", &page());
}

#[test]
fn every_key_that_is_printed_is_in_the_reference_and_can_be_set_by_its_variable() {
    fn flat(prefix: &str, table: &Table, paths: &mut BTreeSet<String>) {
        for (key, value) in table {
            match value {
                Value::Table(inner) if !inner.is_empty() || key == "tls" => {
                    flat(&format!("{prefix}{key}."), inner, paths);
                }
                _ => {
                    paths.insert(format!("{prefix}{key}"));
                }
            }
        }
    }
    let mut printed = BTreeSet::new();
    flat("", &Table::try_from(defaults()).unwrap(), &mut printed);
    let keys: Vec<_> = sections().into_iter().flat_map(|section| section.keys).collect();
    let named: BTreeSet<_> = keys.iter().map(|key| key.path.clone()).collect();
    assert!(
        printed.is_subset(&named),
        "{:?}",
        printed.difference(&named).collect::<Vec<_>>()
    );
    for key in &keys {
        // Those that are not printed are not set, and a text will do for them.
        let value = default_of(key).map_or_else(|| "/x".to_owned(), |value| value.to_string());
        let sources = Sources {
            variables: vec![(variable(&key.path), value)],
            ..Sources::default()
        };
        match sources.load() {
            Ok(loaded) => assert!(
                default_of(key).is_none() || loaded.config == Config::default(),
                "{}",
                key.path
            ),
            // It exists, but is not all of a certificate or an address.
            Err(error) => assert!(
                default_of(key).is_none() && !error.to_string().contains("unknown field"),
                "{error}"
            ),
        }
    }
}

#[test]
fn defaults_in_comments_are_those_of_the_code() {
    for key in sections().into_iter().flat_map(|section| section.keys) {
        let plain = |text: &str| text.replace([',', '`', '"'], "");
        let Some(stated) = sentence(&key.field.text, "Default:") else {
            continue;
        };
        let stated = plain(stated.trim_start_matches("Default:").trim().trim_end_matches('.'));
        let real = plain(&shown_default(&key));
        let is_all = stated
            .strip_prefix(&real)
            .is_some_and(|rest| !rest.starts_with(|next: char| next.is_ascii_alphanumeric()));
        assert!(is_all, "{}: {stated:?} is said, {real:?} it is", key.path);
    }
}

/// Two numbers with `to` between them; of what is said of a number, that is its range.
fn range(text: &str) -> Option<(i64, i64)> {
    let words: Vec<_> = text.split_whitespace().collect();
    words.windows(3).find_map(|window| {
        let number = |word: &str| {
            word.replace(',', "")
                .trim_end_matches(['.', ';', ':'])
                .parse::<i64>()
                .ok()
        };
        (window[1] == "to").then_some(())?;
        Some((number(window[0])?, number(window[2])?))
    })
}

#[test]
fn ranges_in_the_reference_are_those_that_are_enforced() {
    let mut seen = 0;
    for key in sections().into_iter().flat_map(|section| section.keys) {
        if !matches!(key.field.inner.as_str(), "u8" | "u32" | "u64" | "usize" | "f64") {
            continue;
        }
        let Some((least, most)) = range(&key.text) else {
            continue;
        };
        seen += 1;
        let load = |value: i64| {
            let mut sources = with(&key.path, &value.to_string());
            for (_, path, value) in COMPANIONS.iter().filter(|(path, ..)| *path == key.path) {
                sources
                    .flags
                    .push(("--set".to_owned(), (*path).to_owned(), (*value).to_owned()));
            }
            sources.load()
        };
        for value in [least, most] {
            assert!(
                load(value).is_ok(),
                "{} = {value}: {}",
                key.path,
                load(value).unwrap_err()
            );
        }
        for value in [least - 1, most + 1] {
            assert!(load(value).is_err(), "{} = {value} is out of its range", key.path);
        }
    }
    assert!(seen > 20, "{seen} ranges");
}

#[test]
fn the_example_in_the_reference_is_a_configuration() {
    let example = HEAD.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), example).unwrap();
    let sources = Sources {
        file: Some(file.path().to_owned()),
        ..Sources::default()
    };
    assert!(sources.load().unwrap().config.traces.target.is_set());
}
