//! What is configured of OTLP: sections `[traces]` and `[otlp_metrics]`, with the standard variables over them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::otlp::Protocol;
use super::otlp_transport::{self, TransportError};
use crate::sampling::SamplingConfig;

/// How bodies are packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CompressionConfig {
    /// Not at all.
    #[default]
    None,
    /// gzip.
    Gzip,
}

/// What proves who is who. All empty: the certificates that the system trusts, and no certificate of our own. A file that changes is read again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsConfig {
    /// PEM file of the authorities that may have signed the collector's certificate, instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// PEM file of the agent's own certificate chain, with `key_file`.
    pub cert_file: Option<PathBuf>,
    /// PEM file of its private key.
    pub key_file: Option<PathBuf>,
}

/// Where and how to send a signal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TargetConfig {
    /// Base URL of the collector, `http://` or `https://`; HTTP adds the signal's path. Nothing is sent without. Default: none.
    pub endpoint: Option<String>,
    /// The endpoint is the whole URL for HTTP, path and all, as in `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`. Default: false.
    pub endpoint_is_complete: bool,
    /// How bodies travel. Default: http/protobuf.
    pub protocol: Protocol,
    /// Sent with each request; for gRPC as metadata. Default: none.
    pub headers: BTreeMap<String, String>,
    /// How bodies are packed. Default: none.
    pub compression: CompressionConfig,
    /// For a request with all its retries, milliseconds, 1 to 600,000. Default: 10,000.
    pub timeout_ms: u64,
    /// For `https://`.
    pub tls: TlsConfig,
}

impl Default for TargetConfig {
    fn default() -> Self {
        Self {
            endpoint: None,
            endpoint_is_complete: false,
            protocol: Protocol::HttpProtobuf,
            headers: BTreeMap::new(),
            compression: CompressionConfig::None,
            timeout_ms: 10_000,
            tls: TlsConfig::default(),
        }
    }
}

/// Section `[traces]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TracesConfig {
    /// Where to.
    pub target: TargetConfig,
    /// Traces that may wait, 1 to 1,000,000. Default: 1,024.
    pub queue_traces: usize,
    /// Estimated memory of the traces that wait or are under way, MiB, 1 to 4,096. Default: 64.
    pub queue_mib: usize,
    /// Which of them.
    pub sampling: SamplingConfig,
}

impl Default for TracesConfig {
    fn default() -> Self {
        Self {
            target: TargetConfig::default(),
            queue_traces: 1_024,
            queue_mib: 64,
            sampling: SamplingConfig::default(),
        }
    }
}

/// Section `[otlp_metrics]`: the agent's metrics, to a collector.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OtlpMetricsConfig {
    /// Where to.
    pub target: TargetConfig,
    /// Between two readings, seconds, 1 to 3,600. Default: 30.
    pub interval_seconds: u64,
}

impl Default for OtlpMetricsConfig {
    fn default() -> Self {
        Self {
            target: TargetConfig::default(),
            interval_seconds: 30,
        }
    }
}

impl OtlpMetricsConfig {
    /// Says what is out of range.
    pub fn validate(&self) -> Result<(), String> {
        self.target.validate("otlp_metrics")?;
        if !(1..=3_600).contains(&self.interval_seconds) {
            return Err(format!(
                "otlp_metrics.interval_seconds must be between 1 and 3600, not {}",
                self.interval_seconds
            ));
        }
        Ok(())
    }
}

impl TargetConfig {
    /// Takes what the standard variables of a signal (`TRACES`, `METRICS`) say, the signal's own before the common ones. Empty ones are not set.
    pub fn from_environment(&mut self, signal: &str, env: impl Fn(&str) -> Option<String>) -> Result<(), String> {
        let own = |what: &str| {
            let name = format!("OTEL_EXPORTER_OTLP_{signal}_{what}");
            env(&name).filter(|value| !value.is_empty()).map(|value| (name, value))
        };
        let get = |what: &str| {
            own(what).or_else(|| {
                let name = format!("OTEL_EXPORTER_OTLP_{what}");
                env(&name).filter(|value| !value.is_empty()).map(|value| (name, value))
            })
        };
        if let Some((name, mut endpoint)) = get("ENDPOINT") {
            let is_insecure = get("INSECURE").is_some_and(|(_, value)| value.eq_ignore_ascii_case("true"));
            if is_insecure && !endpoint.contains("://") {
                endpoint.insert_str(0, "http://");
            }
            self.endpoint_is_complete = name == format!("OTEL_EXPORTER_OTLP_{signal}_ENDPOINT") && has_path(&endpoint);
            self.endpoint = Some(endpoint);
        }
        if let Some((name, protocol)) = get("PROTOCOL") {
            self.protocol = match protocol.to_ascii_lowercase().as_str() {
                "grpc" => Protocol::Grpc,
                "http/protobuf" => Protocol::HttpProtobuf,
                _ => return Err(format!("{name}: {protocol} is not grpc or http/protobuf")),
            };
        }
        if let Some((name, compression)) = get("COMPRESSION") {
            self.compression = match compression.to_ascii_lowercase().as_str() {
                "none" => CompressionConfig::None,
                "gzip" => CompressionConfig::Gzip,
                _ => return Err(format!("{name}: {compression} is not none or gzip")),
            };
        }
        if let Some((name, timeout)) = get("TIMEOUT") {
            self.timeout_ms = timeout
                .parse()
                .map_err(|_| format!("{name}: {timeout} is not a number of milliseconds"))?;
        }
        if let Some((name, headers)) = get("HEADERS") {
            // The text of a header may be a secret: it is not repeated.
            self.headers = parse_headers(&headers).ok_or_else(|| format!("{name} is not a list of key=value"))?;
        }
        for (what, file) in [
            ("CERTIFICATE", &mut self.tls.ca_file),
            ("CLIENT_CERTIFICATE", &mut self.tls.cert_file),
            ("CLIENT_KEY", &mut self.tls.key_file),
        ] {
            if let Some((_, path)) = get(what) {
                *file = Some(PathBuf::from(path));
            }
        }
        Ok(())
    }

    /// Whether anything is to be sent.
    pub fn is_set(&self) -> bool {
        self.endpoint.as_deref().is_some_and(|endpoint| !endpoint.is_empty())
    }

    /// Says what is out of range, with its key in `section`.
    pub fn validate(&self, section: &str) -> Result<(), String> {
        if let Some(endpoint) = self.endpoint.as_ref().filter(|endpoint| !endpoint.is_empty())
            && !["http://", "https://"]
                .iter()
                .any(|scheme| endpoint.starts_with(scheme))
        {
            return Err(format!("{section}.target.endpoint must begin with http:// or https://"));
        }
        if let Some(endpoint) = &self.endpoint
            && endpoint
                .split("://")
                .nth(1)
                .and_then(|rest| rest.split('/').next())
                .is_some_and(|authority| authority.contains('@'))
        {
            // It is shown in logs.
            return Err(format!(
                "{section}.target.endpoint must not hold a name or password: use headers"
            ));
        }
        // As the exporter will, which is made only later.
        let wrong = |error: TransportError| format!("{section}.target: {error}");
        let url = otlp_transport::url(self, "traces").map_err(wrong)?;
        if url.host().is_none_or(str::is_empty) {
            return Err(format!("{section}.target.endpoint names no host"));
        }
        otlp_transport::headers(self).map_err(wrong)?;
        if !(1..=600_000).contains(&self.timeout_ms) {
            return Err(format!(
                "{section}.target.timeout_ms must be between 1 and 600000, not {}",
                self.timeout_ms
            ));
        }
        if self.tls.cert_file.is_some() != self.tls.key_file.is_some() {
            return Err(format!(
                "{section}.target.tls needs both cert_file and key_file, or neither"
            ));
        }
        Ok(())
    }
}

impl TracesConfig {
    /// The standard variables, `OTEL_EXPORTER_OTLP_TRACES_…` before `OTEL_EXPORTER_OTLP_…`.
    pub fn from_environment(&mut self, env: impl Fn(&str) -> Option<String>) -> Result<(), String> {
        self.target.from_environment("TRACES", env)
    }

    /// Says what is out of range.
    pub fn validate(&self) -> Result<(), String> {
        self.target.validate("traces")?;
        if !(1..=1_000_000).contains(&self.queue_traces) {
            return Err(format!(
                "traces.queue_traces must be between 1 and 1000000, not {}",
                self.queue_traces
            ));
        }
        if !(1..=4_096).contains(&self.queue_mib) {
            return Err(format!(
                "traces.queue_mib must be between 1 and 4096, not {}",
                self.queue_mib
            ));
        }
        self.sampling.validate().map_err(|error| format!("traces.{error}"))
    }
}

/// A signal's own variable is used as it is, and one that names no path means the root, where no collector listens: that gets the signal's path.
fn has_path(endpoint: &str) -> bool {
    endpoint
        .split_once("://")
        .and_then(|(_, rest)| rest.split_once('/'))
        .is_some_and(|(_, path)| !path.is_empty())
}

/// As in W3C baggage, `key=value,key=value`, values percent-encoded.
fn parse_headers(text: &str) -> Option<BTreeMap<String, String>> {
    text.split(',')
        .filter(|pair| !pair.trim().is_empty())
        .map(|pair| {
            let (key, value) = pair.split_once('=')?;
            let key = key.trim();
            (!key.is_empty()).then_some(())?;
            Some((key.to_ascii_lowercase(), percent_decoded(value.trim())?))
        })
        .collect()
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        match (first, after) {
            (b'%', [high, low, after @ ..]) if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                let digits = [*high, *low];
                bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
                rest = after;
            }
            _ => bytes.push(*first),
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(variables: &[(&str, &str)]) -> Result<TracesConfig, String> {
        let mut config = TracesConfig::default();
        config.from_environment(|name| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        })?;
        config.validate().map(|()| config)
    }

    #[test]
    fn what_no_exporter_can_be_made_of_is_refused() {
        for endpoint in ["http://a b", "http://", "https://:4318", "ftp://collector"] {
            let refused = from(&[("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)]);
            assert!(
                refused.is_err_and(|error| error.contains("traces.target")),
                "{endpoint}"
            );
        }
        let mut config = TracesConfig::default();
        config.target.headers.insert("a b".to_owned(), "secret".to_owned());
        let error = config.validate().unwrap_err();
        assert!(error.contains("a b") && !error.contains("secret"), "{error}");
    }

    #[test]
    fn the_variables_of_the_signal_win() {
        let config = from(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://common:4317"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc"),
            (
                "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
                "Authorization=Basic%20a%3D%3D, x-tenant = shop",
            ),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "2500"),
            ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "gzip"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/ca.pem"),
        ])
        .unwrap();
        assert_eq!(config.target.endpoint.as_deref(), Some("https://common:4317"));
        assert_eq!(config.target.protocol, Protocol::Grpc);
        assert_eq!(config.target.headers["authorization"], "Basic a==");
        assert_eq!(config.target.headers["x-tenant"], "shop");
        assert_eq!(config.target.timeout_ms, 2_500);
        assert_eq!(config.target.compression, CompressionConfig::Gzip);
        assert_eq!(config.target.tls.ca_file, Some(PathBuf::from("/ca.pem")));
    }

    #[test]
    fn what_cannot_be_meant_is_refused_and_headers_are_not_repeated() {
        for (name, value) in [
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier-pigeon"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "0"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "rar"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "secret"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317"),
            ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "/key.pem"),
        ] {
            let error = from(&[(name, value)]).unwrap_err();
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_file_says_the_same() {
        let config: TracesConfig = toml::from_str(
            "queue_traces = 7\n[target]\nendpoint = \"http://c:4317\"\nprotocol = \"grpc\"\n[target.tls]\nca_file = \"/ca\"\n[sampling]\nratio = 0.5\n",
        )
        .unwrap();
        assert_eq!((config.queue_traces, config.target.protocol), (7, Protocol::Grpc));
        assert!(toml::from_str::<TracesConfig>("endpont = 1").is_err());
        let text = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<TracesConfig>(&text).unwrap(), config);
    }
}
