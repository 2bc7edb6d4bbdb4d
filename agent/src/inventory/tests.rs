//! Names, bounds and counts of the inventory, of holdings that a hostile process could have.

use std::collections::BTreeSet;

use prometheus_client::registry::Registry;

use super::features::{label, labels, replace, text};
use super::*;
use crate::event::Coverage;
use crate::metrics::Metrics;
use crate::pipeline::Times;
use crate::process::guests::HeldCode;
use crate::runtime::Embedding;
use crate::sink::testing::{invoke, trace};
use crate::span::{Function, Module, Process};

const HOSTILE: [&str; 6] = [
    "two\nlines",
    "feature.node.kubernetes.io/other=true",
    "quotes\" and \\ and {braces}",
    "\u{202e}turned\u{0}",
    "…",
    "",
];

fn code(text_start: u64, name: &str, hash: &str) -> HeldCode {
    HeldCode {
        text_start,
        module: Arc::new(Module {
            name: name.to_owned(),
            hash: hash.to_owned(),
        }),
        kind: CodeKind::Module,
        is_of_a_file: false,
    }
}

fn holding(pid: u32, version: &str, code: Vec<HeldCode>) -> Holding {
    Holding {
        pid,
        start_ns: u64::from(pid),
        runtime_name: "wasmtime",
        versions: vec![version.to_owned()],
        files: vec![(Embedding::Executable, false)],
        code,
    }
}

fn event(pid: u32, kind: EventKind) -> Event {
    Event {
        at_ns: 1,
        pid,
        tid: pid,
        kind,
    }
}

fn process(pid: u32, start_ns: u64) -> Process {
    Process {
        pid,
        start_ns,
        ..Process::clone(&trace(invoke("run", 1, 2)).process)
    }
}

fn inventory(max_modules: usize) -> Inventory {
    let config = InventoryConfig {
        max_modules,
        ..InventoryConfig::default()
    };
    Inventory::new(config, "node".to_owned(), true)
}

fn start(inventory: &Inventory, pid: u32) {
    let process = Box::new(process(pid, u64::from(pid)));
    let coverage = Coverage::default();
    inventory.event(&event(pid, EventKind::Process { process, coverage }));
}

fn row(pid: u32, start_ns: u64, hash: &str, count: u64) -> AggregateRow {
    let export = Function {
        module: Arc::new(Module {
            name: "any".to_owned(),
            hash: hash.to_owned(),
        }),
        index: 0,
        name: "run".to_owned(),
    };
    AggregateRow {
        process: Some(Arc::new(process(pid, start_ns))),
        counted: Counted::Invocations {
            export: Some(Arc::new(export)),
        },
        outcomes: vec![("ok".to_owned(), count), ("trap".to_owned(), 1)],
        times: Times::default(),
        bytes: 0,
    }
}

fn phase(pid: u32, phase: PhaseKind, image: u64, hash: &str) -> Event {
    event(
        pid,
        EventKind::Phase {
            phase,
            start_ns: 0,
            image,
            module: None,
            hash: Some(hash.to_owned()),
            is_first: true,
        },
    )
}

fn look(inventory: &Inventory, holdings: Vec<Holding>) -> Snapshot {
    let mut state = inventory.state.lock().unwrap();
    let snapshot = inventory.look(&mut state, holdings.into_iter(), Instant::now());
    inventory.snapshot.store(Arc::new(snapshot.clone()));
    snapshot
}

#[test]
fn processes_are_counted_once_for_each_runtime_and_module_of_theirs() {
    let inventory = inventory(10);
    let twice = vec![
        code(0x1000, "a", "aa"),
        code(0x2000, "a", "aa"),
        code(0x3000, "b", "bb"),
    ];
    let mut both = holding(3, "36.0.0", vec![code(0x1000, "a", "cc")]);
    both.versions.push("48".to_owned());
    both.files.push((Embedding::CApi, false));
    let seen = look(
        &inventory,
        vec![
            holding(1, "48", twice),
            holding(2, "48", vec![code(0x1000, "a", "aa")]),
            both,
        ],
    );
    assert_eq!(seen.processes, 3);
    let runtimes: Vec<_> = seen
        .runtimes
        .iter()
        .map(|row| {
            (
                row.key.version.as_str(),
                row.key.embedding,
                row.key.stripped,
                row.processes,
            )
        })
        .collect();
    assert_eq!(
        runtimes,
        [
            ("48", "executable", "false", 2),
            ("36.0.0", "mixed", "false", 1),
            ("48", "mixed", "false", 1)
        ]
    );
    let modules: Vec<_> = seen
        .modules
        .iter()
        .map(|row| (row.module.as_str(), row.module_hash.as_str(), row.processes))
        .collect();
    assert_eq!(modules, [("a", "aa", 2), ("a", "cc", 1), ("b", "bb", 1)]);
    assert!(look(&inventory, Vec::new()).modules.is_empty());
}

#[test]
fn uses_count_for_the_process_that_made_them_and_go_with_it() {
    let inventory = inventory(10);
    start(&inventory, 1);
    start(&inventory, 2);
    inventory.row(&row(1, 1, "aa", 9));
    inventory.row(&row(2, 2, "aa", 4));
    // Of a process that had the same pid before, and of one that nobody knows.
    inventory.row(&row(1, 77, "aa", 100));
    inventory.row(&row(5, 5, "aa", 100));
    inventory.event(&phase(1, PhaseKind::Instantiate, 0x1000, "aa"));
    let held = || vec![code(0x1000, "a", "aa")];
    let seen = look(&inventory, vec![holding(1, "48", held()), holding(2, "48", held())]);
    let of = &seen.modules[0];
    assert_eq!((of.invocations_seen, of.warm_processes, of.instances_seen), (15, 2, 1));
    assert_eq!((of.idle_seconds, of.cold_ratio), (Some(0), Some(0.0)));
    inventory.event(&event(2, EventKind::ProcessGone));
    let seen = look(&inventory, vec![holding(1, "48", held())]);
    assert_eq!(
        (seen.modules[0].invocations_seen, seen.modules[0].warm_processes),
        (10, 1)
    );
    assert_eq!(inventory.state.lock().unwrap().use_count, 1);
    // What is not held any more is forgotten.
    let seen = look(&inventory, vec![holding(1, "48", Vec::new())]);
    assert_eq!((seen.processes, seen.runtimes.len()), (0, 0), "it runs none");
    assert_eq!(inventory.state.lock().unwrap().use_count, 0);
}

#[test]
fn a_module_that_was_never_invoked_or_long_ago_is_not_warm() {
    let mut inventory = inventory(10);
    start(&inventory, 1);
    let held = || vec![holding(1, "48", vec![code(0x1000, "a", "aa")])];
    let seen = look(&inventory, held());
    assert_eq!(
        (seen.modules[0].warm_processes, seen.modules[0].idle_seconds),
        (0, None)
    );
    inventory.row(&row(1, 1, "aa", 1));
    inventory.config.warm_seconds = 0;
    assert_eq!(look(&inventory, held()).modules[0].warm_processes, 0);
}

#[test]
fn how_code_came_to_be_is_what_was_seen_and_nothing_else() {
    let inventory = inventory(10);
    start(&inventory, 1);
    inventory.event(&phase(1, PhaseKind::Compile, 0x1000, "aa"));
    inventory.event(&phase(1, PhaseKind::Deserialize, 0x2000, "bb"));
    let mut mapped = code(0x4000, "d", "dd");
    mapped.is_of_a_file = true;
    let held = vec![
        code(0x1000, "a", "aa"),
        code(0x2000, "b", "bb"),
        code(0x3000, "c", "cc"),
        mapped,
        code(0x5000, "a", "aa"),
    ];
    let words = |held: Vec<HeldCode>| -> Vec<_> {
        let seen = look(&inventory, vec![holding(1, "48", held)]);
        seen.modules.iter().map(|row| row.compilation.as_str()).collect()
    };
    assert_eq!(words(held), ["mixed", "aot", "unknown", "aot"]);
    // Other code at the same place is not what was compiled there.
    let (module, hash, image) = ("e".to_owned(), "ee".to_owned(), 0x1000);
    inventory.event(&event(1, EventKind::ModulePublished { module, hash, image }));
    assert_eq!(words(vec![code(0x1000, "e", "ee")]), ["unknown"]);
}

#[test]
fn past_the_cap_modules_are_counted_together_the_most_used_are_told() {
    let inventory = inventory(2);
    let many = |pid, from: u64| {
        let code = (from..5).map(|number| code(number << 12, &format!("m{number}"), &format!("{number}")));
        holding(pid, "48", code.collect())
    };
    let seen = look(&inventory, vec![many(1, 0), many(2, 3)]);
    let names: Vec<_> = seen.modules.iter().map(|row| row.module.as_str()).collect();
    assert_eq!(names, ["m3", "m4"]);
    assert_eq!(seen.other_module_processes, 3);
    let versions = (0..100).map(|number| holding(number + 1, &format!("{number}"), vec![code(0x1000, "a", "aa")]));
    let seen = look(&inventory, versions.collect());
    assert_eq!((seen.runtimes.len(), seen.other_runtime_processes), (MAX_RUNTIMES, 36));
}

#[test]
fn uses_of_more_modules_than_are_kept_are_counted() {
    let inventory = inventory(2);
    start(&inventory, 1);
    for number in 0..MAX_USES + 3 {
        inventory.row(&row(1, 1, &number.to_string(), 1));
    }
    let seen = look(&inventory, vec![holding(1, "48", Vec::new())]);
    assert_eq!(seen.uses_not_kept, 3);
}

#[test]
fn hostile_names_stay_within_their_line_their_quotes_and_their_bounds() {
    let long = "x".repeat(10_000);
    let names: Vec<_> = HOSTILE.into_iter().chain([long.as_str()]).collect();
    let held = names.iter().enumerate();
    let held = held.map(|(number, name)| code((number as u64) << 12, name, &format!("{number:012x}")));
    let inventory = Arc::new(inventory(100));
    let seen = look(&inventory, vec![holding(1, "9\n9\"}", held.collect())]);
    assert_eq!(seen.modules.len(), names.len());
    assert!(seen.modules.iter().all(|row| row.module.len() <= MAX_TEXT_BYTES));

    // JSON says the same.
    let json = serde_json::to_string(&*inventory.snapshot()).unwrap();
    let read: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(read["schema"], "wasmscope.inventory.v1");
    assert_eq!(read["modules"].as_array().unwrap().len(), names.len());
    assert_eq!(read["runtimes"][0]["version"], "9\u{fffd}9\"}");

    // Every series is one line, whose quotes are those of its four values.
    let mut registry = Registry::default();
    registry.register_collector(Box::new(InventoryCollector(inventory.clone())));
    let mut written = String::new();
    prometheus_client::encoding::text::encode(&mut written, &registry).unwrap();
    let series: Vec<_> = written
        .lines()
        .filter(|line| line.starts_with("wasm_module_info{"))
        .collect();
    assert_eq!(series.len(), names.len());
    for line in series {
        let quotes = line.replace("\\\\", "").replace("\\\"", "").matches('"').count();
        assert_eq!(quotes, 8, "{line}");
        assert!(line.ends_with(" 1") && line.len() < 300, "{line}");
    }

    // Lines of the file are labels that Kubernetes takes.
    let lines = labels(&seen, 100);
    assert!(lines.len() < 64 << 10);
    let mut found = BTreeSet::new();
    for line in lines.lines() {
        let (name, value) = line.split_once('=').unwrap();
        let name = name.strip_prefix("feature.node.kubernetes.io/").unwrap();
        assert!(is_label(name) && !name.is_empty(), "{line}");
        assert!(is_label(value), "{line}");
        found.insert(name.split('.').next().unwrap().to_owned());
    }
    assert_eq!(
        found.into_iter().collect::<Vec<_>>(),
        ["wasm", "wasm-module", "wasm-runtime"]
    );
    assert_eq!(lines.lines().count(), 2 + names.len(), "{lines}");
}

/// As Kubernetes has it: <https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/>.
fn is_label(text: &str) -> bool {
    let is_end = |byte: Option<u8>| byte.is_none_or(|byte| byte.is_ascii_alphanumeric());
    text.len() <= 63
        && is_end(text.bytes().next())
        && is_end(text.bytes().last())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

#[test]
fn labels_keep_what_fits_and_cut_what_does_not() {
    for (untrusted, wanted) in [
        ("policy.wasm", Some("policy.wasm")),
        ("a b=c\n", Some("a_b_c")),
        ("__x__", Some("x")),
        ("…", None),
        ("", None),
    ] {
        assert_eq!(label(untrusted).as_deref(), wanted, "{untrusted:?}");
    }
    let cut = label(&format!("{}.{}", "a".repeat(62), "b".repeat(9_000))).unwrap();
    assert_eq!(cut, "a".repeat(62));
}

#[test]
fn the_largest_file_that_can_be_configured_is_one_that_is_read() {
    let inventory = inventory(10_000);
    let held: Vec<_> = (0..1_000_u64)
        .map(|number| code(number << 12, &"n".repeat(200), &format!("{number:012x}")))
        .collect();
    start(&inventory, 1);
    for code in &held {
        inventory.row(&row(1, 1, &code.module.hash, 1));
    }
    let mut holdings = vec![holding(1, "48", held)];
    holdings.extend((0..100).map(|number| holding(number + 2, &format!("{number}.0"), Vec::new())));
    let seen = look(&inventory, holdings);
    let lines = labels(&seen, 200);
    assert_eq!(lines.matches("/wasm-module.").count(), 200);
    assert_eq!(lines.matches("/wasm-module-warm.").count(), 200);
    assert!(lines.len() < 63 << 10, "{}", lines.len());
}

#[test]
fn the_file_says_what_is_there_and_until_when() {
    let inventory = inventory(10);
    let seen = look(
        &inventory,
        vec![holding(1, "48.0.8", vec![code(1, "my guest", "00aa11bb22cc")])],
    );
    assert_eq!(
        text(&labels(&seen, 50), 1_800_000_000),
        "# Written by wasmscope, which removes it when it ends.\n\
         # +expiry-time=2027-01-15T08:00:00Z\n\
         feature.node.kubernetes.io/wasm=true\n\
         feature.node.kubernetes.io/wasm-module.00aa11bb22cc=my_guest\n\
         feature.node.kubernetes.io/wasm-runtime.wasmtime=true\n\
         feature.node.kubernetes.io/wasm-runtime.wasmtime-48=true\n"
    );
    assert_eq!(
        labels(&look(&inventory, Vec::new()), 50),
        "feature.node.kubernetes.io/wasm=false\n"
    );
}

#[test]
fn the_file_is_replaced_whole_and_what_a_link_leads_to_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("wasmscope");
    let victim = directory.path().join("victim");
    std::fs::write(&victim, "untouched").unwrap();
    std::os::unix::fs::symlink(&victim, directory.path().join(".wasmscope.new")).unwrap();
    std::os::unix::fs::symlink(&victim, &path).unwrap();
    replace(&path, "first").unwrap();
    replace(&path, "second").unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "second");
    assert_eq!(std::fs::read_to_string(&victim).unwrap(), "untouched");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
}

#[test]
fn a_file_is_there_while_the_inventory_has_been_looked_at_and_goes_with_its_writer() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("wasmscope");
    let config = InventoryConfig {
        nfd_features_file: Some(path.clone()),
        ..InventoryConfig::default()
    };
    let inventory = Arc::new(inventory(10));
    let file = FeaturesFile::start(&config, inventory.clone()).unwrap();
    look(&inventory, Vec::new());
    let begun = Instant::now();
    while !path.exists() {
        assert!(begun.elapsed() < Duration::from_secs(30), "nothing is written");
        std::thread::yield_now();
    }
    drop(file);
    assert!(!path.exists());
}

#[test]
fn every_format_of_the_metrics_has_both_families() {
    let inventory = Arc::new(inventory(10));
    look(&inventory, vec![holding(1, "48", vec![code(0x1000, "a", "aa")])]);
    let metrics = Metrics::new();
    metrics.add_collector(Box::new(InventoryCollector(inventory)));
    let runtime =
        "wasm_runtime_info{runtime=\"wasmtime\",version=\"48\",embedding=\"executable\",stripped=\"false\"} 1\n";
    let module = "wasm_module_info{module=\"a\",module_hash=\"aa\",kind=\"core\",compilation=\"unknown\"} 1\n";
    for format in [crate::metrics::Format::OpenMetrics, crate::metrics::Format::Classic] {
        let text = String::from_utf8(metrics.encode_as(format)).unwrap();
        assert!(text.contains(runtime) && text.contains(module), "{text}");
        assert!(text.contains("# TYPE wasm_module_info gauge\n"), "{text}");
    }
    let bytes = metrics.encode_as(crate::metrics::Format::Protobuf);
    for name in ["wasm_runtime_info", "wasm_module_info", "module_hash"] {
        assert!(
            bytes.windows(name.len()).any(|window| window == name.as_bytes()),
            "{name}"
        );
    }
}

#[test]
fn a_path_that_would_not_be_read_is_refused() {
    for (path, is_fine) in [
        ("/etc/kubernetes/node-feature-discovery/features.d/wasmscope", true),
        ("features.d/wasmscope", false),
        ("/etc/features.d/.wasmscope", false),
        ("/", false),
    ] {
        let config = InventoryConfig {
            nfd_features_file: Some(path.into()),
            ..InventoryConfig::default()
        };
        assert_eq!(config.validate().is_ok(), is_fine, "{path}");
    }
    let config = InventoryConfig {
        interval_seconds: 400,
        ..InventoryConfig::default()
    };
    assert!(config.validate().unwrap_err().contains("nfd_expiry_seconds"));
}

#[test]
fn processes_are_checked_in_turns() {
    let pids: Vec<u32> = (1..=40).collect();
    assert_eq!(next_of(&pids, 0), (1..=16).collect::<Vec<_>>());
    let wrapped = next_of(&pids, 32);
    assert_eq!(wrapped.len(), 16);
    assert_eq!((wrapped[0], wrapped[15]), (33, 8));
    assert_eq!(next_of(&[7], 7), [7]);
    assert!(next_of(&[], 7).is_empty());
}
