//! What is deployed: the chart as Helm renders it, the manifests made of it, the systemd unit, and that they agree with each other and with the code.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use wasmscope::config::{Config, Sources};
use wasmscope_tests::environment::{self, left_out};

/// As `wasmscope check` looks for them.
const CAPABILITIES: [&str; 5] = ["BPF", "PERFMON", "SYS_PTRACE", "DAC_READ_SEARCH", "CHECKPOINT_RESTORE"];

fn root() -> PathBuf {
    environment::tests_directory().join("..")
}

fn fixture(name: &str) -> PathBuf {
    environment::tests_directory().join("fixtures/deploy").join(name)
}

/// Runs `chart.py`; `None` where there is no Python.
fn chart(words: &[&str], values: &[PathBuf]) -> Option<Output> {
    let python = environment::python()?;
    let mut command = Command::new(python);
    command
        .arg(environment::tests_directory().join("python/chart.py"))
        .args(words)
        .args(values)
        .current_dir(root());
    Some(command.output().expect("Python can be run"))
}

fn rendered(what: &str, values: &[PathBuf]) -> Option<String> {
    let output = chart(&[what, "deploy/helm/wasmscope"], values)?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap())
}

/// Compares a file with what it should be; writes it where `WASMSCOPE_UPDATE` is set.
fn assert_current(path: &Path, expected: &str) {
    if std::env::var_os("WASMSCOPE_UPDATE").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, expected).unwrap();
    }
    let found = fs::read_to_string(path).unwrap_or_default();
    assert!(
        found == expected,
        "{} is not current: WASMSCOPE_UPDATE=1 cargo test -p wasmscope-tests --test deploy",
        path.display()
    );
}

#[test]
fn the_chart_renders_valid_manifests_as_recorded() {
    for name in ["everything", "least"] {
        let Some(text) = rendered("golden", &[fixture(&format!("{name}.yaml"))]) else {
            return;
        };
        assert_current(&fixture(&format!("{name}.golden.yaml")), &text);
    }
}

#[test]
fn the_prometheus_operator_and_promtool_take_what_they_read() {
    let directory = tempfile::tempdir().unwrap();
    let Some(text) = rendered("text", &[fixture("everything.yaml")]) else {
        return;
    };
    let yaml = directory.path().join("rendered.yaml");
    fs::write(&yaml, text).unwrap();
    let manifests = chart(&["json"], &[yaml]).unwrap();
    let json = directory.path().join("rendered.json");
    fs::write(&json, &manifests.stdout).unwrap();
    let folder = environment::tests_directory().join("crds");
    if !folder.join("node_modules").is_dir() {
        return left_out("no packages in tests/crds: npm ci --prefix tests/crds");
    }
    let mut validate = Command::new("node");
    validate
        .arg("validate.mjs")
        .current_dir(folder)
        .stdin(fs::File::open(json).unwrap());
    let output = validate.output().expect("Node.js can be run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        "3",
        "a PodMonitor, recording rules and alerts"
    );

    let manifests: Value = serde_json::from_slice(&manifests.stdout).unwrap();
    let all = manifests.as_array().unwrap();
    for rules in all.iter().filter(|one| one["kind"] == "PrometheusRule") {
        let file = directory.path().join("rules.yaml");
        fs::write(&file, rules["spec"].to_string()).unwrap();
        match Command::new("promtool").args(["check", "rules"]).arg(&file).output() {
            Err(error) => return left_out(&format!("promtool: {error}: apt-get install prometheus")),
            Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
        }
    }
}

#[test]
fn no_right_is_granted_that_is_not_used() {
    let rules = |values: &[PathBuf]| {
        let documents = documents(values)?;
        let roles = documents
            .iter()
            .filter(|document| document["kind"].as_str().unwrap().ends_with("Role"));
        let rules = roles.flat_map(|role| role["rules"].as_array().unwrap());
        Some(rules.cloned().collect::<Vec<_>>())
    };
    let right = |resource: &str, verbs: &[&str]| serde_json::json!({"apiGroups": [""], "resources": [resource], "verbs": verbs});
    let Some(default) = rules(&[]) else { return };
    assert_eq!(default, [right("pods", &["list", "watch"])]);
    let with_kubelet = rules(&[fixture("everything.yaml")]).unwrap();
    assert_eq!(
        with_kubelet,
        [right("pods", &["list", "watch"]), right("nodes/pods", &["get"])]
    );
    let old = rules(&[fixture("old-kubelet.yaml")]).unwrap();
    assert_eq!(old, [right("nodes/proxy", &["get"])], "only where it is asked for");
    assert_eq!(rules(&[fixture("least.yaml")]).unwrap(), [] as [Value; 0]);
}

#[test]
fn the_unit_knows_the_exit_codes_and_hears_from_the_agent() {
    let unit = fs::read_to_string(root().join("deploy/systemd/wasmscope.service")).unwrap();
    for line in ["Type=notify", "RestartPreventExitStatus=2", "SuccessExitStatus=3"] {
        assert!(unit.lines().any(|found| found == line), "{line}");
    }
    assert!(unit.contains("\nWatchdogSec="));
    let source = fs::read_to_string(root().join("agent/src/agent/drain.rs")).unwrap();
    assert!(source.contains("EXIT_UNDELIVERED: u8 = 3;"));
}

#[test]
fn values_that_do_not_exist_are_refused_by_name() {
    let Some(output) = chart(&["text", "deploy/helm/wasmscope"], &[fixture("misspelt.yaml")]) else {
        return;
    };
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("'apiserver' not allowed"));
}

#[test]
fn values_that_kubernetes_would_refuse_are_refused_before() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("values.yaml");
    for (values, named) in [
        ("seccompProfile: {type: Localhost}", "seccompProfile"),
        (
            "appArmorProfile: {type: Unconfined, localhostProfile: other}",
            "appArmorProfile",
        ),
        ("nodeSelector: {spin: true}", "nodeSelector"),
        ("podAnnotations: {weight: 1}", "podAnnotations"),
        // Those that the chart sets itself.
        ("podLabels: {app.kubernetes.io/name: other}", "not"),
        ("podAnnotations: {checksum/config: \"1\"}", "not"),
        ("extraEnv: [{name: NODE_NAME, value: other}]", "extraEnv"),
        ("extraVolumes: [{name: run, emptyDir: {}}]", "extraVolumes"),
        ("podMonitor: {interval: often}", "interval"),
        ("podMonitor: {interval: \"\"}", "interval"),
    ] {
        fs::write(&path, values).unwrap();
        let Some(output) = chart(&["text", "deploy/helm/wasmscope"], std::slice::from_ref(&path)) else {
            return;
        };
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{values}");
        assert!(said.contains(named), "{values}: {said}");
    }
    for values in [
        "podMonitor: {enabled: true, interval: 1m30s, scrapeTimeout: 1h}",
        "seccompProfile: {type: Unconfined}",
    ] {
        fs::write(&path, values).unwrap();
        let output = chart(&["text", "deploy/helm/wasmscope"], std::slice::from_ref(&path)).unwrap();
        assert!(
            output.status.success(),
            "{values}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

#[test]
fn the_plain_manifests_are_the_chart_with_its_defaults() {
    const HEAD: &str = "# The chart with its defaults and its namespace; made by WASMSCOPE_UPDATE=1 cargo test -p wasmscope-tests --test deploy.
# Set the image to where your nodes pull it from, then: kubectl apply -f deploy/manifests/wasmscope.yaml
apiVersion: v1
kind: Namespace
metadata:
  name: wasmscope
  labels:
    # The host's process namespace and a path on the host are beyond the other levels.
    pod-security.kubernetes.io/enforce: privileged
---
";
    let Some(text) = rendered("text", &[]) else { return };
    let path = root().join("deploy/manifests/wasmscope.yaml");
    assert_current(&path, &format!("{HEAD}{text}"));
    let output = chart(&["validate"], &[path]).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn manifests_and_unit_grant_what_check_asks_for_and_nothing_else() {
    let manifest = fs::read_to_string(root().join("deploy/manifests/wasmscope.yaml")).unwrap();
    let added: Vec<_> = manifest
        .lines()
        .skip_while(|line| line.trim() != "add:")
        .skip(1)
        .take_while(|line| line.trim().starts_with(['-', '#']))
        .filter_map(|line| line.trim().strip_prefix("- "))
        .collect();
    assert_eq!(added, CAPABILITIES);
    for line in [
        "drop: [ALL]",
        "privileged: false",
        "readOnlyRootFilesystem: true",
        "allowPrivilegeEscalation: false",
    ] {
        assert!(manifest.contains(line), "{line}");
    }
    let unit = fs::read_to_string(root().join("deploy/systemd/wasmscope.service")).unwrap();
    let named: Vec<_> = CAPABILITIES.iter().map(|name| format!("CAP_{name}")).collect();
    for setting in ["CapabilityBoundingSet", "AmbientCapabilities"] {
        assert!(unit.contains(&format!("{setting}={}\n", named.join(" "))), "{setting}");
    }
    let source = fs::read_to_string(root().join("agent/src/bpf/features.rs")).unwrap();
    assert_eq!(source.matches("        \"CAP_").count(), CAPABILITIES.len());
    for name in named {
        assert!(source.contains(&format!("\"{name}\"")), "{name}");
    }
}

#[test]
fn systemd_takes_the_unit() {
    let unit = fs::read_to_string(root().join("deploy/systemd/wasmscope.service")).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("wasmscope.service");
    // It looks whether the program is there.
    fs::write(&path, unit.replace("/usr/local/bin/wasmscope", "/bin/true")).unwrap();
    let mut verify = Command::new("systemd-analyze");
    match verify.arg("verify").arg(&path).output() {
        Err(error) => left_out(&format!("systemd-analyze: {error}: apt-get install systemd")),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && said.trim().is_empty(), "{said}");
        }
    }
    // What is looked at, and what looking takes, keeps it above 2; a unit without any restriction has 9.6.
    let output = Command::new("systemd-analyze")
        .args(["security", "--offline=true", "--threshold=35"])
        .arg(&path)
        .output();
    if let Ok(output) = output {
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{said}");
    }
}

#[test]
fn the_dockerfile_copies_what_is_built_and_keeps_out_what_is_not_needed() {
    let dockerfile = fs::read_to_string(root().join("deploy/Dockerfile")).unwrap();
    let (build, last) = dockerfile.rsplit_once("\nFROM ").unwrap();
    assert!(
        last.starts_with("gcr.io/distroless/"),
        "no shell and no package manager"
    );
    for (word, value) in [
        ("COPY --from=build ", "/wasmscope /usr/local/bin/wasmscope"),
        ("ENTRYPOINT ", "[\"/usr/local/bin/wasmscope\"]"),
        ("CMD ", "[\"agent\"]"),
        ("USER ", "0:0"),
        ("EXPOSE ", "9464"),
    ] {
        let found: Vec<_> = last.lines().filter_map(|line| line.strip_prefix(word)).collect();
        assert_eq!(found, [value], "{word}");
    }
    assert!(build.contains(" target/release/wasmscope /wasmscope\n"));
    // The compiler is the one that the workspace asks for.
    let workspace = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let minimum = workspace.lines().find_map(|line| line.strip_prefix("rust-version = "));
    let image = format!(
        "FROM docker.io/library/rust:{}-bookworm AS build\n",
        minimum.unwrap().trim_matches('"')
    );
    assert!(build.contains(&image), "{image}");
    // Its commands are commands.
    let help = |words: &[&str]| {
        let output = Command::new(env!("CARGO"))
            .args(words)
            .current_dir(root())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{words:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    for words in [
        &["xtask", "setup"][..],
        &["build", "--release", "--locked", "--package", "wasmscope", "--bins"],
    ] {
        assert!(build.contains(&format!("cargo {}", words.join(" "))), "{words:?}");
        help(&[words, &["--help"]].concat());
    }
    let ignored = fs::read_to_string(root().join(".dockerignore")).unwrap();
    let ignored: Vec<_> = ignored.lines().collect();
    for name in [".git", "target", "**/target", "**/node_modules"] {
        assert!(ignored.contains(&name), "{name}");
    }
    // What the binary includes while it is built is not kept out.
    for path in [
        "agent/build.rs",
        "ebpf/Cargo.toml",
        "ebpf/Cargo.lock",
        "xtask/src/toolchain.rs",
        ".cargo/config.toml",
    ] {
        assert!(root().join(path).is_file(), "{path}");
    }
}

/// What a secret holds, where the chart takes a variable from one.
const SECRET: &str = "authorization=Bearer%20s3cret";

/// What the chart makes of `values`.
fn documents(values: &[PathBuf]) -> Option<Vec<Value>> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("manifests.yaml");
    fs::write(&path, rendered("text", values)?).unwrap();
    let output = chart(&["json"], &[path])?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

/// The agent's container and its pod's specification, out of a chart rendered with `values`, and the configuration file.
fn deployed(values: &[PathBuf]) -> Option<(Value, String)> {
    let documents = documents(values)?;
    let of_kind = |kind: &str| documents.iter().find(|document| document["kind"] == kind).unwrap();
    let file = of_kind("ConfigMap")["data"]["config.toml"].as_str().unwrap().to_owned();
    Some((of_kind("DaemonSet")["spec"]["template"]["spec"].clone(), file))
}

fn variable(of: &Value) -> (String, String) {
    let source = &of["valueFrom"];
    let value = match source["fieldRef"]["fieldPath"].as_str() {
        Some("spec.nodeName") => "worker-3",
        Some("status.hostIP") => "fd00::7",
        Some(other) => panic!("{other} is not translated"),
        None if source["secretKeyRef"].is_object() => SECRET,
        None => of["value"].as_str().unwrap(),
    };
    (of["name"].as_str().unwrap().to_owned(), value.to_owned())
}

#[test]
fn the_agent_takes_what_the_chart_makes_of_any_values_and_finds_what_it_needs_mounted() {
    let fixtures = ["everything", "least", "old-kubelet", "tuned"].map(|name| vec![fixture(&format!("{name}.yaml"))]);
    for values in [vec![]].into_iter().chain(fixtures) {
        let Some((pod, file)) = deployed(&values) else { return };
        let container = &pod["containers"][0];
        let path = tempfile::NamedTempFile::new().unwrap();
        fs::write(path.path(), file).unwrap();
        let arguments: Vec<_> = container["args"]
            .as_array()
            .unwrap()
            .iter()
            .map(|word| word.as_str().unwrap())
            .collect();
        assert_eq!(arguments, ["agent", "--config", "/etc/wasmscope/config.toml"]);
        let variables: Vec<_> = container["env"].as_array().unwrap().iter().map(variable).collect();
        let output = Command::new(environment::agent())
            .args(["agent", "--check-config", "--config"])
            .arg(path.path())
            .env_clear()
            .envs(variables.clone())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{values:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );

        let sources = Sources {
            file: Some(path.path().to_owned()),
            // The chart's one is for the process that runs there.
            variables: variables
                .into_iter()
                .filter(|(name, _)| name != "WASMSCOPE_KUBERNETES__KUBELET")
                .collect(),
            flags: Vec::new(),
        };
        let config = sources.load().unwrap().config;
        assert_eq!(container["ports"][0]["containerPort"], config.http.listen.port());
        assert!(
            config.http.listen.ip().is_unspecified(),
            "probes of the kubelet come from outside"
        );
        assert!(pod["terminationGracePeriodSeconds"].as_u64().unwrap() > config.shutdown.deadline_seconds);
        let mounts = container["volumeMounts"].as_array().unwrap();
        let is_mounted = |path: &Path, is_written: bool| {
            mounts.iter().any(|mount| {
                let here = path.starts_with(mount["mountPath"].as_str().unwrap());
                here && is_written == (mount["readOnly"] != true)
            })
        };
        assert!(is_mounted(&config.instance.lock_file, true));
        assert!(is_mounted(Path::new("/etc/wasmscope/config.toml"), false));
        if config.kubernetes.cri_socket != "off" {
            assert!(
                is_mounted(Path::new(&config.kubernetes.cri_socket), false),
                "{values:?}"
            );
        }
        if let Some(file) = &config.inventory.nfd_features_file {
            assert!(is_mounted(file, true), "{values:?}");
        }
        let limit = container["resources"]["limits"]["memory"].as_str().unwrap();
        let limit: usize = limit.trim_end_matches("Mi").parse().unwrap();
        assert!(
            budgets_mib(&config) + OWN_MIB < limit,
            "{values:?}: memory that the configuration allows, and what the agent takes besides"
        );
    }
}

/// What no key bounds, MiB: the program, its eBPF maps but the ring, series of metrics. An idle agent takes 35.
const OWN_MIB: usize = 100;

/// Memory that the configuration allows, MiB.
fn budgets_mib(config: &Config) -> usize {
    let capture = &config.capture;
    let bounded = capture.ring_mib + capture.names_mib + capture.open_traces_mib + config.recorder.memory_mib;
    bounded as usize + capture.queue_mib + config.traces.queue_mib
}

#[test]
fn the_page_of_the_chart_has_every_value() {
    const HEAD: &str = "# Wasmscope

An agent on every node that sees what WebAssembly guests do. [docs/install.md](../../../docs/install.md) tells how to install it, what it is allowed to do and why;
[docs/configuration.md](../../../docs/configuration.md) has every key of `config`.
";
    let Some(output) = chart(&["table", "deploy/helm/wasmscope/values.yaml"], &[]) else {
        return;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let table = String::from_utf8(output.stdout).unwrap();
    let example = fs::read_to_string(fixture("tuned.yaml")).unwrap();
    let page = format!(
        "{HEAD}\n## Example\n\n```yaml\n{example}```\n\n## Values\n\n| value | default | |\n|---|---|---|\n{table}"
    );
    assert_current(&root().join("deploy/helm/wasmscope/README.md"), &page);
}
