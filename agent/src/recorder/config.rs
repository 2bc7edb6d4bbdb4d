//! The section `[recorder]` of the agent's configuration.

use serde::{Deserialize, Serialize};

/// How much the flight recorder keeps, and for how long.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RecorderConfig {
    /// Most memory that kept traces take, MiB, 1 to 4096. Their index and the names in it are part of that. Default: 32.
    pub memory_mib: u32,
    /// How long a trace may be kept, seconds, 8 to 86400. It goes between this and an eighth more after it was kept. Default: 900.
    pub window_seconds: u32,
    /// How many of the slowest of each (pod or process, module, export) are kept, 0 to 256. Default: 8.
    pub slowest_per_key: u32,
    /// How many failed ones are kept beside those, 0 to 256. Default: 8.
    pub failed_per_key: u32,
    /// How many are kept at random beside those, each from a stretch of the window of its own, 0 to 256. Default: 4.
    pub random_per_key: u32,
    /// Largest trace kept, KiB of its compact form, 16 to 65536; about ten thousand calls fit 512. Default: 1024.
    pub max_trace_kib: u32,
    /// How many (pod or process, module, export) are told apart at once, 16 to 65536. Default: 4096.
    pub max_keys: u32,
}

impl Default for RecorderConfig {
    fn default() -> Self {
        Self {
            memory_mib: 32,
            window_seconds: 900,
            slowest_per_key: 8,
            failed_per_key: 8,
            random_per_key: 4,
            max_trace_kib: 1024,
            max_keys: 4096,
        }
    }
}

impl RecorderConfig {
    /// Says what is wrong with it, naming the field.
    pub fn validate(&self) -> Result<(), String> {
        let fields = [
            ("memory_mib", self.memory_mib, 1, 4096),
            ("window_seconds", self.window_seconds, 8, 86_400),
            ("slowest_per_key", self.slowest_per_key, 0, 256),
            ("failed_per_key", self.failed_per_key, 0, 256),
            ("random_per_key", self.random_per_key, 0, 256),
            ("max_trace_kib", self.max_trace_kib, 16, 65_536),
            ("max_keys", self.max_keys, 16, 65_536),
        ];
        for (name, value, least, most) in fields {
            if !(least..=most).contains(&value) {
                return Err(format!("{name} = {value} is not between {least} and {most}"));
            }
        }
        if u64::from(self.max_trace_kib) > u64::from(self.memory_mib) * 1024 {
            return Err("max_trace_kib is more than memory_mib".to_owned());
        }
        Ok(())
    }

    /// Most memory, bytes.
    pub(super) fn memory_bytes(&self) -> usize {
        self.memory_mib as usize * 1024 * 1024
    }

    /// The window, nanoseconds.
    pub(super) fn window_ns(&self) -> u64 {
        u64::from(self.window_seconds) * 1_000_000_000
    }

    /// Largest trace, bytes of its compact form.
    pub(super) fn max_trace_bytes(&self) -> usize {
        self.max_trace_kib as usize * 1024
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid_and_nonsense_is_told_by_its_name() {
        assert_eq!(RecorderConfig::default().validate(), Ok(()));
        let none = RecorderConfig {
            memory_mib: 0,
            ..RecorderConfig::default()
        };
        assert!(none.validate().unwrap_err().starts_with("memory_mib = 0"));
        let larger = RecorderConfig {
            memory_mib: 1,
            max_trace_kib: 2048,
            ..RecorderConfig::default()
        };
        assert!(larger.validate().is_err());
    }

    #[test]
    fn an_unknown_field_is_an_error() {
        assert!(toml::from_str::<RecorderConfig>("memory_mib = 8").is_ok());
        assert!(toml::from_str::<RecorderConfig>("memory_mb = 8").is_err());
    }
}
