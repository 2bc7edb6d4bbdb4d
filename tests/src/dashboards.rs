//! The dashboards and rules of `dashboards/` as tests read them, and their queries as Grafana would ask them.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::environment;
use crate::prometheus::Prometheus;

const MAX_FILE_BYTES: u64 = 512 << 10;
/// Variables that queries filter by.
const VARIABLES: [&str; 6] = ["cluster", "node", "namespace", "pod", "module", "export"];

/// A query of a panel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Dashboard, panel with its id, and the letter of the query.
    pub place: String,
    /// With variables.
    pub query: String,
    /// Whether the panel shows how it is now, not how it was.
    pub is_instant: bool,
    /// Whether exemplars are asked for too.
    pub has_exemplars: bool,
}

impl Target {
    /// Whether the panel shows something, of the last seconds if it shows how it was.
    pub fn has_data(&self, prometheus: &Prometheus, rate_interval: &str, seconds: u64) -> bool {
        let query = substituted(&self.query, rate_interval);
        if self.is_instant {
            return has_number(&prometheus.query(&query));
        }
        has_number(&prometheus.query_range(&query, seconds))
            && (!self.has_exemplars || links_to_traces(&prometheus.exemplars(&query, seconds)))
    }

    /// The families that it asks for: of the agent, of the rules, of a kubelet and of kube-state-metrics.
    pub fn families(&self) -> impl Iterator<Item = &str> {
        let words = self
            .query
            .split(|letter: char| !letter.is_ascii_alphanumeric() && !"_:".contains(letter));
        words.filter(|word| {
            let starts = ["wasm_", "wasmscope_", "kube_", "container_"];
            starts.iter().any(|start| word.starts_with(start)) || word.contains(":wasm")
        })
    }
}

/// Whether there is a number in one of the series.
pub fn has_number(series: &[Value]) -> bool {
    let is_number = |sample: &Value| {
        let text = sample[1].as_str().expect("values are texts");
        text.parse::<f64>().expect("values are numbers").is_finite()
    };
    series.iter().any(|series| match &series["value"] {
        Value::Null => series["values"]
            .as_array()
            .is_some_and(|values| values.iter().any(is_number)),
        sample => is_number(sample),
    })
}

fn links_to_traces(exemplars: &[Value]) -> bool {
    let ids = exemplars
        .iter()
        .filter_map(|exemplar| exemplar["labels"]["trace_id"].as_str());
    ids.map(str::len).any(|digits| digits == 32)
}

/// `dashboards/` in the source tree.
pub fn directory() -> PathBuf {
    environment::tests_directory().join("../dashboards")
}

/// Files in one of its folders, by name; there is at least one.
pub fn files(under: &str, extension: &str) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(directory().join(under))
        .expect("the folder can be read")
        .map(|entry| entry.expect("the folder can be read").path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no {extension} in {under}");
    files
}

/// Names of files and what is in them.
pub fn dashboards() -> Vec<(String, Value)> {
    let read = |path: &Path| {
        let bytes = fs::read(path).expect("a dashboard can be read");
        assert!(bytes.len() as u64 <= MAX_FILE_BYTES, "{}", path.display());
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .expect("names are UTF-8");
        let json = serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        (name.to_owned(), json)
    };
    files("grafana", "json").iter().map(|path| read(path)).collect()
}

/// Of a dashboard, rows included.
pub fn panels(dashboard: &Value) -> &Vec<Value> {
    dashboard["panels"].as_array().expect("a dashboard has panels")
}

/// The queries of all panels.
pub fn targets() -> Vec<Target> {
    let mut targets = Vec::new();
    for (name, dashboard) in dashboards() {
        for panel in panels(&dashboard) {
            let title = panel["title"].as_str().expect("panels have titles");
            let id = &panel["id"];
            for target in panel["targets"].as_array().into_iter().flatten() {
                let letter = target["refId"].as_str().expect("queries have letters");
                targets.push(Target {
                    place: format!("{name}: {title} ({id}): {letter}"),
                    query: target["expr"].as_str().expect("targets are queries").to_owned(),
                    is_instant: target["instant"] == true,
                    has_exemplars: target["exemplar"] == true,
                });
            }
        }
    }
    targets
}

/// The queries by which dashboards mark points in time, and where they stand.
pub fn annotations() -> Vec<(String, String)> {
    let mut queries = Vec::new();
    for (name, dashboard) in dashboards() {
        let list = dashboard["annotations"]["list"]
            .as_array()
            .expect("there are annotations");
        let expressions = list.iter().filter_map(|annotation| annotation["expr"].as_str());
        queries.extend(expressions.map(|query| (format!("{name}: annotation"), query.to_owned())));
    }
    queries
}

/// What variables take their values from: where each stands, the label, and the series.
pub fn variables() -> Vec<(String, String, String)> {
    let mut variables = Vec::new();
    for (name, dashboard) in dashboards() {
        let list = dashboard["templating"]["list"].as_array().expect("there are variables");
        for variable in list.iter().filter(|variable| variable["type"] == "query") {
            let place = format!("{name}: ${}", variable["name"].as_str().unwrap_or_default());
            // As they are, all would be a choice among the values: what is in no pod would not be shown.
            assert_eq!(variable["allValue"], ".*", "{place}");
            let query = variable["query"]["query"].as_str().expect("a variable has a query");
            let (series, label) = query
                .strip_prefix("label_values(")
                .and_then(|rest| rest.strip_suffix(')')?.rsplit_once(", "))
                .unwrap_or_else(|| panic!("{place}: {query}"));
            variables.push((place, label.to_owned(), series.to_owned()));
        }
    }
    variables
}

/// A query with all of each variable, over a rate interval.
pub fn substituted(query: &str, rate_interval: &str) -> String {
    let query = query.replace("$__rate_interval", rate_interval);
    VARIABLES
        .iter()
        .fold(query, |query, variable| query.replace(&format!("${variable}"), ".*"))
}

/// The rules of a file: kind, name and query.
pub fn rules(file: &str) -> Vec<(String, String, String)> {
    let text = fs::read_to_string(directory().join("rules").join(file)).expect("rules can be read");
    let mut rules: Vec<(String, String, String)> = Vec::new();
    let mut in_query = false;
    for line in text.lines() {
        let word = line.trim_start();
        if let Some((kind, name)) = word.strip_prefix("- ").and_then(|rest| rest.split_once(": "))
            && matches!(kind, "alert" | "record")
        {
            rules.push((kind.to_owned(), name.to_owned(), String::new()));
        } else if let Some(query) = word.strip_prefix("expr: ") {
            in_query = query == "|";
            if !in_query {
                query.clone_into(&mut rules.last_mut().expect("a query is of a rule").2);
            }
        } else if in_query && line.starts_with("          ") {
            let query = &mut rules.last_mut().expect("a query is of a rule").2;
            query.push_str(word);
            query.push('\n');
        } else {
            in_query = false;
        }
    }
    assert!(rules.iter().all(|(_, _, query)| !query.is_empty()));
    rules
}

/// A copy of a file of rules whose groups are looked at every second, and whose alerts fire after one. Nothing else is changed.
pub fn hurried_rules(file: &str, directory_of_copy: &Path) -> PathBuf {
    let text = fs::read_to_string(directory().join("rules").join(file)).expect("rules can be read");
    let mut copy = String::new();
    for line in text.lines() {
        let key = line.trim_start().split_once(": ").map_or("", |(key, _)| key);
        if matches!(key, "for" | "interval") {
            let indent = &line[..line.len() - line.trim_start().len()];
            copy.push_str(indent);
            copy.push_str(key);
            copy.push_str(": 1s");
        } else {
            copy.push_str(line);
        }
        copy.push('\n');
    }
    let path = directory_of_copy.join(file);
    fs::write(&path, copy).expect("the copy can be written");
    path
}
