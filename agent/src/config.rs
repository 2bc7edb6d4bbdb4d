//! The agent's one configuration: what can be set, where each value came from, and whether all of it makes sense together.
//!
//! From lowest to highest: defaults, one TOML file, OpenTelemetry's variables (`OTEL_EXPORTER_OTLP_…`), the environment, flags. A variable `WASMSCOPE_SECTION__KEY` (two underscores,
//! so that the variables Kubernetes makes for a service called `wasmscope` are never taken for it) sets `key` of `[section]`; the standard
//! `NODE_NAME` sets `kubernetes.node_name`. Keys that do not exist are errors, in the file with their line.
//!
//! A new section is one field of [`Config`], one line in [`Config::validate`] and, if it has secrets, a word in [`SECRETS`].

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use toml::{Table, Value};

use crate::governor::GovernorConfig;
use crate::inventory::InventoryConfig;
use crate::metrics::MetricsConfig;
use crate::place::KubernetesConfig;
use crate::recorder::RecorderConfig;
use crate::sink::otlp_config::{OtlpMetricsConfig, TargetConfig, TracesConfig};
use crate::sink::otlp_transport::{self, without_query};

/// Prefix of the variables that set keys.
const PREFIX: &str = "WASMSCOPE_";
/// Variables that others have named.
const STANDARD_VARIABLES: [(&str, &str); 1] = [("NODE_NAME", "kubernetes.node_name")];
/// Keys whose values are never printed.
const SECRETS: [&str; 3] = ["headers", "password", "token"];
/// Sections with a collector, what OpenTelemetry's variables call their signal, and the collector.
type Target = (&'static str, &'static str, fn(&Config) -> &TargetConfig);
const TARGETS: [Target; 2] = [
    ("traces", "TRACES", |config| &config.traces.target),
    ("otlp_metrics", "METRICS", |config| &config.otlp_metrics.target),
];
/// Largest file that is read, bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Everything that can be set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The HTTP server.
    pub http: HttpConfig,
    /// Logs.
    pub log: LogConfig,
    /// What is observed.
    pub capture: CaptureConfig,
    /// Which pod a process belongs to.
    pub kubernetes: KubernetesConfig,
    /// How metrics are kept and shown.
    pub metrics: MetricsConfig,
    /// The flight recorder.
    pub recorder: RecorderConfig,
    /// What probes may cost.
    pub governor: GovernorConfig,
    /// Runtimes and modules of the node, for scheduling. Changing it takes a restart.
    pub inventory: InventoryConfig,
    /// Traces that go to a collector.
    pub traces: TracesConfig,
    /// Metrics that go to a collector. Changing it takes a restart.
    pub otlp_metrics: OtlpMetricsConfig,
    /// How it ends.
    pub shutdown: ShutdownConfig,
    /// One agent per node.
    pub instance: InstanceConfig,
}

/// The HTTP server. Changing it takes a restart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HttpConfig {
    /// Where it listens; port 0 picks a free one. Default: 127.0.0.1:9464, this host only.
    pub listen: SocketAddr,
    /// The event loop counts as alive while its last turn is at most so old, seconds, 1 to 3600. Default: 30.
    pub liveness_seconds: u64,
}

/// Logs, on standard error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// A level, or directives as in `RUST_LOG`. Default: info.
    pub filter: String,
    /// How a line is written. Default: text. Changing it takes a restart.
    pub format: LogFormat,
}

/// How a line of the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// What is observed. Changing it takes a restart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CaptureConfig {
    /// Buffer between kernel and agent, MiB, a power of two from 1 to 1024. Default: 16.
    pub ring_mib: u32,
    /// 0: syscalls with their guest functions, no probe in the process; 1: every crossing. Default: 1.
    pub tier: u8,
    /// Traces that may wait for the stages after the event loop, 1 to 1,000,000; more are lost and counted. Default: 8192.
    pub queue_traces: usize,
    /// Estimated memory of the traces that have not come through all stages, MiB, 1 to 4,096; more are lost and counted. Half of it may wait for names of
    /// pods. One trace is always taken. Default: 32.
    pub queue_mib: usize,
    /// How long a host binary stays probed that no process runs any more, seconds, 0 to 86400. Default: 300.
    pub file_grace_seconds: u64,
    /// Most memory that names and tables of the modules that run on the node take, each different module once, MiB, 16 to
    /// 65536; one process may have half of it. Beyond it, modules have names but no source positions, or neither. Default: 128.
    pub names_mib: u32,
    /// Most memory that traces under way take, estimated, MiB, 1 to 65536. What finds no room is missing from its trace and
    /// counted. Default: 64.
    pub open_traces_mib: u32,
    /// Whether the kernel measures how long each of its BPF programs runs, for `wasmscope_bpf_program_seconds_total`. Costs every run of every program on
    /// the node two looks at the clock, and takes `CAP_SYS_ADMIN`, which the chart does not give: `sysctl kernel.bpf_stats_enabled=1` does the same.
    /// Default: false.
    pub program_run_time: bool,
}

/// How the agent ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ShutdownConfig {
    /// From SIGTERM to the end, whatever has not been delivered by then, seconds, 1 to 600. Default: 10.
    pub deadline_seconds: u64,
}

/// One agent per node. Changing it takes a restart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct InstanceConfig {
    /// Locked while the agent runs. In a container, this has to be on a volume of the node's. Default: /run/wasmscope/agent.lock.
    pub lock_file: PathBuf,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            listen: crate::http::DEFAULT_ADDRESS,
            liveness_seconds: 30,
        }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            filter: "info".to_owned(),
            format: LogFormat::Text,
        }
    }
}

impl Default for CaptureConfig {
    fn default() -> Self {
        Self {
            ring_mib: 16,
            tier: 1,
            queue_traces: 8_192,
            queue_mib: 32,
            file_grace_seconds: 300,
            names_mib: 128,
            open_traces_mib: 64,
            program_run_time: false,
        }
    }
}

impl Default for ShutdownConfig {
    fn default() -> Self {
        Self { deadline_seconds: 10 }
    }
}

impl Default for InstanceConfig {
    fn default() -> Self {
        Self {
            lock_file: PathBuf::from("/run/wasmscope/agent.lock"),
        }
    }
}

impl Config {
    /// Whether the files for TLS to collectors hold what they should; the first that does not, with its key. Those of the pod's service account are looked
    /// at by whoever asks with them.
    pub fn check_files(&self) -> Result<(), String> {
        for (section, _, target) in TARGETS {
            otlp_transport::check_files(target(self)).map_err(|error| format!("{section}.target: {error}"))?;
        }
        Ok(())
    }

    /// Whether all of it makes sense; the first thing that does not, with its key.
    pub fn validate(&self) -> Result<(), String> {
        let within = |key: &str, value: u64, range: std::ops::RangeInclusive<u64>| {
            if range.contains(&value) {
                Ok(())
            } else {
                Err(format!(
                    "{key} is {value}, must be from {} to {}",
                    range.start(),
                    range.end()
                ))
            }
        };
        within("http.liveness_seconds", self.http.liveness_seconds, 1..=3_600)?;
        within("capture.ring_mib", self.capture.ring_mib.into(), 1..=1_024)?;
        if !self.capture.ring_mib.is_power_of_two() {
            return Err(format!(
                "capture.ring_mib is {}, must be a power of two",
                self.capture.ring_mib
            ));
        }
        within("capture.tier", self.capture.tier.into(), 0..=1)?;
        within("capture.queue_traces", self.capture.queue_traces as u64, 1..=1_000_000)?;
        within("capture.queue_mib", self.capture.queue_mib as u64, 1..=4_096)?;
        within(
            "capture.file_grace_seconds",
            self.capture.file_grace_seconds,
            0..=86_400,
        )?;
        within("capture.names_mib", self.capture.names_mib.into(), 16..=65_536)?;
        within(
            "capture.open_traces_mib",
            self.capture.open_traces_mib.into(),
            1..=65_536,
        )?;
        self.governor
            .validate()
            .map_err(|message| format!("governor.{message}"))?;
        within("shutdown.deadline_seconds", self.shutdown.deadline_seconds, 1..=600)?;
        tracing_subscriber::EnvFilter::try_new(&self.log.filter)
            .map_err(|error| format!("log.filter is {:?}: {error}", self.log.filter))?;
        self.kubernetes.validate()?;
        self.metrics.validate()?;
        self.traces.validate()?;
        self.otlp_metrics.validate()?;
        self.recorder.validate().map_err(|error| format!("recorder.{error}"))?;
        self.inventory
            .validate()
            .map_err(|error| format!("inventory.{error}"))?;
        if self.instance.lock_file.as_os_str().is_empty() {
            return Err("instance.lock_file is empty".to_owned());
        }
        Ok(())
    }

    /// Keys in which `new` differs that only a restart can change.
    pub fn needs_restart(&self, new: &Self) -> Vec<&'static str> {
        let mut keys = Vec::new();
        let mut differs = |key, is_different| {
            if is_different {
                keys.push(key);
            }
        };
        differs("http", self.http != new.http);
        differs("log.format", self.log.format != new.log.format);
        differs("capture", self.capture != new.capture);
        differs("inventory", self.inventory != new.inventory);
        differs("instance", self.instance != new.instance);
        differs("metrics", self.metrics != new.metrics);
        differs("otlp_metrics", self.otlp_metrics != new.otlp_metrics);
        differs("kubernetes", self.kubernetes != new.kubernetes);
        keys
    }
}

/// Why a configuration is not one.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML, or has keys or values that do not exist.
    #[error("{path}: {message}")]
    File {
        /// The file.
        path: PathBuf,
        /// What, with its line.
        message: String,
    },
    /// A variable or a flag has a key or value that does not exist.
    #[error("{origin}: {message}")]
    Setting {
        /// Which.
        origin: String,
        /// What.
        message: String,
    },
    /// All is well-formed, but does not make sense.
    #[error("{0}")]
    Invalid(String),
}

/// Where values come from, kept so that they can be read again.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// The file, if there is one.
    pub file: Option<PathBuf>,
    /// Variables of the environment.
    pub variables: Vec<(String, String)>,
    /// Flags: what was written, the key, and the value.
    pub flags: Vec<(String, String, String)>,
}

/// A configuration that has been checked, and where its values come from.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// By key, for what is not a default.
    origins: BTreeMap<String, String>,
}

impl Sources {
    /// Reads and checks all of it.
    pub fn load(&self) -> Result<Loaded, ConfigError> {
        let mut origins = BTreeMap::new();
        let mut merged = Table::new();
        if let Some(path) = &self.file {
            let table = read_file(path)?;
            note_origins(&table, "", &format!("file {}", path.display()), &mut origins);
            merged = table;
        }
        self.take_opentelemetry(&mut merged, &mut origins)?;
        for (name, value) in &self.variables {
            let standard = STANDARD_VARIABLES.iter().find(|(standard, _)| standard == name);
            let key = match standard {
                Some((_, key)) => (*key).to_owned(),
                None => match name.strip_prefix(PREFIX).and_then(|rest| rest.split_once("__")) {
                    Some((section, key)) => format!("{section}.{}", key.replace("__", ".")).to_lowercase(),
                    None => continue,
                },
            };
            set(&mut merged, &key, value, &format!("environment {name}"), &mut origins)?;
        }
        for (flag, key, value) in &self.flags {
            set(&mut merged, key, value, &format!("flag {flag}"), &mut origins)?;
        }
        let config = Config::deserialize(Value::Table(merged))
            .map_err(|error| ConfigError::Invalid(without_values(error.message())))?;
        config.validate().map_err(|message| {
            let origin = message.split_whitespace().next().and_then(|key| origins.get(key));
            ConfigError::Invalid(match origin {
                Some(origin) => format!("{message} (set by {origin})"),
                None => message,
            })
        })?;
        Ok(Loaded { config, origins })
    }
}

impl Sources {
    /// What OpenTelemetry's variables say of the collectors.
    fn take_opentelemetry(
        &self,
        merged: &mut Table,
        origins: &mut BTreeMap<String, String>,
    ) -> Result<(), ConfigError> {
        let variable = |name: &str| {
            let found = self.variables.iter().find(|(known, _)| known == name);
            found.map(|(_, value)| value.clone())
        };
        let before = Config::deserialize(Value::Table(merged.clone()))
            .map_err(|error| ConfigError::Invalid(error.to_string().trim().to_owned()))?;
        for (section, signal, target) in TARGETS {
            let old = target(&before);
            let mut new = old.clone();
            new.from_environment(signal, variable).map_err(ConfigError::Invalid)?;
            let [old, new] = [old, &new].map(|target| Table::try_from(target).unwrap_or_default());
            for (key, value) in new {
                if old.get(&key) != Some(&value) {
                    let path = format!("{section}.target.{key}");
                    insert(merged, &path, value);
                    origins.insert(path, format!("environment OTEL_EXPORTER_OTLP_*_{}", key.to_uppercase()));
                }
            }
        }
        Ok(())
    }
}

impl Loaded {
    /// All of it as TOML that says where what is not a default came from. Secrets are masked.
    pub fn to_toml(&self) -> String {
        use std::fmt::Write as _;
        let mut text = String::new();
        let all = Table::try_from(&self.config).unwrap_or_default();
        for (section, value) in &all {
            let Value::Table(keys) = value else { continue };
            let gap = if text.is_empty() { "" } else { "\n" };
            let _ = writeln!(text, "{gap}[{section}]");
            for (key, value) in keys {
                let path = format!("{section}.{key}");
                let value = masked(key, value);
                let origin = self
                    .origins
                    .iter()
                    .find(|(name, _)| **name == path || name.strip_prefix(&path).is_some_and(|r| r.starts_with('.')));
                let _ = match origin {
                    // A file's name or a variable's may hold anything but must stay a comment.
                    Some((_, origin)) => writeln!(text, "{key} = {value} # {}", crate::sink::text::printable(origin)),
                    None => writeln!(text, "{key} = {value}"),
                };
            }
        }
        text
    }
}

fn masked(key: &str, value: &Value) -> Value {
    let is_secret = SECRETS.contains(&key);
    match value {
        Value::Table(table) => Value::Table(
            table
                .iter()
                .map(|(inner, value)| {
                    let key = if is_secret { key } else { inner };
                    (inner.clone(), masked(key, value))
                })
                .collect(),
        ),
        Value::String(text) if text.is_empty() => value.clone(),
        // A collector may want its token there.
        Value::String(text) if key == "endpoint" && !is_secret => Value::String(without_query(text)),
        _ if is_secret => Value::String("***".to_owned()),
        _ => value.clone(),
    }
}

fn read_file(path: &Path) -> Result<Table, ConfigError> {
    use std::io::Read as _;
    let cannot = |source| ConfigError::Read {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    let read = std::fs::File::open(path)
        .map_err(cannot)?
        .take(MAX_FILE_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(cannot)?;
    if read as u64 > MAX_FILE_BYTES {
        let words = format!("it has more than {MAX_FILE_BYTES} bytes");
        return Err(cannot(std::io::Error::new(std::io::ErrorKind::FileTooLarge, words)));
    }
    // The error's own words would show the line itself, and a secret that stands in it.
    let wrong = |error: toml::de::Error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let number = before.matches('\n').count();
        // What stands before it is the key, unless the line is the rest of a text.
        let key = text.lines().nth(number).and_then(|line| line.split_once('='));
        let is_key = |key: &str| key.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
        let key = key.map(|(key, _)| key.trim()).filter(|key| is_key(key));
        let key = key.map_or_else(String::new, |key| format!("{key}: "));
        ConfigError::File {
            path: path.to_owned(),
            message: format!("line {}: {key}{}", number + 1, without_values(error.message())),
        }
    };
    // For its errors, which name the line.
    toml::from_str::<Config>(&text).map_err(wrong)?;
    toml::from_str(&text).map_err(wrong)
}

/// What is wrong, without the value that is.
fn without_values(message: &str) -> String {
    let is_of_a_value = message.starts_with("invalid type") || message.starts_with("invalid value");
    match message.rsplit_once(", expected ") {
        Some((_, expected)) if is_of_a_value => format!("expected {}", expected.trim()),
        _ => message.trim().to_owned(),
    }
}

fn note_origins(table: &Table, prefix: &str, origin: &str, origins: &mut BTreeMap<String, String>) {
    for (key, value) in table {
        let path = if prefix.is_empty() {
            key.clone()
        } else {
            format!("{prefix}.{key}")
        };
        match value {
            Value::Table(inner) => note_origins(inner, &path, origin, origins),
            _ => {
                origins.insert(path, origin.to_owned());
            }
        }
    }
}

/// Sets one key, after trying it alone so that the error names who set it.
fn set(
    merged: &mut Table,
    path: &str,
    text: &str,
    origin: &str,
    origins: &mut BTreeMap<String, String>,
) -> Result<(), ConfigError> {
    let alone = |value: Value| {
        let mut table = Table::new();
        insert(&mut table, path, value);
        table
    };
    let parsed = toml::from_str::<Table>(&format!("value = {text}"))
        .ok()
        .filter(|table| table.len() == 1)
        .and_then(|mut table| table.remove("value"));
    let as_text = Value::String(text.to_owned());
    // What reads as a number may be meant as text, so whichever the key takes is right.
    let mut failure = String::new();
    for value in parsed.into_iter().chain([as_text]) {
        match Config::deserialize(Value::Table(alone(value.clone()))) {
            Ok(_) => {
                insert(merged, path, value);
                origins.insert(path.to_owned(), origin.to_owned());
                return Ok(());
            }
            Err(error) if failure.is_empty() => failure = without_values(error.message()),
            Err(_) => {}
        }
    }
    Err(ConfigError::Setting {
        origin: origin.to_owned(),
        message: format!("{path}: {failure}"),
    })
}

fn insert(table: &mut Table, path: &str, value: Value) {
    match path.split_once('.') {
        None => {
            table.insert(path.to_owned(), value);
        }
        Some((section, rest)) => {
            let inner = table
                .entry(section.to_owned())
                .or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(inner) = inner {
                insert(inner, rest, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> (tempfile::NamedTempFile, Sources) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let sources = Sources {
            file: Some(file.path().to_owned()),
            ..Sources::default()
        };
        (file, sources)
    }

    #[test]
    fn flags_win_over_the_environment_and_that_over_the_file_and_that_over_defaults() {
        let (_file, mut sources) = file("[capture]\nring_mib = 2\ntier = 0\nqueue_traces = 5\n");
        sources.variables = vec![
            ("WASMSCOPE_CAPTURE__RING_MIB".to_owned(), "4".to_owned()),
            ("WASMSCOPE_CAPTURE__TIER".to_owned(), "1".to_owned()),
            ("NODE_NAME".to_owned(), "12".to_owned()),
        ];
        sources.flags = vec![("--ring-mib".to_owned(), "capture.ring_mib".to_owned(), "8".to_owned())];
        let config = sources.load().unwrap().config;
        assert_eq!(
            (
                config.capture.ring_mib,
                config.capture.tier,
                config.capture.queue_traces
            ),
            (8, 1, 5)
        );
        assert_eq!(config.kubernetes.node_name, "12");
        assert_eq!(config.shutdown.deadline_seconds, 10);
    }

    #[test]
    fn unknown_keys_are_errors_with_their_line() {
        let (_file, sources) = file("[http]\n\nlisten_on = \"x\"\n");
        let error = sources.load().unwrap_err().to_string();
        assert!(error.contains("line 3") && error.contains("listen_on"), "{error}");
        let (_file, sources) = file("[htp]\n");
        let error = sources.load().unwrap_err().to_string();
        assert!(error.contains("line 1") && error.contains("htp"), "{error}");
    }

    #[test]
    fn errors_do_not_show_what_may_be_a_secret() {
        let header = "authorization=Bearer s3cret";
        let (_file, in_file) = file(&format!("[traces.target]\nheaders = \"{header}\"\n"));
        let (_file, cut) = file(&format!("[traces.target]\nheaders = {{ a = \"{header}\"\n"));
        let (_file, in_endpoint) = file("[traces.target]\nendpoint = \"https://user:s3cret@collector\"\n");
        let in_variable = Sources {
            variables: vec![("WASMSCOPE_TRACES__TARGET__HEADERS".to_owned(), header.to_owned())],
            ..Sources::default()
        };
        for sources in [in_file, cut, in_endpoint, in_variable] {
            let error = sources.load().unwrap_err().to_string();
            assert!(!error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn what_follows_the_path_of_an_endpoint_is_not_printed() {
        let (_file, sources) = file("[traces.target]\nendpoint = \"https://collector/in?token=s3cret\"\n");
        let text = sources.load().unwrap().to_toml();
        assert!(!text.contains("s3cret"), "{text}");
        assert!(text.contains("https://collector/in?***"), "{text}");
    }

    #[test]
    fn files_for_tls_are_looked_at_and_what_is_wrong_is_named() {
        let nonsense = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(nonsense.path(), "nonsense").unwrap();
        let nonsense = nonsense.path().display();
        let target = |section: &str, scheme: &str| {
            format!(
                "[{section}.target]\nendpoint = \"{scheme}://collector:4317\"\n[{section}.target.tls]\nca_file = \"{nonsense}\"\n"
            )
        };
        for (text, words) in [
            (target("traces", "https"), ["traces.target", "tls.ca_file"]),
            (target("otlp_metrics", "https"), ["otlp_metrics.target", "tls.ca_file"]),
        ] {
            let (_file, sources) = file(&text);
            let config = sources.load().unwrap().config;
            let error = config.check_files().unwrap_err();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
        let (_file, sources) = file(&target("traces", "http"));
        assert_eq!(sources.load().unwrap().config.check_files(), Ok(()), "is not used");
    }

    #[test]
    fn an_unknown_variable_is_an_error_and_a_service_of_kubernetes_is_not_one() {
        let variable = |name: &str| Sources {
            variables: vec![(name.to_owned(), "1".to_owned())],
            ..Sources::default()
        };
        let error = variable("WASMSCOPE_HTTP__PORT").load().unwrap_err().to_string();
        assert!(
            error.contains("WASMSCOPE_HTTP__PORT") && error.contains("http.port"),
            "{error}"
        );
        variable("WASMSCOPE_HTTP_SERVICE_PORT").load().unwrap();
        variable("WASMSCOPE_LOG").load().unwrap();
    }

    #[test]
    fn each_bad_value_is_told_with_its_key() {
        for (key, text) in [
            ("http.listen", "[http]\nlisten = \"nowhere\""),
            ("http.liveness_seconds", "[http]\nliveness_seconds = 0"),
            ("log.filter", "[log]\nfilter = \"a=b=c\""),
            ("format", "[log]\nformat = \"xml\""),
            ("capture.ring_mib", "[capture]\nring_mib = 3"),
            ("capture.ring_mib", "[capture]\nring_mib = 2048"),
            ("capture.tier", "[capture]\ntier = 2"),
            ("capture.queue_traces", "[capture]\nqueue_traces = 0"),
            ("capture.queue_mib", "[capture]\nqueue_mib = 5000"),
            ("shutdown.deadline_seconds", "[shutdown]\ndeadline_seconds = 601"),
            ("instance.lock_file", "[instance]\nlock_file = \"\""),
        ] {
            let (_file, sources) = file(text);
            let error = sources.load().unwrap_err().to_string();
            let word = key.rsplit('.').next().unwrap();
            assert!(error.contains(word), "{key}: {error}");
        }
    }

    #[test]
    fn what_is_printed_reads_as_the_same_configuration_and_says_where_it_came_from() {
        let (_file, mut sources) = file("[shutdown]\ndeadline_seconds = 3\n");
        sources.variables = vec![("WASMSCOPE_LOG__FORMAT".to_owned(), "json".to_owned())];
        let loaded = sources.load().unwrap();
        let printed = loaded.to_toml();
        assert!(
            printed.contains("format = \"json\" # environment WASMSCOPE_LOG__FORMAT"),
            "{printed}"
        );
        assert!(printed.contains("deadline_seconds = 3 # file "), "{printed}");
        let (_again, sources) = file(&printed);
        assert_eq!(sources.load().unwrap().config, loaded.config);
    }

    #[test]
    fn secrets_are_masked() {
        let mut table = Table::new();
        insert(
            &mut table,
            "headers.authorization",
            Value::String("Bearer 1".to_owned()),
        );
        let shown = masked("traces", &Value::Table(table)).to_string();
        assert!(shown.contains("***") && !shown.contains("Bearer"), "{shown}");
    }

    #[test]
    fn the_variables_of_opentelemetry_stand_between_the_file_and_our_own() {
        let (_file, mut sources) = file("[traces.target]\nendpoint = \"http://file:1\"\ntimeout_ms = 7\n");
        sources.variables = vec![
            ("OTEL_EXPORTER_OTLP_ENDPOINT".to_owned(), "http://variable:2".to_owned()),
            (
                "OTEL_EXPORTER_OTLP_HEADERS".to_owned(),
                "authorization=Bearer%20x1y2".to_owned(),
            ),
            ("OTEL_EXPORTER_OTLP_PROTOCOL".to_owned(), "grpc".to_owned()),
            (
                "WASMSCOPE_TRACES__TARGET__PROTOCOL".to_owned(),
                "http/protobuf".to_owned(),
            ),
        ];
        let loaded = sources.load().unwrap();
        let target = &loaded.config.traces.target;
        assert_eq!(target.endpoint.as_deref(), Some("http://variable:2"));
        assert_eq!(target.headers["authorization"], "Bearer x1y2");
        assert_eq!(target.protocol, crate::sink::otlp::Protocol::HttpProtobuf);
        assert_eq!(target.timeout_ms, 7);
        let printed = loaded.to_toml();
        assert!(
            printed.contains("authorization") && !printed.contains("x1y2"),
            "{printed}"
        );
        sources
            .variables
            .push(("OTEL_EXPORTER_OTLP_TIMEOUT".to_owned(), "soon".to_owned()));
        assert!(sources.load().is_err());
    }
}
