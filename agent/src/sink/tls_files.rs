//! Files for TLS that others replace while the agent runs: certificates are renewed, and secrets that are mounted into a pod change in place.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use super::otlp_config::TargetConfig;
use super::otlp_transport::endpoint;

/// What tells one version of a file from the next without reading it; `None` if there is no file.
type Version = Option<(u64, u64, u64, i64, i64)>;

/// The files of a target, and their versions when they were last looked at.
#[derive(Debug, Default)]
pub(super) struct TlsFiles {
    files: Vec<(PathBuf, Version)>,
}

impl TlsFiles {
    /// To be made before the files are read: what changes meanwhile is noticed.
    pub(super) fn of(target: &TargetConfig) -> Self {
        let tls = &target.tls;
        let paths = [&tls.ca_file, &tls.cert_file, &tls.key_file];
        let is_used = endpoint(target).starts_with("https:");
        let paths = paths.into_iter().flatten().filter(|_| is_used);
        Self {
            files: paths.map(|path| (path.clone(), version(path))).collect(),
        }
    }

    /// Whether any file is another one than when this was asked last.
    pub(super) fn have_changed(&mut self) -> bool {
        let mut have_changed = false;
        for (path, seen) in &mut self.files {
            let now = version(path);
            have_changed |= now != *seen;
            *seen = now;
        }
        have_changed
    }
}

fn version(path: &PathBuf) -> Version {
    let found = std::fs::metadata(path).ok()?;
    Some((found.dev(), found.ino(), found.len(), found.mtime(), found.mtime_nsec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_written_replaced_linked_elsewhere_or_gone_has_changed_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("one"), "1").unwrap();
        std::fs::write(path("two"), "2").unwrap();
        // As the kubelet mounts secrets.
        std::os::unix::fs::symlink(path("one"), path("ca.pem")).unwrap();
        let mut target = TargetConfig {
            endpoint: Some("https://collector:4317".to_owned()),
            ..TargetConfig::default()
        };
        target.tls.ca_file = Some(path("ca.pem"));
        let mut files = TlsFiles::of(&target);
        assert!(!files.have_changed());
        std::os::unix::fs::symlink(path("two"), path("next")).unwrap();
        std::fs::rename(path("next"), path("ca.pem")).unwrap();
        assert_eq!([files.have_changed(), files.have_changed()], [true, false]);
        std::fs::write(path("two"), "22").unwrap();
        assert_eq!([files.have_changed(), files.have_changed()], [true, false]);
        std::fs::remove_file(path("two")).unwrap();
        assert_eq!([files.have_changed(), files.have_changed()], [true, false]);

        target.endpoint = Some("http://collector:4317".to_owned());
        std::fs::write(path("two"), "2").unwrap();
        let mut unused = TlsFiles::of(&target);
        std::fs::write(path("two"), "3333").unwrap();
        assert!(!unused.have_changed());
    }
}
