//! What the path of a process's cgroup says: container, pod or systemd unit. One small file is read, nothing is asked of anybody.
//!
//! `/proc/PID/cgroup` has one line per hierarchy, `number:controllers:path`. On v2 there is one, `0::`; on v1 and hybrid machines there are more,
//! and any of them may be the one that knows: a youki-based shim leaves `0::/` there and puts the guest into the v1 hierarchies only.
//!
//! Paths are partly in tenants' hands: who may make cgroups below his own can give them any name. So the outermost pod in a path counts, and the
//! first container below it, and lines that contradict each other say nothing. A reader in a cgroup namespace of its own (a `DaemonSet` without
//! more ado) sees paths relative to its own cgroup, `/../../podUID/ID`. What is found below `user.slice`, where users have folders of their own, says so,
//! and nobody is asked for it.

use std::{fs::File, io, io::Read as _};

use crate::span::{Place, PlaceSource};

/// Longest file that is read, bytes.
const MAX_FILE_BYTES: u64 = 64 * 1024;
/// Lines looked at; there are about a dozen controllers.
const MAX_LINES: usize = 64;
/// Longest path looked at, bytes: the kernel's own limit for paths.
const MAX_PATH_BYTES: usize = 4096;
/// Longest name of a unit: systemd's own limit is 255.
const MAX_UNIT_BYTES: usize = 255;

/// What a cgroup says of the processes in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CgroupPlace {
    /// The container, by its runtime's id.
    pub container_id: Option<String>,
    /// The pod's UID, with dashes; of a static pod the hash of its manifest, 32 hex digits.
    pub pod_uid: Option<String>,
    /// The systemd service or scope, of what is in no container.
    pub unit: Option<String>,
    /// It is a folder that users make.
    pub is_users: bool,
}

impl CgroupPlace {
    /// As the model's place.
    pub fn into_place(self) -> Place {
        if self == Self::default() {
            return Place::default();
        }
        Place {
            container_id: self.container_id,
            pod_uid: self.pod_uid,
            unit: self.unit,
            sources: vec![if self.is_users {
                PlaceSource::UserCgroup
            } else {
                PlaceSource::CgroupPath
            }],
            ..Place::default()
        }
    }

    fn rank(&self) -> u8 {
        match (&self.pod_uid, &self.container_id, &self.unit) {
            (Some(_), Some(_), _) => 4,
            (Some(_), None, _) => 3,
            (None, Some(_), _) => 2,
            (None, None, Some(_)) => 1,
            (None, None, None) => 0,
        }
    }
}

/// Reads what the cgroup of a process says, from the agent's `/proc`.
pub fn read(pid: u32) -> io::Result<CgroupPlace> {
    let mut bytes = Vec::new();
    File::open(format!("/proc/{pid}/cgroup"))?
        .take(MAX_FILE_BYTES)
        .read_to_end(&mut bytes)?;
    Ok(parse(&bytes))
}

/// Where a process runs, as far as its cgroup says; nothing if it is gone.
pub fn place_of(pid: u32) -> Place {
    read(pid).map(CgroupPlace::into_place).unwrap_or_default()
}

/// What a `/proc/PID/cgroup` file says.
pub fn parse(file: &[u8]) -> CgroupPlace {
    let text = String::from_utf8_lossy(file);
    let mut best = CgroupPlace::default();
    let mut best_is_systemd = false;
    for line in text.lines().take(MAX_LINES) {
        // The path may hold colons itself.
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let is_systemd = controllers.is_empty() || controllers == "name=systemd";
        let found = parse_path(path);
        match found.rank().cmp(&best.rank()) {
            std::cmp::Ordering::Greater => (best, best_is_systemd) = (found, is_systemd),
            std::cmp::Ordering::Equal if best.rank() > 1 && found != best => {
                // Both are as good, and one must be wrong.
                if found.pod_uid != best.pod_uid {
                    return CgroupPlace::default();
                }
                best.container_id = None;
            }
            // systemd keeps its units in its own hierarchy; services stay behind in others.
            std::cmp::Ordering::Equal if best.rank() == 1 && is_systemd && !best_is_systemd => {
                (best, best_is_systemd) = (found, true);
            }
            _ => {}
        }
    }
    best
}

/// What the path of one cgroup says.
pub fn parse_path(path: &str) -> CgroupPlace {
    let mut found = CgroupPlace::default();
    if path.len() > MAX_PATH_BYTES {
        return found;
    }
    let segments = || {
        path.split('/')
            .filter(|segment| !segment.is_empty() && *segment != "..")
    };
    // Seen from a cgroup namespace, the folder `kubepods` itself may be above what is shown: what comes first lies in it.
    let mut in_kubepods = path.starts_with("/..")
        && segments()
            .next()
            .is_some_and(|first| matches!(first, "burstable" | "besteffort") || pod_uid(first).is_some());
    // Users make what folders they like there.
    let is_users = segments().next() == Some("user.slice");
    for segment in segments() {
        // The systemd form `slice:prefix:id`, taken literally by the cgroupfs driver.
        let mut parts = segment.rsplitn(3, ':');
        let (folder, id) = match (parts.next(), parts.next(), parts.next()) {
            (Some(id), Some(_), Some(slice)) => (slice, id),
            _ => (segment, segment),
        };
        in_kubepods |= is_kubepods(folder);
        if in_kubepods
            && !is_users
            && found.pod_uid.is_none()
            && let Some(uid) = pod_uid(folder)
        {
            found.pod_uid = Some(uid);
            // What was above the pod is the machine that the node itself runs in (kind, k3d).
            found.container_id = None;
        }
        if found.container_id.is_none()
            && let Some(id) = container_id(id)
        {
            found.container_id = Some(id.to_owned());
        }
        if is_unit(segment) {
            found.unit = Some(segment.chars().filter(|character| !character.is_control()).collect());
        }
    }
    if found.pod_uid.is_some() || found.container_id.is_some() {
        found.unit = None;
    }
    found.is_users = is_users && found.rank() > 0;
    found
}

fn is_kubepods(folder: &str) -> bool {
    let name = folder.strip_suffix(".slice").unwrap_or(folder);
    name.split('-').any(|part| part == "kubepods")
}

/// `podUID` of the cgroupfs driver, `…-podUID_with_underscores.slice` of systemd's.
fn pod_uid(folder: &str) -> Option<String> {
    let uid = match folder.strip_suffix(".slice") {
        Some(slice) => slice.rsplit_once("-pod").map(|(_, uid)| uid)?,
        None => folder.strip_prefix("pod")?,
    };
    is_uid(uid).then(|| uid.replace('_', "-").to_ascii_lowercase())
}

/// A UUID, or the hash that a static pod has for one.
fn is_uid(text: &str) -> bool {
    let bytes = text.as_bytes();
    match bytes.len() {
        32 => bytes.iter().all(u8::is_ascii_hexdigit),
        36 => bytes.iter().enumerate().all(|(index, byte)| match index {
            8 | 13 | 18 | 23 => matches!(byte, b'-' | b'_'),
            _ => byte.is_ascii_hexdigit(),
        }),
        _ => false,
    }
}

/// `ID`, `prefix-ID`, `prefix-ID.scope`. What monitors a container from beside it (`crio-conmon-ID`) is not in it.
fn container_id(segment: &str) -> Option<&str> {
    let name = segment.strip_suffix(".scope").unwrap_or(segment);
    if is_container_id(name) {
        return Some(name);
    }
    let (prefix, id) = name.rsplit_once('-')?;
    (is_container_id(id) && !prefix.ends_with("conmon")).then_some(id)
}

fn is_container_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_unit(segment: &str) -> bool {
    segment.len() <= MAX_UNIT_BYTES
        && [".service", ".scope"]
            .iter()
            .any(|end| segment.len() > end.len() && segment.ends_with(end))
}

#[cfg(test)]
mod tests;
