//! The section `[inventory]` of the agent's configuration.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What the inventory tells, and to whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct InventoryConfig {
    /// How often it is renewed, seconds, 1 to 3600. Default: 5.
    pub interval_seconds: u64,
    /// A module is warm for so long after its last invocation, seconds, 1 to 86400. Default: 300.
    pub warm_seconds: u64,
    /// Modules told apart, those of most processes first, 1 to 10000; the others are counted together. Default: 500.
    pub max_modules: usize,
    /// File that is written for the *local* source of Node Feature Discovery, such as
    /// `/etc/kubernetes/node-feature-discovery/features.d/wasmscope`. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nfd_features_file: Option<PathBuf>,
    /// Modules that become labels of the node, 0 to 200. Default: 50.
    pub nfd_max_modules: usize,
    /// What is in the file counts for so long after it was written, seconds, 60 to 86400: as long as the labels of an agent that was killed
    /// stay. It is written again when half of that is over. Default: 600.
    pub nfd_expiry_seconds: u64,
}

impl Default for InventoryConfig {
    fn default() -> Self {
        Self {
            interval_seconds: 5,
            warm_seconds: 300,
            max_modules: 500,
            nfd_features_file: None,
            nfd_max_modules: 50,
            nfd_expiry_seconds: 600,
        }
    }
}

impl InventoryConfig {
    /// Says what is wrong with it, naming the field.
    pub fn validate(&self) -> Result<(), String> {
        let fields = [
            ("interval_seconds", self.interval_seconds, 1, 3_600),
            ("warm_seconds", self.warm_seconds, 1, 86_400),
            ("max_modules", self.max_modules as u64, 1, 10_000),
            ("nfd_max_modules", self.nfd_max_modules as u64, 0, 200),
            ("nfd_expiry_seconds", self.nfd_expiry_seconds, 60, 86_400),
        ];
        for (name, value, least, most) in fields {
            if !(least..=most).contains(&value) {
                return Err(format!("{name} is {value}, must be from {least} to {most}"));
            }
        }
        if self.nfd_expiry_seconds < 2 * self.interval_seconds {
            return Err("nfd_expiry_seconds is less than twice interval_seconds".to_owned());
        }
        if let Some(path) = &self.nfd_features_file {
            let name = path.file_name().map(|name| name.to_string_lossy());
            if !path.is_absolute() {
                return Err("nfd_features_file must be an absolute path".to_owned());
            }
            if name.is_none_or(|name| name.starts_with('.')) {
                return Err(
                    "nfd_features_file must have a name that does not begin with a dot: such files are not read"
                        .to_owned(),
                );
            }
        }
        Ok(())
    }
}
