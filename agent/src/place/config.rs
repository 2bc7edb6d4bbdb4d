//! The section `[kubernetes]` of the configuration.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Who is asked which pod a process belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KubernetesConfig {
    /// Name of this node. Without it the API server is not asked. Default: none.
    pub node_name: String,
    /// Socket of the container runtime: `auto` (the usual ones below `host_root`), `off`, or a path. Default: auto.
    pub cri_socket: String,
    /// The kubelet: `off`, `auto` (port 10250 of the address in the environment variable `HOST_IP`), `https://NODE:10250` or `http://NODE:10255` (the
    /// read-only port). An IPv6 address is in brackets. Default: off.
    pub kubelet: String,
    /// CA of the kubelet's serving certificate.
    pub kubelet_ca_file: PathBuf,
    /// Take any certificate from the kubelet; the account's token is then shown to whoever answers. Default: false.
    pub kubelet_insecure_skip_verify: bool,
    /// Token of the service account, for the kubelet.
    pub token_file: PathBuf,
    /// The API server: `auto` (when in a pod with a service account and `node_name` is known), `on` (or fail), `off`. Default: auto.
    pub api_server: String,
    /// Where the host's root is mounted: `/`, or where a container has it. Default: /.
    pub host_root: PathBuf,
    /// Longest time, milliseconds, that a trace waits for the names of its pod; 0 to 60,000. Default: 5,000.
    pub hold_ms: u64,
    /// Most traces that wait; 1 to 100,000. Default: 1,000.
    pub max_held: usize,
}

/// Where pods have their service account.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// The kubelet's authenticated port.
const KUBELET_PORT: u16 = 10_250;

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
    /// Base URL of the kubelet; `None` if it is not asked.
    pub fn kubelet_url(&self) -> Result<Option<String>, String> {
        self.kubelet_url_on(std::env::var("HOST_IP").ok().as_deref())
    }

    fn kubelet_url_on(&self, host_ip: Option<&str>) -> Result<Option<String>, String> {
        match self.kubelet.as_str() {
            "off" => Ok(None),
            "auto" => match host_ip.map(str::parse::<IpAddr>) {
                Some(Ok(address)) => Ok(Some(format!("https://{}", SocketAddr::new(address, KUBELET_PORT)))),
                _ => Err("kubernetes.kubelet is auto, but HOST_IP is not the address of this node".to_owned()),
            },
            url => check_url(url).map(|()| Some(url.to_owned())),
        }
    }

    /// Says what is wrong, in words for a person.
    pub fn validate(&self) -> Result<(), String> {
        if !matches!(self.cri_socket.as_str(), "auto" | "off") && !self.cri_socket.starts_with('/') {
            return Err(format!(
                "kubernetes.cri_socket is {:?}: must be auto, off or an absolute path",
                self.cri_socket
            ));
        }
        self.kubelet_url()?;
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
        if self.api_server == "on" {
            super::api::check_node_name(&self.node_name).map_err(|error| format!("kubernetes.node_name: {error}"))?;
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

/// That it is the URL of a server and nothing more; it is not repeated, for it could have a password.
fn check_url(url: &str) -> Result<(), String> {
    let wrong = |reason: &str| {
        Err(format!(
            "kubernetes.kubelet must be off, auto, or a URL such as https://10.0.0.7:10250 or https://[fd00::7]:10250: {reason}"
        ))
    };
    let uri: http::Uri = match url.parse() {
        Ok(uri) => uri,
        Err(_) => return wrong("this is no URL"),
    };
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return wrong("it must begin with http:// or https://");
    }
    let Some(authority) = uri.authority().filter(|authority| !authority.host().is_empty()) else {
        return wrong("it has no host");
    };
    if authority.as_str().contains('@') {
        return wrong("it has a user");
    }
    if let Some(inner) = authority.host().strip_prefix('[')
        && inner
            .strip_suffix(']')
            .is_none_or(|address| address.parse::<Ipv6Addr>().is_err())
    {
        return wrong("what is in brackets is no IPv6 address");
    }
    let has_port = authority.as_str().len() > authority.host().len();
    if has_port && authority.port_u16().is_none_or(|port| port == 0) {
        return wrong("its port is none");
    }
    if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
        return wrong("it has more than a host and a port");
    }
    Ok(())
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
    fn only_the_url_of_a_server_is_one_of_a_kubelet() {
        for url in [
            "https://10.0.0.7:10250",
            "https://[::1]:10250",
            "https://[fd00::7]",
            "http://node-7.example:10255",
            "http://node/",
        ] {
            assert_eq!(check_url(url), Ok(()), "{url}");
        }
        for url in [
            "",
            "https://",
            "https://:10250",
            "https://fd00::7:10250",
            "https://[fd00::7:10250",
            "https://[10.0.0.7]:10250",
            "https://node:99999",
            "https://node:",
            "https://node:0",
            "https://no de:10250",
            "https://node:10250/pods",
            "https://node:10250?a",
            "https://admin:s3cret@node:10250",
            "ftp://node",
            "on",
        ] {
            let error = check_url(url).expect_err(url);
            assert!(
                error.starts_with("kubernetes.kubelet ") && !error.contains("s3cret"),
                "{error}"
            );
        }
    }

    #[test]
    fn auto_is_the_nodes_own_address_with_brackets_where_they_belong() {
        let config = KubernetesConfig {
            kubelet: "auto".to_owned(),
            ..KubernetesConfig::default()
        };
        for (address, url) in [
            ("10.0.0.7", "https://10.0.0.7:10250"),
            ("fd00::7", "https://[fd00::7]:10250"),
        ] {
            let found = config.kubelet_url_on(Some(address)).unwrap().unwrap();
            assert_eq!(found, url);
            assert_eq!(check_url(&found), Ok(()));
        }
        for address in [None, Some(""), Some("node")] {
            assert!(config.kubelet_url_on(address).is_err());
        }
    }

    #[test]
    fn an_unknown_key_is_an_error() {
        assert!(toml::from_str::<KubernetesConfig>("cri_sockett = 'auto'").is_err());
        let config: KubernetesConfig = toml::from_str("cri_socket = 'off'").unwrap();
        assert_eq!(config.cri_socket, "off");
    }
}
