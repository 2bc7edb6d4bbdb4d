//! The section `[kubernetes]` of the configuration.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Who is asked which pod a process belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KubernetesConfig {
    /// Name of this node; by default from the environment variable `NODE_NAME`. Without it the API server is not asked.
    pub node_name: String,
    /// Socket of the container runtime: `auto` (the usual ones below `host_root`), `off`, or a path.
    pub cri_socket: String,
    /// The kubelet: `off`, `https://NODE:10250` or `http://NODE:10255` (the read-only port).
    pub kubelet: String,
    /// CA of the kubelet's serving certificate.
    pub kubelet_ca_file: PathBuf,
    /// Take any certificate from the kubelet; the account's token is then shown to whoever answers. `false` by default.
    pub kubelet_insecure_skip_verify: bool,
    /// Token of the service account, for the kubelet.
    pub token_file: PathBuf,
    /// The API server: `auto` (when in a pod with a service account and `node_name` is known), `on` (or fail), `off`.
    pub api_server: String,
    /// Where the host's root is mounted: `/`, or `/host` in a container.
    pub host_root: PathBuf,
    /// Longest time, milliseconds, that a trace waits for the names of its pod; 0 to 60,000, 5,000 by default.
    pub hold_ms: u64,
    /// Most traces that wait; 1 to 100,000, 1,000 by default.
    pub max_held: usize,
}

/// Where pods have their service account.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

impl Default for KubernetesConfig {
    fn default() -> Self {
        Self {
            node_name: std::env::var("NODE_NAME").unwrap_or_default(),
            cri_socket: "auto".to_owned(),
            kubelet: "off".to_owned(),
            kubelet_ca_file: PathBuf::from(ACCOUNT).join("ca.crt"),
            kubelet_insecure_skip_verify: false,
            token_file: PathBuf::from(ACCOUNT).join("token"),
            api_server: "auto".to_owned(),
            host_root: PathBuf::from("/"),
            hold_ms: 5_000,
            max_held: 1_000,
        }
    }
}

impl KubernetesConfig {
    /// Says what is wrong, in words for a person.
    pub fn validate(&self) -> Result<(), String> {
        if !matches!(self.cri_socket.as_str(), "auto" | "off") && !self.cri_socket.starts_with('/') {
            return Err(format!(
                "kubernetes.cri_socket is {:?}: must be auto, off or an absolute path",
                self.cri_socket
            ));
        }
        let is_url = self.kubelet.starts_with("https://") || self.kubelet.starts_with("http://");
        if self.kubelet != "off" && !is_url {
            return Err(format!(
                "kubernetes.kubelet is {:?}: must be off or an http(s) URL",
                self.kubelet
            ));
        }
        if !matches!(self.api_server.as_str(), "auto" | "on" | "off") {
            return Err(format!(
                "kubernetes.api_server is {:?}: must be auto, on or off",
                self.api_server
            ));
        }
        if self.api_server == "on" && self.node_name.is_empty() {
            return Err(
                "kubernetes.api_server is on, but kubernetes.node_name is empty: the API server is only asked \
                        for the pods of one node (set NODE_NAME)"
                    .to_owned(),
            );
        }
        if !self.host_root.is_absolute() {
            return Err(format!(
                "kubernetes.host_root is {}: must be absolute",
                self.host_root.display()
            ));
        }
        if self.hold_ms > 60_000 {
            return Err(format!("kubernetes.hold_ms is {}: must be at most 60000", self.hold_ms));
        }
        if !(1..=100_000).contains(&self.max_held) {
            return Err(format!(
                "kubernetes.max_held is {}: must be from 1 to 100000",
                self.max_held
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_work_is_refused_by_name() {
        type Change = fn(&mut KubernetesConfig);
        let cases: [(&str, Change); 6] = [
            ("cri_socket", |config| config.cri_socket = "containerd.sock".to_owned()),
            ("kubelet", |config| config.kubelet = "node:10250".to_owned()),
            ("api_server", |config| config.api_server = "yes".to_owned()),
            ("node_name", |config| {
                config.api_server = "on".to_owned();
                config.node_name.clear();
            }),
            ("hold_ms", |config| config.hold_ms = 60_001),
            ("max_held", |config| config.max_held = 0),
        ];
        assert_eq!(KubernetesConfig::default().validate(), Ok(()));
        for (name, change) in cases {
            let mut config = KubernetesConfig::default();
            change(&mut config);
            assert!(config.validate().unwrap_err().contains(name));
        }
    }

    #[test]
    fn an_unknown_key_is_an_error() {
        assert!(toml::from_str::<KubernetesConfig>("cri_sockett = 'auto'").is_err());
        let config: KubernetesConfig = toml::from_str("cri_socket = 'off'").unwrap();
        assert_eq!(config.cri_socket, "off");
    }
}
