//! A new configuration while the agent runs: all of it is in force, or none.

use std::collections::BTreeSet;
use std::sync::Arc;

use toml::{Table, Value};
use tracing::{error, info, warn};

use super::SetFilter;
use super::stages::Stages;
use crate::config::{Config, Sources};

/// What is in force, and what was when the agent started.
pub(super) struct Reloader {
    start: Arc<Config>,
    current: Arc<Config>,
    sources: Sources,
    set_filter: SetFilter,
}

impl Reloader {
    pub(super) fn new(start: Arc<Config>, sources: Sources, set_filter: SetFilter) -> Self {
        Self {
            current: Arc::clone(&start),
            start,
            sources,
            set_filter,
        }
    }

    /// What was read last; keys that take a restart are as they will be after it.
    pub(super) fn current(&self) -> &Config {
        &self.current
    }

    /// Reads the configuration again; whether it is in force now.
    pub(super) fn reload(&mut self, stages: &Stages) -> bool {
        let result = self.try_reload(stages);
        if let Err(error) = &result {
            error!(
                error = format!("{error:#}"),
                "reload failed, the old configuration stays"
            );
        }
        result.is_ok()
    }

    fn try_reload(&mut self, stages: &Stages) -> anyhow::Result<()> {
        let new = self.sources.load()?.config;
        let prepared = stages.prepare(&new)?;
        (self.set_filter)(&new.log.filter).map_err(anyhow::Error::msg)?;
        // From here on nothing can fail.
        stages.commit(prepared, &new);
        let changed = changed_keys(&self.current, &new);
        let waiting = waiting_keys(&self.start, &new);
        self.current = Arc::new(new);
        info!(?changed, "reloaded");
        if !waiting.is_empty() {
            warn!(keys = ?waiting, "not in force: these differ from what the agent started with and take a restart");
        }
        Ok(())
    }
}

/// Keys that differ, with their sections; never their values, which may be secrets.
fn changed_keys(old: &Config, new: &Config) -> Vec<String> {
    let flat = |config: &Config| {
        let mut values = BTreeSet::new();
        flatten("", &Table::try_from(config).unwrap_or_default(), &mut values);
        values
    };
    let (old, new) = (flat(old), flat(new));
    let keys: BTreeSet<_> = old.symmetric_difference(&new).map(|(key, _)| key.clone()).collect();
    keys.into_iter().collect()
}

fn flatten(prefix: &str, table: &Table, values: &mut BTreeSet<(String, String)>) {
    for (key, value) in table {
        let path = format!("{prefix}{key}");
        match value {
            Value::Table(inner) => flatten(&format!("{path}."), inner, values),
            value => {
                values.insert((path, value.to_string()));
            }
        }
    }
}

/// Keys that differ from what the agent started with and cannot be changed while it runs.
fn waiting_keys(start: &Config, new: &Config) -> Vec<String> {
    let sections = start.needs_restart(new);
    let is_waiting = |key: &String| {
        sections.iter().any(|section| {
            key.strip_prefix(section)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        })
    };
    changed_keys(start, new).into_iter().filter(is_waiting).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::agent::exports::Exports;
    use crate::clock::ClockAnchor;
    use crate::metrics::Metrics;
    use crate::place::{KubernetesConfig, Places};
    use crate::recorder::Recorder;

    /// A running agent's stages, its file, and the filters that were set.
    struct Running {
        file: tempfile::NamedTempFile,
        stages: Stages,
        reloader: Reloader,
        filters: Arc<Mutex<Vec<String>>>,
    }

    fn start() -> Running {
        let file = tempfile::NamedTempFile::new().unwrap();
        let sources = Sources {
            file: Some(file.path().to_owned()),
            ..Sources::default()
        };
        let config = sources.load().unwrap().config;
        let clock = ClockAnchor::now();
        let places = KubernetesConfig {
            cri_socket: "off".to_owned(),
            api_server: "off".to_owned(),
            ..KubernetesConfig::default()
        };
        let stages = Stages {
            places: Places::with_sources(&places, None, None),
            metrics: Arc::new(Metrics::new()),
            recorder: Arc::new(Recorder::new(config.recorder.clone(), clock, String::new())),
            exports: Exports::start(&config.traces, "", clock).unwrap(),
            transit: Arc::default(),
            held: std::sync::atomic::AtomicU64::default(),
            waiting: crate::agent::queue::Waiting::default(),
        };
        let filters = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&filters);
        let set_filter: SetFilter = Box::new(move |filter| {
            if filter == "off" {
                return Err("not today".to_owned());
            }
            noted.lock().unwrap().push(filter.to_owned());
            Ok(())
        });
        Running {
            file,
            stages,
            reloader: Reloader::new(Arc::new(config), sources, set_filter),
            filters,
        }
    }

    impl Running {
        fn reload(&mut self, text: &str) -> bool {
            std::fs::write(self.file.path(), text).unwrap();
            self.reloader.reload(&self.stages)
        }
    }

    #[tokio::test]
    async fn a_part_that_cannot_be_leaves_all_others_as_they_were() {
        let mut running = start();
        let elsewhere =
            "[traces.target]\nendpoint = \"https://127.0.0.1:1\"\n[traces.target.tls]\nca_file = \"/none\"\n";
        let others = "[log]\nfilter = \"warn\"\n[recorder]\nmemory_mib = 1\n[shutdown]\ndeadline_seconds = 3\n";
        let before = running.reloader.current().clone();
        let memory = running.stages.recorder.stats();
        for wrong in [
            format!("{others}{elsewhere}"),
            format!("{others}[capture]\nring_mib = 3\n"),
            format!(
                "{}[traces.target]\nendpoint = \"http://127.0.0.1:1\"\n",
                others.replace("warn", "off")
            ),
        ] {
            assert!(!running.reload(&wrong), "{wrong}");
            assert_eq!(*running.reloader.current(), before);
            assert!(running.filters.lock().unwrap().is_empty());
            assert!(!running.stages.exports.is_exporting());
            assert_eq!(running.stages.recorder.stats(), memory);
        }
        assert!(running.reload(others));
        assert_eq!(*running.filters.lock().unwrap(), ["warn"]);
        assert_eq!(running.reloader.current().shutdown.deadline_seconds, 3);
    }

    #[tokio::test]
    async fn what_takes_a_restart_is_told_until_it_is_as_it_was_at_the_start() {
        let mut running = start();
        let waiting = |running: &Running| waiting_keys(&running.reloader.start, running.reloader.current());
        assert!(running.reload("[capture]\nring_mib = 4\ntier = 0\n[http]\nlisten = \"127.0.0.1:1\"\n"));
        assert_eq!(
            waiting(&running),
            ["capture.ring_mib", "capture.tier", "http.listen"],
            "each key, not its section"
        );
        assert!(running.reload("[capture]\nring_mib = 4\n[log]\nfilter = \"warn\"\n"));
        assert_eq!(
            waiting(&running),
            ["capture.ring_mib"],
            "though nothing changed since the last reload"
        );
        assert!(running.reload(""));
        assert!(waiting(&running).is_empty());
    }

    #[test]
    fn keys_are_told_and_values_are_not() {
        let old = Config::default();
        let mut new = old.clone();
        new.traces
            .target
            .headers
            .insert("authorization".to_owned(), "s3cret".to_owned());
        new.shutdown.deadline_seconds = 1;
        assert_eq!(
            changed_keys(&old, &new),
            ["shutdown.deadline_seconds", "traces.target.headers.authorization"]
        );
        assert!(changed_keys(&new, &new).is_empty());
    }
}
