//! A containerd of the test's own, with its CRI: pods as the kubelet makes them, without a kubelet. Everything is in one folder and gone afterwards.

use std::collections::HashMap;
use std::fs;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, ContainerStatusRequest, CreateContainerRequest, ImageSpec,
    LinuxContainerConfig, LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, Mount,
    NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PodSandboxStatusRequest,
    RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest, StopPodSandboxRequest, VersionRequest,
};
use sha2::{Digest as _, Sha256};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::environment::left_out;
use crate::running::{DEADLINE, Running};

const IMAGE: &str = "localhost/busybox:1";
/// As on a node, below the folder of the test.
const SOCKET: &str = "run/containerd/containerd.sock";
const BUSYBOX: &str = "/bin/busybox";

/// A running containerd; its pods end with it.
#[derive(Debug)]
pub struct Containerd {
    directory: PathBuf,
    client: RuntimeServiceClient<Channel>,
    runtime: tokio::runtime::Runtime,
    sandboxes: Vec<(String, String)>,
    daemon: Running,
}

/// What network pods have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// The test's own.
    Host,
    /// One of the containerd's own, in which each pod has an address.
    Pods,
}

/// A shim that containerd is to have beside runc's.
#[derive(Clone, Copy, Debug)]
pub struct Shim<'a> {
    /// Its binary, called `containerd-shim-NAME-v1`.
    pub binary: &'a Path,
    /// Name of the runtime class, and of the shim.
    pub name: &'a str,
    /// What shims find in their environment.
    pub variables: &'a [(&'a str, &'a str)],
}

const CNI_PLUGINS: &str = "/usr/lib/cni";

/// What a pod is to be.
#[derive(Clone, Copy, Debug)]
pub struct Pod<'a> {
    /// UID, with dashes.
    pub uid: &'a str,
    /// Namespace.
    pub namespace: &'a str,
    /// Name.
    pub name: &'a str,
    /// Labels.
    pub labels: &'a [(&'a str, &'a str)],
    /// Name of its container.
    pub container: &'a str,
}

/// A container that runs.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its main process, in the test's pid namespace.
    pub pid: u32,
    /// Of its pod; empty on the host's network.
    pub address: String,
    log: PathBuf,
}

impl Containerd {
    /// `None`, after saying so, where it is not installed.
    pub fn start(directory: &Path) -> Option<Self> {
        Self::start_on(directory, Network::Host)
    }

    /// As [`Self::start`], with a network.
    pub fn start_on(directory: &Path, network: Network) -> Option<Self> {
        Self::start_as(directory, network, None)
    }

    /// As [`Self::start`], with a shim: a runtime class of its name, for [`Self::run_in_class`].
    pub fn start_with_shim(directory: &Path, shim: Shim<'_>) -> Option<Self> {
        Self::start_as(directory, Network::Host, Some(shim))
    }

    fn start_as(directory: &Path, network: Network, shim: Option<Shim<'_>>) -> Option<Self> {
        for program in ["containerd", "runc", "ctr"] {
            if Command::new(program).arg("--version").output().is_err() {
                left_out(&format!("{program} is not installed (cargo xtask setup --tests)"));
                return None;
            }
        }
        if !Path::new(BUSYBOX).is_file() || !Path::new("/usr/share/doc/busybox-static").exists() {
            left_out("busybox-static is not installed (cargo xtask setup --tests)");
            return None;
        }
        if network == Network::Pods && !Path::new(CNI_PLUGINS).join("ptp").is_file() {
            left_out("containernetworking-plugins is not installed (cargo xtask setup --tests)");
            return None;
        }
        let directory = directory.to_owned();
        let config = directory.join("containerd.toml");
        let shown = directory.display();
        let mut text = format!(
            r#"version = 2
root = "{shown}/root"
state = "{shown}/state"
[grpc]
  address = "{shown}/{SOCKET}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{shown}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{IMAGE}"
  restrict_oom_score_adj = true
  disable_tcp_service = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI_PLUGINS}"
    conf_dir = "{shown}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
"#
        );
        if let Some(Shim { name, .. }) = shim {
            let runtime = format!(
                r#"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{name}]
      runtime_type = "io.containerd.{name}.v1"
"#
            );
            text.push_str(&runtime);
        }
        fs::write(&config, text).expect("the folder can be written");
        let mut command = if network == Network::Pods {
            fs::create_dir_all(directory.join("cni")).expect("the folder can be written");
            let network = serde_json::json!({"cniVersion": "0.4.0", "name": "node", "plugins": [{
                "type": "ptp",
                "ipam": {"type": "host-local", "dataDir": directory.join("ipam"), "ranges": [[{"subnet": "10.244.77.0/24"}]]},
            }]});
            fs::write(directory.join("cni/node.conflist"), network.to_string()).expect("the folder can be written");
            // Routes, addresses and forwarding are none of the machine's business, and what is mounted is shared as systemd has it.
            let mut command = Command::new("unshare");
            command.args(["--net", "--mount", "--propagation", "shared", BUSYBOX, "sh", "-c"]);
            command.args(["/bin/busybox ip link set lo up && exec containerd \"$@\"", "containerd"]);
            command
        } else {
            Command::new("containerd")
        };
        command.arg("--config").arg(&config).args(["--log-level", "warn"]);
        if let Some(shim) = shim {
            let folder = shim.binary.parent().expect("it is in a folder");
            let inherited = std::env::var_os("PATH").unwrap_or_default();
            let folders = std::iter::once(folder.to_owned()).chain(std::env::split_paths(&inherited));
            command.env("PATH", std::env::join_paths(folders).expect("it has no colon"));
            command.envs(shim.variables.iter().copied());
        }
        let daemon = Running::start(command);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime can be made");
        let socket = directory.join(SOCKET);
        let channel = runtime.block_on(async {
            Endpoint::from_static("http://cri.invalid").connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
                let socket = socket.clone();
                async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
            }))
        });
        let started = Self {
            client: RuntimeServiceClient::new(channel),
            directory,
            runtime,
            sandboxes: Vec::new(),
            daemon,
        };
        started.until("containerd answers", || {
            let mut client = started.client.clone();
            started
                .runtime
                .block_on(client.version(VersionRequest::default()))
                .is_ok()
        });
        let busybox = fs::read(BUSYBOX).expect("busybox is there");
        let settings = serde_json::json!({"Entrypoint": [BUSYBOX, "sleep", "3600"]});
        started.import(IMAGE, &settings, &[("bin/busybox", &busybox, 0o755)]);
        Some(started)
    }

    /// Runs `work` on a thread in the network of a containerd with [`Network::Pods`].
    pub fn on_its_network<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let network = fs::File::open(format!("/proc/{}/ns/net", self.daemon.pid())).expect("it runs");
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                let kind = Some(rustix::thread::LinkNameSpaceType::Network);
                rustix::thread::move_into_link_name_space(network.as_fd(), kind).expect("root may enter networks");
                work()
            });
            thread.join().expect("the work is done")
        })
    }

    /// Where it is asked.
    pub fn socket(&self) -> String {
        self.directory.join(SOCKET).display().to_string()
    }

    /// Makes a pod and its container, which runs `script` by a shell with `mounts` (host's path, container's path).
    pub fn run(&mut self, pod: Pod<'_>, script: &str, mounts: &[(&Path, &str)]) -> Container {
        let (sandbox, container) = self.described(pod, script, mounts);
        self.run_as(sandbox, container)
    }

    /// What [`Self::run`] asks for.
    pub fn described(
        &self,
        pod: Pod<'_>,
        script: &str,
        mounts: &[(&Path, &str)],
    ) -> (PodSandboxConfig, ContainerConfig) {
        let labels = |more: &[(&str, &str)]| -> HashMap<String, String> {
            let all = pod.labels.iter().chain(more);
            all.map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect()
        };
        let of_kubelet = [
            ("io.kubernetes.pod.name", pod.name),
            ("io.kubernetes.pod.namespace", pod.namespace),
            ("io.kubernetes.pod.uid", pod.uid),
        ];
        let logs = self.directory.join(pod.uid);
        fs::create_dir_all(&logs).expect("the folder can be written");
        // On the host's network: no bridge, no address, nothing to clean up.
        let namespaces = NamespaceOption {
            network: NamespaceMode::Node.into(),
            ..NamespaceOption::default()
        };
        let sandbox_config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: pod.name.to_owned(),
                uid: pod.uid.to_owned(),
                namespace: pod.namespace.to_owned(),
                attempt: 0,
            }),
            log_directory: logs.display().to_string(),
            labels: labels(&of_kubelet),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: format!("/kubepods/besteffort/pod{}", pod.uid),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces.clone()),
                    ..LinuxSandboxSecurityContext::default()
                }),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        };
        let container_config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: pod.container.to_owned(),
                attempt: 0,
            }),
            image: Some(ImageSpec {
                image: IMAGE.to_owned(),
                ..ImageSpec::default()
            }),
            command: [BUSYBOX, "sh", "-c", script].map(str::to_owned).to_vec(),
            mounts: mounts
                .iter()
                .map(|(host, container)| Mount {
                    container_path: (*container).to_owned(),
                    host_path: host.display().to_string(),
                    ..Mount::default()
                })
                .collect(),
            log_path: "log".to_owned(),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: Some(namespaces),
                    ..LinuxContainerSecurityContext::default()
                }),
                ..LinuxContainerConfig::default()
            }),
            ..ContainerConfig::default()
        };
        (sandbox_config, container_config)
    }

    /// Makes a pod with one container.
    pub fn run_as(&mut self, sandbox_config: PodSandboxConfig, container_config: ContainerConfig) -> Container {
        self.run_in_class(sandbox_config, container_config, "")
    }

    /// As [`Self::run_as`], in a runtime class.
    pub fn run_in_class(
        &mut self,
        sandbox_config: PodSandboxConfig,
        container_config: ContainerConfig,
        class: &str,
    ) -> Container {
        let uid = sandbox_config.metadata.as_ref().expect("pods have names").uid.clone();
        let log = Path::new(&sandbox_config.log_directory).join(&container_config.log_path);
        let mut client = self.client.clone();
        let made = &mut self.sandboxes;
        let (id, pid, address) = self.runtime.block_on(async {
            let request = RunPodSandboxRequest {
                config: Some(sandbox_config.clone()),
                runtime_handler: class.to_owned(),
            };
            let answer = client.run_pod_sandbox(request).await.expect("the sandbox runs");
            let sandbox = answer.into_inner().pod_sandbox_id;
            made.push((sandbox.clone(), uid));
            let request = PodSandboxStatusRequest {
                pod_sandbox_id: sandbox.clone(),
                verbose: false,
            };
            let answer = client.pod_sandbox_status(request).await.expect("it has a status");
            let network = answer.into_inner().status.and_then(|status| status.network);
            let address = network.map(|network| network.ip).unwrap_or_default();
            let request = CreateContainerRequest {
                pod_sandbox_id: sandbox,
                config: Some(container_config),
                sandbox_config: Some(sandbox_config),
            };
            let answer = client.create_container(request).await.expect("the container is made");
            let container_id = answer.into_inner().container_id;
            let request = StartContainerRequest {
                container_id: container_id.clone(),
            };
            client.start_container(request).await.expect("the container starts");
            let request = ContainerStatusRequest {
                container_id: container_id.clone(),
                verbose: true,
            };
            let status = client
                .container_status(request)
                .await
                .expect("it has a status")
                .into_inner();
            let info: serde_json::Value = serde_json::from_str(&status.info["info"]).expect("it is JSON");
            let pid = info["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
            (container_id, pid.expect("it has a process"), address)
        });
        Container { id, pid, address, log }
    }

    /// Waits for a line that a container prints.
    pub fn line(&self, container: &Container, mut wanted: impl FnMut(&str) -> bool) -> String {
        let mut found = None;
        self.until("the line that was waited for", || {
            found = container.lines().into_iter().find(|line| wanted(line));
            found.is_some()
        });
        found.expect("it was found")
    }

    /// Waits for a text that a container writes to its outputs, or that CRI writes around it.
    pub fn logged(&self, container: &Container, wanted: &str) {
        self.until(wanted, || {
            fs::read_to_string(&container.log).is_ok_and(|log| log.contains(wanted))
        });
    }

    fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !holds() {
            assert!(
                begun.elapsed() < *DEADLINE,
                "never: {what} (in {})",
                self.directory.display()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Makes an image of one layer with `files` (path, bytes, mode) and the `settings` of a Dockerfile.
    pub fn import(&self, name: &str, settings: &serde_json::Value, files: &[(&str, &[u8], u32)]) {
        let described = |kind: &str, bytes: &[u8]| {
            serde_json::json!({
                "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest(bytes), "size": bytes.len(),
            })
        };
        let layer = tar(files);
        let layer_described = described("layer.v1.tar", &layer);
        let config = serde_json::json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }, "os": "linux",
            "config": settings,
            "rootfs": {"type": "layers", "diff_ids": [layer_described["digest"]]},
        })
        .to_string();
        let config_described = described("config.v1+json", config.as_bytes());
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config_described, "layers": [layer_described],
        })
        .to_string();
        let mut entry = described("manifest.v1+json", manifest.as_bytes());
        entry["annotations"] = serde_json::json!({"io.containerd.image.name": name});
        let blob = |described: &serde_json::Value| {
            let digest = described["digest"].as_str().expect("it is a text");
            format!("blobs/{}", digest.replace(':', "/"))
        };
        let blobs = [&entry, &config_described, &layer_described].map(blob);
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [entry]}).to_string();
        let image = tar(&[
            ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#, 0o644),
            ("index.json", index.as_bytes(), 0o644),
            (&blobs[0], manifest.as_bytes(), 0o644),
            (&blobs[1], config.as_bytes(), 0o644),
            (&blobs[2], &layer, 0o644),
        ]);
        let path = self.directory.join("image.tar");
        fs::write(&path, image).expect("the folder can be written");
        let mut ctr = Command::new("ctr");
        ctr.args(["--address", &self.socket(), "--namespace", "k8s.io", "images", "import"]);
        ctr.args(["--snapshotter", "native"]).arg(&path);
        let output = ctr.output().expect("ctr can be run");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

impl Container {
    /// What it has printed, without what CRI writes before each line.
    pub fn lines(&self) -> Vec<String> {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        // `TIME stdout F TEXT`; long lines come in parts, marked P.
        let mut lines = Vec::new();
        let mut part = String::new();
        for line in log.lines() {
            let mut fields = line.splitn(4, ' ').skip(1);
            if let (Some("stdout"), Some(tag), Some(text)) = (fields.next(), fields.next(), fields.next()) {
                part.push_str(text);
                if tag == "F" {
                    lines.push(std::mem::take(&mut part));
                }
            }
        }
        lines
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let mut client = self.client.clone();
        for (sandbox, uid) in std::mem::take(&mut self.sandboxes) {
            let pod_sandbox_id = sandbox.clone();
            let _ = self
                .runtime
                .block_on(client.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id }));
            let request = RemovePodSandboxRequest {
                pod_sandbox_id: sandbox,
            };
            let _ = self.runtime.block_on(client.remove_pod_sandbox(request));
            // Without a kubelet, nobody else removes them. Those that others use are not empty and stay.
            for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
                for folder in [
                    format!("kubepods/besteffort/pod{uid}"),
                    format!("kubepods/burstable/pod{uid}"),
                    "kubepods/besteffort".to_owned(),
                    "kubepods/burstable".to_owned(),
                    "kubepods".to_owned(),
                ] {
                    let _ = fs::remove_dir(hierarchy.path().join(&folder));
                    let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(folder));
                }
            }
        }
    }
}

fn digest(bytes: &[u8]) -> String {
    let hex: Vec<String> = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{}", hex.concat())
}

/// A POSIX archive of files.
fn tar(files: &[(&str, &[u8], u32)]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, bytes, mode) in files {
        let mut header = [0_u8; 512];
        let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
        put(0, name);
        put(100, &format!("{mode:07o}"));
        put(108, "0000000");
        put(116, "0000000");
        put(124, &format!("{:011o}", bytes.len()));
        put(136, "00000000000");
        put(148, "        ");
        put(156, "0");
        put(257, "ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        archive.write_all(&header).expect("a vector takes all");
        archive.extend_from_slice(bytes);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}
