//! Dashboards, rules and runbook: whether they fit each other, the query language, and the metrics that the agent really has.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;

use promql_parser::label::MatchOp;
use promql_parser::parser::{self, Expr, LabelModifier};
use wasmscope::metrics::reference;
use wasmscope_tests::dashboards::{self, annotations, dashboards, directory, files, panels, rules, targets};
use wasmscope_tests::environment::{self, left_out};

/// Of kube-state-metrics, of cAdvisor and of Prometheus, with the labels that queries may use.
const OTHERS: [(&str, &[&str]); 11] = [
    ("ALERTS", &["alertname", "alertstate", "cluster"]),
    ("container_cpu_cfs_periods_total", POD),
    ("container_cpu_cfs_throttled_periods_total", POD),
    ("container_cpu_usage_seconds_total", POD),
    ("container_memory_working_set_bytes", POD),
    (
        "kube_pod_container_resource_limits",
        &["cluster", "namespace", "pod", "container", "resource"],
    ),
    (
        "kube_pod_owner",
        &["cluster", "namespace", "pod", "owner_kind", "owner_name"],
    ),
    ("kube_pod_status_ready", &["cluster", "namespace", "pod", "condition"]),
    (
        "kube_daemonset_status_desired_number_scheduled",
        &["cluster", "namespace", "daemonset"],
    ),
    (
        "kube_daemonset_status_number_available",
        &["cluster", "namespace", "daemonset"],
    ),
    ("up", &["job"]),
];
const POD: &[&str] = &["cluster", "namespace", "pod", "container"];
/// Labels that the scrape adds to every series, and those of pods, which what runs in none does not have.
const OF_THE_SCRAPE: [&str; 7] = ["cluster", "node", "instance", "job", "namespace", "pod", "container"];

/// Where a query stands, and the query.
fn dashboard_queries() -> Vec<(String, String)> {
    let mut queries: Vec<_> = targets()
        .into_iter()
        .map(|target| (target.place, target.query))
        .collect();
    queries.extend(annotations());
    assert!(queries.len() > 80, "only {} queries", queries.len());
    queries
}

fn alerts() -> Vec<String> {
    rules("alerts.yaml").into_iter().map(|(_, name, _)| name).collect()
}

fn all_queries() -> Vec<(String, String)> {
    let mut queries = dashboard_queries();
    for file in ["recording.yaml", "alerts.yaml"] {
        queries.extend(
            rules(file)
                .into_iter()
                .map(|(_, name, query)| (format!("{file}: {name}"), query)),
        );
    }
    queries
}

/// What a query asks for: metrics with the labels that it selects by, and the labels that it groups or joins by.
#[derive(Debug, Default)]
struct Asked {
    metrics: Vec<(String, Vec<String>)>,
    grouped_by: BTreeSet<String>,
}

fn ask(expr: &Expr, asked: &mut Asked) {
    let mut group = |modifier: Option<&LabelModifier>| {
        if let Some(LabelModifier::Include(labels) | LabelModifier::Exclude(labels)) = modifier {
            asked.grouped_by.extend(labels.labels.iter().cloned());
        }
    };
    match expr {
        Expr::Aggregate(aggregate) => {
            group(aggregate.modifier.as_ref());
            ask(&aggregate.expr, asked);
        }
        Expr::Binary(binary) => {
            if let Some(modifier) = &binary.modifier {
                group(modifier.matching.as_ref());
            }
            ask(&binary.lhs, asked);
            ask(&binary.rhs, asked);
        }
        Expr::Call(call) => call.args.args.iter().for_each(|argument| ask(argument, asked)),
        Expr::MatrixSelector(matrix) => select(&matrix.vs, asked),
        Expr::VectorSelector(vector) => select(vector, asked),
        Expr::Paren(paren) => ask(&paren.expr, asked),
        Expr::Unary(unary) => ask(&unary.expr, asked),
        Expr::Subquery(subquery) => ask(&subquery.expr, asked),
        _ => {}
    }
}

fn select(selector: &parser::VectorSelector, asked: &mut Asked) {
    let name = selector.name.clone().expect("each selector names its metric");
    let matchers = &selector.matchers.matchers;
    assert!(matchers.iter().all(|matcher| matches!(
        matcher.op,
        MatchOp::Equal | MatchOp::NotEqual | MatchOp::Re(_) | MatchOp::NotRe(_)
    )));
    asked
        .metrics
        .push((name, matchers.iter().map(|matcher| matcher.name.clone()).collect()));
}

fn asked(place: &str, query: &str) -> Asked {
    let expr = parser::parse(&dashboards::substituted(query, "5m"))
        .unwrap_or_else(|error| panic!("{place}: {error}\n{query}"));
    let mut asked = Asked::default();
    ask(&expr, &mut asked);
    asked
}

/// Names of samples with their labels, in the code or listed above, and of recorded series.
fn known() -> BTreeMap<String, BTreeSet<String>> {
    let mut known = BTreeMap::new();
    for (name, labels) in OTHERS {
        known.insert(name.to_owned(), labels.iter().map(|&label| label.to_owned()).collect());
    }
    for family in reference::families() {
        for name in family.sample_names() {
            let mut labels: BTreeSet<_> = family.labels.iter().cloned().collect();
            if name.ends_with("_bucket") {
                labels.insert("le".to_owned());
            }
            known.insert(name, labels);
        }
    }
    for (_, name, query) in rules("recording.yaml") {
        let labels = asked(&name, &query).grouped_by;
        known.insert(name, labels);
    }
    known
}

#[test]
fn dashboards_and_panels_have_ids_of_their_own_and_do_not_overlap() {
    let mut uids = BTreeSet::new();
    for (name, dashboard) in dashboards() {
        assert!(uids.insert(dashboard["uid"].as_str().unwrap().to_owned()), "{name}");
        let mut ids = BTreeSet::new();
        let mut taken = BTreeMap::new();
        for panel in panels(&dashboard) {
            let title = panel["title"].as_str().unwrap();
            assert!(ids.insert(panel["id"].as_u64().unwrap()), "{name}: {title}");
            let at = |key: &str| panel["gridPos"][key].as_u64().unwrap();
            assert!(at("x") + at("w") <= 24 && at("w") > 0 && at("h") > 0, "{name}: {title}");
            for x in at("x")..at("x") + at("w") {
                for y in at("y")..at("y") + at("h") {
                    if let Some(other) = taken.insert((x, y), title) {
                        panic!("{name}: {title} lies over {other}");
                    }
                }
            }
        }
    }
}

#[test]
fn panels_say_what_they_show_in_units_that_grafana_knows() {
    const UNITS: [&str; 7] = ["ops", "s", "short", "percentunit", "bytes", "binBps", "none"];
    const TYPES: [&str; 5] = ["row", "stat", "table", "timeseries", "heatmap"];
    for (name, dashboard) in dashboards() {
        let variables: Vec<_> = dashboard["templating"]["list"]
            .as_array()
            .unwrap()
            .iter()
            .map(|variable| variable["name"].as_str().unwrap())
            .collect();
        assert!(variables.starts_with(&["datasource"]), "{name}");
        for panel in panels(&dashboard) {
            let title = panel["title"].as_str().unwrap();
            let kind = panel["type"].as_str().unwrap();
            assert!(TYPES.contains(&kind) && !title.is_empty(), "{name}: {title}");
            if kind == "row" {
                continue;
            }
            assert!(
                panel["description"].as_str().is_some_and(|text| text.ends_with('.')),
                "{name}: {title}"
            );
            let unit = panel["fieldConfig"]["defaults"]["unit"].as_str().unwrap();
            assert!(UNITS.contains(&unit), "{name}: {title}: {unit}");
            assert!(!panel["targets"].as_array().unwrap().is_empty(), "{name}: {title}");
            let text = panel.to_string();
            assert!(text.contains("${datasource}"), "{name}: {title}");
            for (index, _) in text.match_indices("=~\\\"$") {
                let variable: String = text[index + 5..]
                    .chars()
                    .take_while(char::is_ascii_alphabetic)
                    .collect();
                assert!(variables.contains(&variable.as_str()), "{name}: {title}: ${variable}");
            }
        }
    }
}

#[test]
fn every_query_parses_and_asks_for_metrics_and_labels_that_exist() {
    let known = known();
    for (place, query) in all_queries() {
        let asked = asked(&place, &query);
        let mut labels: BTreeSet<&str> = OF_THE_SCRAPE.into_iter().collect();
        for (metric, selected_by) in &asked.metrics {
            let own = known
                .get(metric)
                .unwrap_or_else(|| panic!("{place}: nothing exports {metric}"));
            labels.extend(own.iter().map(String::as_str));
            for label in selected_by {
                assert!(
                    own.contains(label) || OF_THE_SCRAPE.contains(&label.as_str()),
                    "{place}: {metric} has no label {label}"
                );
            }
        }
        for label in &asked.grouped_by {
            assert!(
                labels.contains(label.as_str()),
                "{place}: no metric has the label {label}"
            );
        }
    }
}

#[test]
fn every_query_of_a_panel_asks_for_the_clusters_that_were_chosen() {
    for target in dashboards::targets() {
        for (metric, labels) in asked(&target.place, &target.query).metrics {
            assert!(
                labels.iter().any(|label| label == "cluster"),
                "{}: {metric}",
                target.place
            );
        }
    }
}

#[test]
fn every_family_of_the_agent_is_in_a_panel() {
    let mut shown = BTreeSet::new();
    for (place, query) in dashboard_queries() {
        shown.extend(asked(&place, &query).metrics.into_iter().map(|(name, _)| name));
    }
    for family in reference::families() {
        assert!(
            family.sample_names().iter().any(|name| shown.contains(name)),
            "no panel shows {}",
            family.name
        );
    }
}

/// Attributes that links to a store of traces ask for, after `span.` and `resource.`.
#[test]
fn links_to_traces_ask_for_attributes_that_spans_have() {
    let sink = environment::tests_directory().join("../agent/src/sink");
    let code: String = fs::read_dir(sink)
        .unwrap()
        .filter_map(|entry| fs::read_to_string(entry.unwrap().path()).ok())
        .collect();
    let mut count = 0;
    for path in files("grafana", "json") {
        let text = fs::read_to_string(&path).unwrap();
        for scope in ["span.", "resource."] {
            for rest in text.split(&format!(" {scope}")).skip(1) {
                let end = rest.find(|letter: char| !letter.is_ascii_alphanumeric() && !"._".contains(letter));
                let name = &rest[..end.unwrap_or(rest.len())];
                assert!(
                    code.contains(&format!("\"{name}\"")),
                    "{}: {scope}{name}",
                    path.display()
                );
                count += 1;
            }
        }
    }
    assert!(count > 10, "{count} attributes in links");
}

#[test]
fn every_alert_has_a_paragraph_and_tests_of_firing_and_of_silence() {
    let runbook = fs::read_to_string(directory().join("runbook.md")).unwrap();
    let rules = fs::read_to_string(directory().join("rules/alerts.yaml")).unwrap();
    let tests: String = files("rules/tests", "yaml")
        .iter()
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    let alerts = alerts();
    let headings: Vec<_> = runbook.lines().filter_map(|line| line.strip_prefix("### ")).collect();
    assert_eq!(headings, alerts);
    for alert in &alerts {
        assert!(
            rules.contains(&format!("dashboards/runbook.md#{}\n", alert.to_lowercase())),
            "{alert}"
        );
        let expectations: Vec<_> = tests
            .split(&format!("alertname: {alert}\n"))
            .skip(1)
            .map(|rest| rest.trim_start().starts_with("exp_alerts: []"))
            .collect();
        assert!(expectations.contains(&true), "no test has {alert} silent");
        assert!(expectations.contains(&false), "no test has {alert} firing");
    }
}

#[test]
fn promtool_takes_the_rules_and_their_tests_pass() {
    let mut check = Command::new("promtool");
    check.args(["check", "rules"]);
    check.args(files("rules", "yaml"));
    let mut test = Command::new("promtool");
    test.args(["test", "rules"]).args(files("rules/tests", "yaml"));
    for mut command in [check, test] {
        match command.output() {
            Err(error) => return left_out(&format!("promtool: {error}: apt-get install prometheus")),
            Ok(output) => assert!(
                output.status.success(),
                "{}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            ),
        }
    }
}
