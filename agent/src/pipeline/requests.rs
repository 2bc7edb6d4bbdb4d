//! Requests that hosts read before they enter a guest: what is known of the process that reads them, and under which span
//! its environment puts it.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::Read as _,
};

use wasmscope_common::{CONTINUES, Counter, MAY_BE_FILE, RecordHeader, THREAD_MULTIPLEXES};

use super::Pipeline;
use crate::{
    bpf::CounterValues,
    clock,
    decode::SeenRequest,
    event::{Event, EventKind},
    http_request::{self, RequestProblem},
    span::{Parent, ParentSource},
};

/// Turns for which records cannot be relied on after some were lost: what was lost may have been between those of this one
/// or of the next.
const UNRELIABLE_TURNS: u32 = 2;
/// Descriptors looked at in search of one that waits for many others.
const MAX_DESCRIPTORS: usize = 65_536;
/// Requests of one process that have been begun to be read.
const MAX_GLANCES: usize = 16_384;
/// Bytes of a process's environment searched.
const MAX_ENVIRONMENT_BYTES: u64 = 1 << 20;
/// Longest value of a variable that is read, bytes.
const MAX_VALUE_BYTES: usize = 4096;

/// x86-64: `epoll_create`, `epoll_create1`, `io_uring_setup`.
const MULTIPLEXING: [u64; 3] = [213, 291, 425];

/// What is known of a process that reads requests.
#[derive(Debug, Default)]
pub(super) struct Requests {
    /// It has read one.
    has_read: bool,
    /// It can wait for many things at once, and so may do anything between a request and its activation. `None`: nobody
    /// has looked yet.
    multiplexes: Option<bool>,
    /// First bytes of requests of which the rest is read next, by descriptor.
    glances: HashMap<u32, Vec<u8>>,
}

impl Requests {
    /// Nothing is known any more of what has been read and opened: records are missing.
    pub(super) fn forget(&mut self) {
        self.multiplexes = None;
        self.glances.clear();
    }
}

/// Which records can be relied on.
#[derive(Debug, Default)]
pub(super) struct Reliance {
    lost_count: u64,
    unreliable_turns: u32,
}

impl Reliance {
    /// Notes what is missing by now, before the records of a turn are handled.
    fn note(&mut self, lost_count: u64, undecodable: u64) {
        self.unreliable_turns = self.unreliable_turns.saturating_sub(1);
        if lost_count > self.lost_count || undecodable > 0 {
            self.lost_count = lost_count;
            self.unreliable_turns = UNRELIABLE_TURNS;
        }
    }

    /// Nothing is missing between the records that are being handled.
    pub(super) fn are_reliable(&self) -> bool {
        self.unreliable_turns == 0
    }
}

impl Pipeline {
    /// At the start of a turn, before its records are handled.
    pub(super) fn forget_requests_if_lost(
        &mut self,
        counters: &CounterValues,
        undecodable: u64,
        events: &mut Vec<Event>,
    ) {
        let lost_count = counters.get(Counter::RingFull)
            + counters.get(Counter::ThreadTableFull)
            + counters.get(Counter::ProcessThreadsFull);
        self.requests.note(lost_count, undecodable);
        if self.requests.are_reliable() {
            return;
        }
        let readers = self
            .processes
            .iter_mut()
            .filter(|(_, watched)| watched.requests.has_read);
        for (pid, watched) in readers {
            watched.requests.forget();
            events.push(Event {
                at_ns: clock::monotonic_ns(),
                pid: *pid,
                tid: *pid,
                kind: EventKind::RequestsUncertain,
            });
        }
    }

    pub(super) fn request(&mut self, request: &SeenRequest, events: &mut Vec<Event>) {
        let RecordHeader {
            pid, tid, at_ns, flags, ..
        } = request.header;
        let is_reliable = self.requests.are_reliable();
        let Some(watched) = self.processes.get_mut(&pid) else {
            return;
        };
        let mut is_socket_for_sure = true;
        if flags & MAY_BE_FILE != 0 {
            is_socket_for_sure = watched.looks.links.has_any(clock::monotonic_ns());
            if is_socket_for_sure {
                watched.looks.links.spend(1);
                if !is_socket(pid, request.descriptor) {
                    return;
                }
            }
        }
        watched.requests.has_read = true;
        let glances = &mut watched.requests.glances;
        let before = glances.remove(&request.descriptor);
        let mut head = request.head.clone();
        if flags & CONTINUES != 0 {
            let Some(mut start) = before else { return };
            let length = request.length + start.len() as u64;
            start.extend_from_slice(&request.piece);
            head = http_request::read(&start, length);
        } else if !request.piece.is_empty() && is_reliable && glances.len() < MAX_GLANCES {
            glances.insert(request.descriptor, request.piece.clone());
            return;
        }
        let multiplexes = *watched.requests.multiplexes.get_or_insert_with(|| multiplexes(pid));
        let problem = if is_reliable && is_socket_for_sure {
            head.problem
        } else {
            Some(RequestProblem::RecordsLost)
        };
        if !is_socket_for_sure {
            self.lose("request", "descriptors_limit");
        }
        if let Some(problem) = problem {
            self.lose("request", problem.as_str());
        }
        events.push(Event {
            at_ns,
            pid,
            tid,
            kind: EventKind::HttpRequest {
                descriptor: request.descriptor,
                task: request.header.task,
                is_exclusive: !multiplexes && flags & THREAD_MULTIPLEXES == 0,
                parent: head.parent.filter(|_| problem.is_none()),
                problem,
            },
        });
    }

    /// Says which task is about to make an activation, where that matters.
    pub(super) fn tell_task(&mut self, header: &RecordHeader, new: u64, events: &mut Vec<Event>) {
        let has_read = |pid| {
            self.processes
                .get(&pid)
                .is_some_and(|watched| watched.requests.has_read)
        };
        if new != 0 && header.task != 0 && has_read(header.pid) {
            events.push(Event {
                at_ns: header.at_ns,
                pid: header.pid,
                tid: header.tid,
                kind: EventKind::Task { task: header.task },
            });
        }
    }

    pub(super) fn multiplexes(&mut self, pid: u32) {
        if let Some(watched) = self.processes.get_mut(&pid) {
            watched.requests.multiplexes = Some(true);
        }
    }

    /// The same inside of an activation.
    pub(super) fn notice_multiplexing(&mut self, pid: u32, number: u64, result: i64) {
        if result >= 0 && MULTIPLEXING.contains(&number) {
            self.multiplexes(pid);
        }
    }
}

/// Whether a process has a descriptor that waits for many others; `true` if that cannot be told.
fn multiplexes(pid: u32) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return true;
    };
    for (index, descriptor) in descriptors.enumerate() {
        let Ok(descriptor) = descriptor else { return true };
        if index >= MAX_DESCRIPTORS {
            return true;
        }
        // One that is closed meanwhile is none.
        let is_one = fs::read_link(descriptor.path()).is_ok_and(|target| {
            let target = target.as_os_str().as_encoded_bytes();
            target == b"anon_inode:[eventpoll]" || target == b"anon_inode:[io_uring]"
        });
        if is_one {
            return true;
        }
    }
    false
}

fn is_socket(pid: u32, descriptor: u32) -> bool {
    fs::read_link(format!("/proc/{pid}/fd/{descriptor}"))
        .is_ok_and(|target| target.as_os_str().as_encoded_bytes().starts_with(b"socket:["))
}

/// Says under which span the environment puts a process, if it does.
pub(super) fn tell_environment(pid: u32, events: &mut Vec<Event>) {
    let mut environment = Vec::new();
    let read = File::open(format!("/proc/{pid}/environ"))
        .and_then(|file| file.take(MAX_ENVIRONMENT_BYTES).read_to_end(&mut environment));
    if read.is_err() {
        return;
    }
    if let Some(parent) = environment_parent(&environment) {
        events.push(Event {
            at_ns: clock::monotonic_ns(),
            pid,
            tid: pid,
            kind: EventKind::Environment { parent },
        });
    }
}

/// `TRACEPARENT` with `TRACESTATE`, as tools that start others set them, else `TRACECONTEXT`, a JSON object of the same two
/// (runwasi: `crates/containerd-shim-wasm/src/sandbox/shim/otel.rs`).
fn environment_parent(environment: &[u8]) -> Option<Parent> {
    let variable = |name: &str| {
        let mut values = environment.split(|byte| *byte == 0).filter_map(|variable| {
            let value = variable.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
            (value.len() <= MAX_VALUE_BYTES).then_some(value)
        });
        values.next()
    };
    if let Some(traceparent) = variable("TRACEPARENT") {
        let parent = Parent::parse(traceparent.trim_ascii(), ParentSource::Environment)?;
        return Some(parent.with_tracestate(variable("TRACESTATE").unwrap_or_default()));
    }
    let context: HashMap<String, String> = serde_json::from_slice(variable("TRACECONTEXT")?).ok()?;
    let value = |name: &str| context.get(name).map(String::as_bytes).unwrap_or_default();
    let parent = Parent::parse(value("traceparent"), ParentSource::Environment)?;
    Some(parent.with_tracestate(value("tracestate")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn of(variables: &[String]) -> Option<Parent> {
        environment_parent(variables.join("\0").as_bytes())
    }

    #[test]
    fn both_ways_of_handing_a_context_on_are_read() {
        let plain = of(&[
            "A=b".to_owned(),
            format!("TRACEPARENT={PARENT}"),
            "TRACESTATE=a=1".to_owned(),
        ]);
        let json = of(&[format!(
            r#"TRACECONTEXT={{"tracestate":"a=1","traceparent":"{PARENT}"}}"#
        )]);
        assert_eq!(plain, json);
        assert_eq!(plain.unwrap().tracestate.as_deref(), Some("a=1"));
    }

    #[test]
    fn what_is_no_context_is_none() {
        for variables in [
            "TRACEPARENT=x".to_owned(),
            format!("NOTTRACEPARENT={PARENT}"),
            "TRACECONTEXT={}".to_owned(),
            "TRACECONTEXT=[1".to_owned(),
            format!("TRACECONTEXT={}", "[".repeat(MAX_VALUE_BYTES)),
        ] {
            assert_eq!(of(&[variables]), None);
        }
    }

    #[test]
    fn a_process_that_waits_for_many_things_at_once_is_told() {
        let _waits = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        assert!(multiplexes(std::process::id()));
        assert!(multiplexes(u32::MAX / 4));
    }

    #[test]
    fn records_are_not_relied_on_in_the_turn_of_a_loss_and_the_next() {
        let mut reliance = Reliance::default();
        for (lost_count, undecodable, is_reliable) in [
            (0, 0, true),
            (3, 0, false),
            (3, 0, false),
            (3, 0, true),
            (3, 1, false),
            (3, 0, false),
            (4, 0, false),
            (4, 0, false),
            (4, 0, true),
        ] {
            reliance.note(lost_count, undecodable);
            assert_eq!(reliance.are_reliable(), is_reliable, "{lost_count} {undecodable}");
        }
    }

    #[test]
    fn a_file_is_no_socket() {
        use std::os::fd::AsRawFd as _;
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let file = File::open("/proc/self/stat").unwrap();
        let descriptor = |number: i32| u32::try_from(number).unwrap();
        assert!(is_socket(std::process::id(), descriptor(one.as_raw_fd())));
        assert!(!is_socket(std::process::id(), descriptor(file.as_raw_fd())));
    }
}
