//! The inventory of a node on which processes of two embeddings and two versions of the runtime come and go.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use rustix::process::Signal;
use serde_json::Value;
use wasmscope::image::{CodeObject, ReadAt};
use wasmscope_tests::agent::wasmscope;
use wasmscope_tests::environment::{self, Kernel};
use wasmscope_tests::http;
use wasmscope_tests::running::{DEADLINE, Running};
use wasmscope_tests::samples::{self, Sample};
use wasmscope_tests::workload::{Counts, Numbers, Workload};

/// An older version, which writes other code than that of the workload.
const OLD: &str = "24.0.0";
const PREFIX: &str = "feature.node.kubernetes.io/";
/// The header page of a code object precedes its text.
const PAGE_BYTES: u64 = 4096;

/// Waits until `ask` has an answer.
fn wait<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(begun.elapsed() < *DEADLINE, "{what}");
        std::thread::yield_now();
    }
}

/// The memory of a process as if it began at an address.
struct MemoryFrom(fs::File, u64);

impl ReadAt for MemoryFrom {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<usize> {
        std::os::unix::fs::FileExt::read_at(&self.0, buffer, self.1 + offset)
    }
}

/// Hashes of all code objects that a process maps, as its memory has them at this moment.
fn hashes_of(pid: u32) -> BTreeSet<String> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let executable = maps
        .lines()
        .filter(|line| line.split(' ').nth(1).unwrap().contains('x'));
    let starts = executable.map(|line| u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap());
    starts
        .filter_map(|start| {
            let memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
            let image = MemoryFrom(memory, start.checked_sub(PAGE_BYTES)?);
            Some(CodeObject::read(&image).ok()?.content_hash(&image).unwrap())
        })
        .collect()
}

/// The hash of what a version of wasmtime makes of the guest of `pywasm.py`, made by the test itself.
fn hash_of_python_guest(python: &Path, wheel: &str, directory: &Path) -> String {
    const SCRIPT: &str = "import sys\nsys.path[:0] = sys.argv[1:3]\nimport pywasm, wasmtime\n\
        open(sys.argv[3], 'wb').write(wasmtime.Module(wasmtime.Engine(), pywasm.GUEST).serialize())";
    let file = directory.join("guest.cwasm");
    let status = Command::new(python)
        .args(["-c", SCRIPT, wheel])
        .arg(environment::tests_directory().join("python"))
        .arg(&file)
        .status()
        .unwrap();
    assert!(status.success());
    let bytes = fs::read(file).unwrap();
    CodeObject::read(&bytes).unwrap().content_hash(&bytes).unwrap()
}

/// By module, of `module/export`.
fn by_module(invocations: &Numbers) -> Numbers {
    let mut modules = Numbers::new();
    for (name, count) in invocations {
        *modules.entry(name.split('/').next().unwrap().to_owned()).or_default() += count;
    }
    modules
}

/// A running agent with a features file.
struct Node {
    agent: Running,
    address: String,
    directory: tempfile::TempDir,
}

impl Node {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let set = |key: &str, value: &str| format!("{key}={value}");
        let path = |name: &str| directory.path().join(name).display().to_string();
        let mut command = wasmscope();
        command.args(["agent", "--listen", "127.0.0.1:0"]);
        for setting in [
            set("instance.lock_file", &path("agent.lock")),
            set("inventory.nfd_features_file", &path("wasmscope")),
            set("inventory.interval_seconds", "1"),
            // Nothing is to be paused, whatever it costs.
            set("governor.enabled", "false"),
        ] {
            command.args(["--set", &setting]);
        }
        let agent = Running::start(command);
        let line = agent.stderr_line(|line| line.contains("serving HTTP"));
        let address = line.rsplit_once("address=").unwrap().1.trim().to_owned();
        agent.stderr_line(|line| line.ends_with("ready"));
        Self {
            agent,
            address,
            directory,
        }
    }

    fn get(&self, path: &str) -> String {
        let response = http::get(&format!("http://{}{path}", self.address));
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        body.to_owned()
    }

    fn inventory(&self) -> Value {
        serde_json::from_str(&self.get("/api/v1/inventory")).unwrap()
    }

    /// The inventory once it is of so many processes.
    fn of_processes(&self, count: u64) -> Value {
        wait(&format!("{count} processes"), || {
            let inventory = self.inventory();
            (inventory["processes"] == count).then_some(inventory)
        })
    }

    /// Series of a family that have more than no process.
    fn samples(&self, python: &Path, name: &str) -> Vec<Sample> {
        let file = self.directory.path().join("scrape.txt");
        fs::write(&file, self.get("/metrics")).unwrap();
        let mut samples = samples::read(python, &file);
        samples.retain(|sample| sample.name == name);
        samples
    }

    fn labels(&self) -> BTreeMap<String, String> {
        let text = fs::read_to_string(self.directory.path().join("wasmscope")).unwrap_or_default();
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines
            .map(|line| line.strip_prefix(PREFIX).unwrap().split_once('=').unwrap())
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    fn wait_for_labels(&self, wanted: &BTreeMap<String, String>) {
        let mut seen = BTreeMap::new();
        let begun = Instant::now();
        while seen != *wanted {
            assert!(begun.elapsed() < *DEADLINE, "{seen:?} is not {wanted:?}");
            seen = self.labels();
        }
    }
}

/// Lets a workload run, which stays afterwards.
fn let_work(workload: &mut Workload) -> Counts {
    workload.0.send_line();
    Counts::among([workload
        .0
        .stdout_line(|line| line.starts_with("{\"scenario\""))
        .as_str()])
}

#[test]
fn the_inventory_is_what_runs_on_the_node_and_empty_once_that_has_ended() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let Some(wheel) = environment::wheel(OLD) else { return };
    // One that was there before the agent, one of each other kind that comes later.
    let before = Workload::ready(&["--calls", "5", "--repeat", "3", "--hold"]);
    let node = Node::start();
    node.of_processes(1);
    let mapped = Workload::ready(&["--scenario", "cwasm", "--calls", "4", "--repeat", "2", "--hold"]);
    let arguments = ["--library", &wheel, "--calls", "3", "--repeat", "4", "--hold"];
    let library = Workload::ready_python(python, "pywasm.py", &arguments);
    let component = Workload::ready(&["--scenario", "components", "--calls", "3", "--hold"]);
    let mut workloads = [before, mapped, library, component];
    let inventory = node.of_processes(4);

    // Runtimes.
    let workload_version = inventory["runtimes"][0]["version"].as_str().unwrap().to_owned();
    assert_eq!(workload_version.split('.').next(), Some("48"));
    let row = |version: &str, embedding: &str, processes: u64| {
        let sample = [
            ("runtime", "wasmtime"),
            ("version", version),
            ("embedding", embedding),
            ("stripped", "false"),
        ];
        let labels: BTreeMap<_, _> = sample.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        (labels, processes)
    };
    let old = inventory["runtimes"][1]["version"].as_str().unwrap().to_owned();
    assert_eq!(old.split('.').next(), OLD.split('.').next());
    let runtimes = [row(&workload_version, "executable", 3), row(&old, "c_api", 1)];
    let told = |samples: Vec<Sample>| -> Vec<_> {
        let value = |sample: &Sample| sample.value.unwrap() as u64;
        let mut told: Vec<_> = samples
            .into_iter()
            .map(|sample| (sample.labels.clone(), value(&sample)))
            .collect();
        told.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        told
    };
    assert_eq!(told(node.samples(python, "wasm_runtime_info")), runtimes);

    // Modules: by hash, names and processes that hold them.
    let pids = workloads.each_ref().map(|workload| workload.0.pid());
    let mut wanted: BTreeMap<String, u64> = BTreeMap::new();
    for hash in pids.into_iter().flat_map(hashes_of) {
        *wanted.entry(hash).or_default() += 1;
    }
    let old_hash = hash_of_python_guest(python, &wheel, node.directory.path());
    assert_eq!(hashes_of(pids[2]), BTreeSet::from([old_hash]));
    let counts = workloads.each_mut().map(let_work);
    let modules = |inventory: &Value| inventory["modules"].as_array().unwrap().clone();
    let text = |row: &Value, key: &str| row[key].as_str().unwrap().to_owned();
    let held = |inventory: &Value| -> BTreeMap<String, u64> {
        let rows = modules(inventory).into_iter();
        rows.map(|row| (text(&row, "module_hash"), row["processes"].as_u64().unwrap()))
            .collect()
    };
    assert_eq!(held(&inventory), wanted);
    // Two of them run the same module, one of them compiled and the other mapped.
    let shared: Vec<_> = modules(&inventory)
        .into_iter()
        .filter(|row| row["processes"] == 2)
        .collect();
    assert_eq!(shared.len(), 1, "{shared:?}");

    // What was invoked, by name.
    let [before, mapped, library, component] = counts.each_ref().map(|counted| by_module(&counted.invocations));
    let mut invoked = Numbers::new();
    for (module, count) in before.into_iter().chain(mapped).chain(library) {
        *invoked.entry(module).or_default() += count;
    }
    // Its modules are one piece of code.
    let of_component: u64 = component.values().sum();
    let is_component = |row: &Value| row["kind"] == "component";
    let inventory = wait("all invocations are known", || {
        let inventory = node.inventory();
        let rows = modules(&inventory);
        let count = |row: &Value| row["invocations_seen"].as_u64().unwrap();
        let core = rows.iter().filter(|row| !is_component(row));
        let core: Numbers = core.map(|row| (text(row, "module"), count(row))).collect();
        let component: Vec<_> = rows.iter().filter(|row| is_component(row)).map(count).collect();
        (core == invoked && component == [of_component]).then_some(inventory)
    });
    for row in modules(&inventory) {
        assert_eq!(row["warm_processes"], row["processes"], "{row}");
        // What a process publishes first is already compiled when the process is noticed. One of those that share a module mapped it.
        let compilation = if row["processes"] == 2 { "mixed" } else { "unknown" };
        assert_eq!(row["compilation"], compilation, "{row}");
    }
    assert_eq!(inventory["uses_not_kept"], 0);
    assert_eq!(node.samples(python, "wasm_module_info").len(), wanted.len());

    // The same as labels of the node.
    let major = |version: &str| version.split('.').next().unwrap().to_owned();
    let mut labels: BTreeMap<_, _> = [
        "wasm".to_owned(),
        "wasm-runtime.wasmtime".to_owned(),
        format!("wasm-runtime.wasmtime-{}", major(&workload_version)),
        format!("wasm-runtime.wasmtime-{}", major(&old)),
    ]
    .map(|name| (name, "true".to_owned()))
    .into();
    for row in modules(&inventory) {
        let hash = text(&row, "module_hash");
        labels.insert(format!("wasm-module.{hash}"), text(&row, "module"));
        labels.insert(format!("wasm-module-warm.{hash}"), "true".to_owned());
    }
    node.wait_for_labels(&labels);

    // All end.
    for workload in workloads {
        workload.0.finish().succeeded();
    }
    let inventory = node.of_processes(0);
    assert_eq!(
        inventory["runtimes"].as_array().unwrap().len() + modules(&inventory).len(),
        0
    );
    assert_eq!(node.samples(python, "wasm_runtime_info"), []);
    assert_eq!(node.samples(python, "wasm_module_info"), []);
    node.wait_for_labels(&BTreeMap::from([("wasm".to_owned(), "false".to_owned())]));

    // Modules that come and go while a process runs.
    let mut cold = Workload::ready(&["--scenario", "coldstart", "--hold"]);
    node.of_processes(1);
    let counted = by_module(&let_work(&mut cold).invocations)["thrice"];
    let wanted: BTreeMap<_, _> = hashes_of(cold.0.pid()).into_iter().map(|hash| (hash, 1)).collect();
    let is_known = |inventory: &Value| {
        let rows = modules(inventory);
        let thrice = rows.iter().find(|row| row["module"] == "thrice");
        let seen = thrice.map(|row| (row["cold_starts_seen"].as_u64(), row["invocations_seen"].as_u64()));
        held(inventory) == wanted && seen == Some((Some(3), Some(counted)))
    };
    let begun = Instant::now();
    let inventory = loop {
        let inventory = node.inventory();
        if is_known(&inventory) {
            break inventory;
        }
        assert!(
            begun.elapsed() < *DEADLINE,
            "{wanted:?} and {counted} invocations are not in {inventory}"
        );
    };
    let row = |name: &str| {
        let mut rows = modules(&inventory).into_iter();
        rows.find(|row| row["module"] == name)
            .unwrap_or_else(|| panic!("{name} is not in {inventory}"))
    };
    // Compiled, deserialized and mapped, each called for the first time, and one of them once more.
    assert_eq!(row("thrice")["compilation"], "mixed");
    let uncalled = row("uncalled");
    assert_eq!(
        (&uncalled["compilation"], &uncalled["idle_seconds"]),
        (&"jit".into(), &Value::Null)
    );
    assert_eq!(
        (&uncalled["warm_processes"], &uncalled["invocations_seen"]),
        (&0.into(), &0.into())
    );
    cold.0.finish().succeeded();
    node.of_processes(0);

    let Node { agent, directory, .. } = node;
    agent.signal(Signal::TERM);
    agent.finish().succeeded();
    let left: Vec<_> = fs::read_dir(directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(
        !left.iter().any(|name| name.to_string_lossy().contains("wasmscope")),
        "{left:?}"
    );
}
