//! The agent as its manifest deploys it: in a pod of a real containerd, with the user, capabilities, mounts and network of the `DaemonSet`.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use k8s_cri::v1::security_profile::ProfileType;
use k8s_cri::v1::{Int64Value, SecurityProfile};
use tempfile::tempdir;
use wasmscope_tests::containerd::{Container, Containerd, Network, Pod};
use wasmscope_tests::daemon_set::{self, Manifest, Node};
use wasmscope_tests::dashboards;
use wasmscope_tests::environment::{self, Kernel, Linking};
use wasmscope_tests::http;
use wasmscope_tests::prometheus::{Histograms, Prometheus};
use wasmscope_tests::running::DEADLINE;
use wasmscope_tests::samples::{self, Sample};
use wasmscope_tests::workload::{Counts, Numbers};

const EDGE: Pod<'_> = Pod {
    uid: "8e6d4f5a-2b13-4dae-9f90-4b5c6d7e8f90",
    namespace: "shop",
    name: "edge-7d9f8c6b5-x2x4z",
    labels: &[("app", "edge")],
    container: "guest",
};
/// Works for as long as the dashboards are asked.
const LOAD: Pod<'_> = Pod {
    uid: "7d5c3f4e-1a02-4c9d-8e8f-3a4b5c6d7e8f",
    namespace: "shop",
    name: "load-0",
    labels: &[],
    container: "guest",
};
/// Calls that succeed, are suspended, trap and fail, modules that are loaded anew, memories that grow, interruptions.
const LOAD_SCRIPT: &str = "while :; do /workload --mode async --tasks 2 --calls 20 --repeat 50; /workload --scenario coldstart --repeat 2; \
    /workload --scenario traps --calls 3; /workload --scenario grow; /workload --scenario fuel --mode async --calls 5; \
    /workload --scenario epoch --calls 5; /workload --calls 5 --repeat 20 --output /dev/full; done";
/// As many seconds as scrapes, and four times that, as Grafana has it at the least.
const RATE_INTERVAL: &str = "4s";
/// Families of panels that nobody tells of here: those of the kubelet and of kube-state-metrics, what takes `CAP_SYS_ADMIN`, and what takes a
/// governor, which is off.
const NOT_HERE: [&str; 8] = [
    "container_cpu_cfs_periods_total",
    "container_cpu_cfs_throttled_periods_total",
    "container_cpu_usage_seconds_total",
    "container_memory_working_set_bytes",
    "kube_pod_owner",
    "wasmscope_bpf_program_runs_total",
    "wasmscope_bpf_program_seconds_total",
    "wasmscope_site_paused_seconds_total",
];
const SCRIPT: &str = "exec /workload --tasks 4 --threads 2 --calls 25 --wait --hold < /go";
/// Neither root nor anybody whom the node knows.
const GUEST_USER: u32 = 10_001;

/// A deployed agent, reached as the kubelet and Prometheus reach it.
struct Deployed<'a> {
    containerd: &'a Containerd,
    container: &'a Container,
    manifest: &'a Manifest,
    directory: &'a Path,
    python: &'a Path,
}

impl Deployed<'_> {
    /// A response, or why there is none.
    fn get(&self, path: &str, port: u64) -> String {
        let url = format!("http://{}:{port}{path}", self.container.address);
        self.containerd.on_its_network(|| http::get(&url))
    }

    fn scrape(&self) -> Vec<Sample> {
        let (_, port) = self.manifest.probe("livenessProbe");
        let response = self.get("/metrics", port);
        let file = self.directory.join("scrape.txt");
        fs::write(&file, response.split_once("\r\n\r\n").unwrap().1).unwrap();
        samples::read(self.python, &file)
    }

    /// Scrapes until there is what is `wanted`.
    fn scrape_until(&self, mut wanted: impl FnMut(&[Sample]) -> bool) -> Vec<Sample> {
        let begun = Instant::now();
        loop {
            let samples = self.scrape();
            if wanted(&samples) {
                return samples;
            }
            assert!(begun.elapsed() < *DEADLINE, "never: {samples:?}");
        }
    }
}

/// Samples of the guest's pod.
fn of_pod(samples: &[Sample]) -> Vec<Sample> {
    let labels = [
        ("namespace", EDGE.namespace),
        ("pod", EDGE.name),
        ("container", EDGE.container),
    ];
    let is_of_pod = |sample: &&Sample| {
        labels
            .iter()
            .all(|(key, value)| sample.labels.get(*key).is_some_and(|found| found == value))
    };
    samples.iter().filter(is_of_pod).cloned().collect()
}

fn pipe(path: &Path) -> File {
    let status = Command::new("mkfifo").arg(path).status().unwrap();
    assert!(status.success());
    fs::set_permissions(path, Permissions::from_mode(0o666)).unwrap();
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// What the kernel says that a process holds: a line of its status.
fn status(pid: u32, key: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim_start_matches(':').trim().to_owned()
}

#[test]
fn the_agent_deployed_as_its_manifest_says_names_and_counts_the_guest_of_another_pod() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let Some(program) = environment::linked_host(Linking::Static) else {
        return;
    };
    let directory = tempdir().unwrap();
    let Some(mut containerd) = Containerd::start_on(directory.path(), Network::Pods) else {
        return;
    };
    let manifest = Manifest::read(python);
    let agent = run_agent(&mut containerd, &manifest, directory.path(), None);
    let guest = Guest::run(&mut containerd, directory.path(), &program);
    let deployed = Deployed {
        containerd: &containerd,
        container: &agent,
        manifest: &manifest,
        directory: directory.path(),
        python,
    };
    containerd.logged(&agent, " ready\n");
    for probe in ["livenessProbe", "readinessProbe"] {
        let (path, port) = manifest.probe(probe);
        let response = deployed.get(&path, port);
        assert!(response.starts_with("HTTP/1.1 200"), "{path}: {response}");
    }
    assert_no_more_than_granted(agent.pid, &manifest);
    let seen = guest.assert_counted(&deployed);
    let of_pod: BTreeSet<_> = of_pod(&seen).into_iter().map(|sample| sample.name).collect();
    for family in [
        "wasm_invocations_total",
        "wasm_invocation_duration_seconds_bucket",
        "wasm_host_calls_total",
        "wasm_syscalls_total",
    ] {
        assert!(of_pod.contains(family), "{family} is not in {of_pod:?}");
    }

    // The picture of its slowest call, as an on-call engineer fetches it.
    let (_, port) = manifest.probe("livenessProbe");
    let path = format!(
        "/api/v1/traces/slowest?namespace={}&pod={}&format=mermaid",
        EDGE.namespace, EDGE.name
    );
    let diagram = deployed.get(&path, port);
    assert!(diagram.starts_with("HTTP/1.1 200"), "{diagram}");
    for part in ["sequenceDiagram", EDGE.name, "host"] {
        assert!(diagram.contains(part), "no {part}: {diagram}");
    }

    let (sandbox, container) = containerd.described(LOAD, LOAD_SCRIPT, &[(&program, "/workload")]);
    containerd.run_as(sandbox, container);
    assert_dashboards_show(&containerd, &agent, port, directory.path());
}

#[test]
fn the_agent_counts_as_ever_under_the_seccomp_profile_that_comes_with_it() {
    let Some(_kernel) = Kernel::acquire() else { return };
    let Some(python) = environment::python() else { return };
    let Some(program) = environment::linked_host(Linking::Static) else {
        return;
    };
    let directory = tempdir().unwrap();
    let Some(mut containerd) = Containerd::start_on(directory.path(), Network::Pods) else {
        return;
    };
    let manifest = Manifest::read(python);
    let profile = environment::tests_directory().join("../deploy/seccomp/wasmscope.json");
    let profile = SecurityProfile {
        profile_type: ProfileType::Localhost.into(),
        localhost_ref: fs::canonicalize(profile).unwrap().display().to_string(),
    };
    let agent = run_agent(&mut containerd, &manifest, directory.path(), Some(profile));
    let guest = Guest::run(&mut containerd, directory.path(), &program);
    containerd.logged(&agent, " ready\n");
    assert_no_more_than_granted(agent.pid, &manifest);
    guest.assert_counted(&Deployed {
        containerd: &containerd,
        container: &agent,
        manifest: &manifest,
        directory: directory.path(),
        python,
    });
}

/// Runs the image of the agent as the manifest says, with another seccomp profile if there is one.
fn run_agent(
    containerd: &mut Containerd,
    manifest: &Manifest,
    directory: &Path,
    profile: Option<SecurityProfile>,
) -> Container {
    let (settings, files) = daemon_set::image();
    let files: Vec<_> = files
        .iter()
        .map(|(path, bytes, mode)| (path.as_str(), bytes.as_slice(), *mode))
        .collect();
    containerd.import(&manifest.image(), &settings, &files);
    let node = Node {
        root: directory,
        name: "node-1",
    };
    // Every call is to be counted, whatever that costs.
    let (sandbox, mut container) = manifest.on(node, "[governor]\nenabled = false\n");
    if let Some(profile) = profile {
        let linux = container.linux.as_mut().unwrap();
        linux.security_context.as_mut().unwrap().seccomp = Some(profile);
    }
    containerd.run_as(sandbox, container)
}

/// A guest's host in a pod of its own, which works when it is told to.
struct Guest {
    container: Container,
    go: File,
}

impl Guest {
    fn run(containerd: &mut Containerd, directory: &Path, program: &Path) -> Self {
        // Whom only the owner may read, and who is not root.
        let own = directory.join("workload");
        fs::copy(program, &own).unwrap();
        chown(&own, Some(GUEST_USER), Some(GUEST_USER)).unwrap();
        fs::set_permissions(&own, Permissions::from_mode(0o700)).unwrap();
        let go_path = directory.join("go");
        let go = pipe(&go_path);
        let (sandbox, mut container) = containerd.described(EDGE, SCRIPT, &[(&own, "/workload"), (&go_path, "/go")]);
        let context = container.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        context.run_as_user = Some(Int64Value {
            value: i64::from(GUEST_USER),
        });
        let container = containerd.run_as(sandbox, container);
        containerd.line(&container, |line| line == "ready");
        Self { container, go }
    }

    /// Has it work: every call is seen. What the agent then says.
    fn assert_counted(mut self, deployed: &Deployed<'_>) -> Vec<Sample> {
        // It has looked at the guest before the guest works, so no call is missed.
        deployed.scrape_until(|samples| {
            let kinds = samples::sums(samples, "wasmscope_events_total", "kind");
            kinds.get("process").is_some_and(|count| *count > 0)
        });
        self.go.write_all(b"go\n").unwrap();
        let counted = deployed
            .containerd
            .line(&self.container, |line| line.starts_with("{\"scenario\""));
        let counted = Counts::among([counted.as_str()]);
        let total = |numbers: &Numbers| numbers.values().sum::<u64>();
        let seen = deployed.scrape_until(|samples| {
            let samples = of_pod(samples);
            samples::sums(&samples, "wasm_host_calls_total", "import") == counted.host_calls
                && total(&samples::sums(&samples, "wasm_invocations_total", "pod")) == total(&counted.invocations)
        });
        self.go.write_all(b"end\n").unwrap();
        seen
    }
}

/// A Prometheus beside the agent has data for each panel that asks for nothing but what this agent tells.
fn assert_dashboards_show(containerd: &Containerd, agent: &Container, port: u64, directory: &Path) {
    let target = format!("{}:{port}", agent.address);
    let configuration = format!(
        "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nscrape_configs:\n- job_name: wasmscope\n  honor_labels: true\n  \
         static_configs:\n  - targets: ['{target}']\n    labels: {{cluster: demo, node: node-1}}\n"
    );
    containerd.on_its_network(|| {
        let Some(prometheus) = Prometheus::start(directory, &configuration, Histograms::Classic) else {
            return;
        };
        let begun = Instant::now();
        let names = || -> BTreeSet<String> {
            let names = prometheus.get("label/__name__/values");
            names
                .as_array()
                .unwrap()
                .iter()
                .map(|name| name.as_str().unwrap().to_owned())
                .collect()
        };
        loop {
            let names = names();
            let mut targets = dashboards::targets();
            let is_missing = |family: &&str| !names.contains(*family);
            let missing: BTreeSet<_> = targets
                .iter()
                .flat_map(|target| target.families().filter(is_missing).map(str::to_owned))
                .collect();
            targets.retain(|target| !target.families().any(|family| is_missing(&family)));
            let count = targets.len();
            targets.retain(|target| !target.has_data(&prometheus, RATE_INTERVAL, begun.elapsed().as_secs().max(1)));
            if targets.is_empty() && missing.iter().map(String::as_str).eq(NOT_HERE) {
                return;
            }
            let places: Vec<_> = targets.iter().map(|target| &target.place).collect();
            assert!(
                begun.elapsed() < *DEADLINE,
                "{missing:#?} are not there; of {count} panels without them, these show nothing: {places:#?}"
            );
        }
    });
}

/// What the kernel lets the agent do is what the manifest says.
fn assert_no_more_than_granted(pid: u32, manifest: &Manifest) {
    // linux/capability.h
    const NUMBERS: [(&str, u32); 5] = [
        ("DAC_READ_SEARCH", 2),
        ("SYS_PTRACE", 19),
        ("PERFMON", 38),
        ("BPF", 39),
        ("CHECKPOINT_RESTORE", 40),
    ];
    let context = &manifest.container()["securityContext"];
    let added = context["capabilities"]["add"].as_array().unwrap();
    let number = |name: &serde_json::Value| NUMBERS.iter().find(|(known, _)| *known == name).unwrap().1;
    let granted: u64 = added.iter().map(|name| 1_u64 << number(name)).sum();
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        assert_eq!(
            u64::from_str_radix(&status(pid, set), 16).unwrap(),
            granted,
            "{set} of {added:?}"
        );
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    // Filtered: the profile is on.
    assert_eq!(status(pid, "Seccomp"), "2");
    assert_eq!(status(pid, "Uid"), "0\t0\t0\t0");
}
