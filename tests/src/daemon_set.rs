//! What the kubelet makes of a `DaemonSet`'s pod on one node: requests to the container runtime, from the manifest and the Dockerfile as they are.
//! A field that is not translated here fails the test: it would not be tested.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use k8s_cri::v1::security_profile::ProfileType;
use k8s_cri::v1::{
    Capability, ContainerConfig, ContainerMetadata, ImageSpec, Int64Value, KeyValue, LinuxContainerConfig,
    LinuxContainerResources, LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, Mount,
    MountPropagation, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata, SecurityProfile,
};
use serde_json::{Value, json};

use crate::environment;

/// What the kubelet masks unless a container asks for more: `pkg/securitycontext/util.go` of Kubernetes.
const MASKED: [&str; 9] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
];
const MASKED_FIRMWARE: &str = "/sys/firmware";
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
/// The kubelet makes shares of processor requests so.
const SHARES_PER_CPU: u64 = 1024;

/// The documents of a manifest.
#[derive(Clone, Debug)]
pub struct Manifest(Vec<Value>);

/// The node that it runs on: a folder for its root.
#[derive(Clone, Copy, Debug)]
pub struct Node<'a> {
    /// Its root: paths of the host are below.
    pub root: &'a Path,
    /// Its name.
    pub name: &'a str,
}

impl Manifest {
    /// Reads `deploy/manifests/wasmscope.yaml`.
    pub fn read(python: &Path) -> Self {
        let output = Command::new(python)
            .arg(environment::tests_directory().join("python/chart.py"))
            .arg("json")
            .arg(root().join("deploy/manifests/wasmscope.yaml"))
            .output()
            .expect("Python can be run");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self(serde_json::from_slice(&output.stdout).expect("it is JSON"))
    }

    fn of_kind(&self, kind: &str, name: Option<&str>) -> &Value {
        let is_it = |document: &&Value| {
            document["kind"] == kind && name.is_none_or(|name| document["metadata"]["name"] == name)
        };
        self.0
            .iter()
            .find(is_it)
            .unwrap_or_else(|| panic!("no {kind} {name:?}"))
    }

    /// The agent's container.
    pub fn container(&self) -> &Value {
        let containers = &self.pod()["containers"];
        assert_eq!(containers.as_array().map(Vec::len), Some(1));
        &containers[0]
    }

    fn pod(&self) -> &Value {
        &self.of_kind("DaemonSet", None)["spec"]["template"]["spec"]
    }

    /// Path and port of `livenessProbe` or `readinessProbe`.
    pub fn probe(&self, kind: &str) -> (String, u64) {
        let get = &self.container()[kind]["httpGet"];
        let ports = self.container()["ports"].as_array().expect("it has ports");
        let port = ports.iter().find(|port| port["name"] == get["port"]);
        (
            text(&get["path"]),
            port.expect("the port has this name")["containerPort"]
                .as_u64()
                .expect("it is a number"),
        )
    }

    /// What the runtime is asked for. `configuration` is appended to the configuration file of the manifest.
    pub fn on(&self, node: Node<'_>, configuration: &str) -> (PodSandboxConfig, ContainerConfig) {
        const UID: &str = "7d5c3f4e-1a02-4c9d-8e8f-3a4b5c6d7e8f";
        let pod = self.pod();
        let container = self.container();
        let context = &container["securityContext"];
        known_keys(
            context,
            &[
                "runAsUser",
                "runAsGroup",
                "runAsNonRoot",
                "privileged",
                "allowPrivilegeEscalation",
                "readOnlyRootFilesystem",
                "capabilities",
            ],
        );
        known_keys(&pod["securityContext"], &["seccompProfile", "appArmorProfile"]);
        assert!(pod["initContainers"].is_null() && pod["hostNetwork"].is_null() && pod["hostIPC"].is_null());
        assert_eq!(context["privileged"], false);
        let namespaces = NamespaceOption {
            network: NamespaceMode::Pod.into(),
            pid: if pod["hostPID"] == true {
                NamespaceMode::Node.into()
            } else {
                NamespaceMode::Container.into()
            },
            ..NamespaceOption::default()
        };
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        let seccomp = profile(ProfileType::RuntimeDefault);
        assert_eq!(pod["securityContext"]["appArmorProfile"]["type"], "Unconfined");
        let unconfined = profile(ProfileType::Unconfined);
        let number = |value: &Value| value.as_i64().map(|value| Int64Value { value });
        let names = |value: &Value| -> Vec<String> { value.as_array().into_iter().flatten().map(text).collect() };
        let namespace = text(&self.of_kind("DaemonSet", None)["metadata"]["namespace"]);
        let sandbox = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: "wasmscope-x7k2p".to_owned(),
                uid: UID.to_owned(),
                namespace: namespace.clone(),
                attempt: 0,
            }),
            hostname: "wasmscope-x7k2p".to_owned(),
            log_directory: node.root.join("var/log/pods").display().to_string(),
            labels: HashMap::from(
                [
                    ("io.kubernetes.pod.name", "wasmscope-x7k2p"),
                    ("io.kubernetes.pod.namespace", &namespace),
                    ("io.kubernetes.pod.uid", UID),
                ]
                .map(|(key, value)| (key.to_owned(), value.to_owned())),
            ),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: format!("/kubepods/burstable/pod{UID}"),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces.clone()),
                    seccomp: Some(seccomp.clone()),
                    apparmor: Some(unconfined.clone()),
                    ..LinuxSandboxSecurityContext::default()
                }),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        };
        fs::create_dir_all(&sandbox.log_directory).expect("the folder can be written");
        let container = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: text(&container["name"]),
                attempt: 0,
            }),
            image: Some(ImageSpec {
                image: self.image(),
                ..ImageSpec::default()
            }),
            command: names(&container["command"]),
            args: names(&container["args"]),
            envs: variables(&container["env"], node),
            mounts: self.mounts(node, configuration),
            log_path: "agent.log".to_owned(),
            linux: Some(LinuxContainerConfig {
                resources: Some(resources(&container["resources"])),
                security_context: Some(LinuxContainerSecurityContext {
                    capabilities: Some(Capability {
                        add_capabilities: names(&context["capabilities"]["add"]),
                        drop_capabilities: names(&context["capabilities"]["drop"]),
                        ..Capability::default()
                    }),
                    namespace_options: Some(namespaces),
                    run_as_user: number(&context["runAsUser"]),
                    run_as_group: number(&context["runAsGroup"]),
                    readonly_rootfs: context["readOnlyRootFilesystem"] == true,
                    no_new_privs: context["allowPrivilegeEscalation"] == false,
                    masked_paths: MASKED.into_iter().chain([MASKED_FIRMWARE]).map(str::to_owned).collect(),
                    readonly_paths: READ_ONLY.map(str::to_owned).to_vec(),
                    seccomp: Some(seccomp),
                    apparmor: Some(unconfined),
                    ..LinuxContainerSecurityContext::default()
                }),
            }),
            ..ContainerConfig::default()
        };
        (sandbox, container)
    }

    /// The image's name, as the runtime has it.
    pub fn image(&self) -> String {
        // Docker's rule for names without a registry.
        format!("docker.io/library/{}", text(&self.container()["image"]))
    }

    /// As the kubelet lays volumes out; paths of the host are those below the node's root.
    fn mounts(&self, node: Node<'_>, configuration: &str) -> Vec<Mount> {
        let mut sources: BTreeMap<String, PathBuf> = BTreeMap::new();
        for volume in self.pod()["volumes"].as_array().expect("it has volumes") {
            let name = text(&volume["name"]);
            let source = if volume["configMap"].is_object() {
                let source = node.root.join("var/lib/kubelet/volumes").join(&name);
                fs::create_dir_all(&source).expect("the folder can be written");
                let map = self.of_kind("ConfigMap", volume["configMap"]["name"].as_str());
                for (file, content) in map["data"].as_object().expect("it has data") {
                    let content = format!("{}{configuration}", content.as_str().unwrap_or_default());
                    fs::write(source.join(file), content).expect("the folder can be written");
                }
                source
            } else {
                let host = &volume["hostPath"];
                let path = text(&host["path"]);
                let source = node
                    .root
                    .join(path.strip_prefix('/').expect("paths of hosts are absolute"));
                match host["type"].as_str() {
                    Some("DirectoryOrCreate") => fs::create_dir_all(&source).expect("the folder can be written"),
                    Some("Directory") => assert!(source.is_dir(), "the node has no {path}"),
                    other => panic!("volume {name}: hostPath of type {other:?}"),
                }
                source
            };
            sources.insert(name, source);
        }
        let mounts = self.container()["volumeMounts"].as_array().expect("it has mounts");
        mounts
            .iter()
            .map(|mount| {
                known_keys(mount, &["name", "mountPath", "readOnly", "mountPropagation"]);
                let propagation = match mount["mountPropagation"].as_str() {
                    None => MountPropagation::PropagationPrivate,
                    Some("HostToContainer") => MountPropagation::PropagationHostToContainer,
                    Some(other) => panic!("mountPropagation {other} is not translated"),
                };
                Mount {
                    container_path: text(&mount["mountPath"]),
                    host_path: sources[&text(&mount["name"])].display().to_string(),
                    readonly: mount["readOnly"] == true,
                    propagation: propagation.into(),
                    ..Mount::default()
                }
            })
            .collect()
    }
}

/// Files (path, bytes, mode) and settings of the image that `deploy/Dockerfile` builds, with the agent under test and, for what the base image
/// brings, the libraries that it is linked to.
pub fn image() -> (Value, Vec<(String, Vec<u8>, u32)>) {
    let dockerfile = fs::read_to_string(root().join("deploy/Dockerfile")).expect("it is there");
    let last_stage = dockerfile.rsplit("\nFROM ").next().expect("it has a stage");
    let setting = |word: &str| {
        let line = last_stage.lines().find_map(|line| line.strip_prefix(word));
        line.unwrap_or_else(|| panic!("the image has no {word}"))
            .trim()
            .to_owned()
    };
    let list = |word: &str| -> Value { serde_json::from_str(&setting(word)).expect("it is in the exec form") };
    let copied = setting("COPY --from=build");
    let (_, program) = copied.split_once(' ').expect("from here to there");
    let settings = json!({"User": setting("USER"), "Entrypoint": list("ENTRYPOINT"), "Cmd": list("CMD")});
    let directory = tempfile_directory();
    let stripped = directory.join("wasmscope");
    // Symbols of the agent are not what is tested, and they are most of it.
    crate::workload::stripped(environment::agent(), &stripped);
    let mut files = vec![(in_image(program), fs::read(&stripped).expect("it was written"), 0o755)];
    fs::remove_dir_all(directory).expect("it can be removed");
    let output = Command::new("ldd")
        .arg(environment::agent())
        .output()
        .expect("ldd can be run");
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`, and the loader without an arrow.
        let path = line.split_whitespace().find(|word| word.starts_with('/'));
        if let Some(path) = path {
            files.push((in_image(path), fs::read(path).expect("it is loaded from there"), 0o755));
        }
    }
    (settings, files)
}

fn tempfile_directory() -> PathBuf {
    let directory = environment::target_directory().join(format!("node-image-{}", std::process::id()));
    fs::create_dir_all(&directory).expect("the folder can be written");
    directory
}

fn in_image(path: &str) -> String {
    path.strip_prefix('/').expect("it is absolute").to_owned()
}

fn root() -> PathBuf {
    environment::tests_directory().join("..")
}

fn text(value: &Value) -> String {
    value
        .as_str()
        .unwrap_or_else(|| panic!("not a text: {value}"))
        .to_owned()
}

#[track_caller]
fn known_keys(value: &Value, known: &[&str]) {
    for key in value.as_object().into_iter().flat_map(|object| object.keys()) {
        assert!(known.contains(&key.as_str()), "{key} is not translated");
    }
}

fn profile(kind: ProfileType) -> SecurityProfile {
    SecurityProfile {
        profile_type: kind.into(),
        ..SecurityProfile::default()
    }
}

fn variables(list: &Value, node: Node<'_>) -> Vec<KeyValue> {
    let value = |variable: &Value| match variable["valueFrom"]["fieldRef"]["fieldPath"].as_str() {
        None => text(&variable["value"]),
        Some("spec.nodeName") => node.name.to_owned(),
        Some(other) => panic!("{other} is not translated"),
    };
    let list = list.as_array().into_iter().flatten();
    list.map(|variable| KeyValue {
        key: text(&variable["name"]),
        value: value(variable),
    })
    .collect()
}

fn resources(resources: &Value) -> LinuxContainerResources {
    known_keys(&resources["limits"], &["memory"]);
    let memory = text(&resources["limits"]["memory"]);
    let mebibytes: i64 = memory
        .strip_suffix("Mi")
        .and_then(|number| number.parse().ok())
        .expect("it is in Mi");
    let cpu = text(&resources["requests"]["cpu"]);
    let milli: u64 = cpu
        .strip_suffix('m')
        .and_then(|number| number.parse().ok())
        .expect("it is in thousandths");
    LinuxContainerResources {
        memory_limit_in_bytes: mebibytes << 20,
        cpu_shares: i64::try_from(milli * SHARES_PER_CPU / 1000).expect("it is small"),
        ..LinuxContainerResources::default()
    }
}
