//! Which request an activation serves, and so under which span of the application its trace belongs.
//!
//! Activations serve the request that was read last by whoever makes them: the asynchronous task, which is followed from
//! thread to thread, or the thread itself where nothing in the process switches between requests. They do so until
//! something is written back. Whenever more than one request may be meant, none is taken, and the activation is counted.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use super::Context;
use crate::{
    http_request::RequestProblem,
    span::{Parent, Span, SpanKind},
};

/// Requests open in one process, and tasks remembered to be useless.
const MAX_OPEN: usize = 65_536;
/// Tasks begun since the oldest that may still be linked.
const MAX_AGE: u32 = 1 << 30;
/// Sockets on which one task or thread has open requests; more is no way to serve.
const MAX_DESCRIPTORS: usize = 64;
/// Functions that a command starts with: all that the process was started for. Components export `wasi:cli/run@0.2.x#run`.
const COMMAND: &str = "_start";

/// x86-64: write, close, writev, sendfile, sendto, sendmsg, shutdown, sendmmsg. Each has the descriptor that is written to
/// as its first argument.
const WRITES: [u64; 8] = [1, 3, 20, 40, 44, 46, 48, 307];

/// The requests that one process has read and not answered.
#[derive(Debug, Default)]
pub(super) struct Requests {
    open: HashMap<Server, Open>,
    by_descriptor: HashMap<u32, Server>,
    confused: Confused,
    /// A request has named a span, so activations are expected to have one.
    names_parents: bool,
    environment: Option<Arc<Parent>>,
}

/// Tasks of which it is not known any more which request they work on. Numbers of tasks only grow (tokio: one counter for all
/// runtimes of a process), so that what there is no room for can be told by its age: all tasks up to some number.
#[derive(Debug, Default)]
struct Confused {
    tasks: HashSet<u32>,
    /// The last of those that are taken to be confused for their age. Numbers are halves of longer ones, so they wrap around.
    floor: Option<u32>,
    newest: Option<u32>,
}

impl Confused {
    fn see(&mut self, task: u32) {
        if self.newest.is_none_or(|newest| is_after(task, newest)) {
            self.newest = Some(task);
        }
        // One that is left too far behind would look as if it were to come.
        if let (Some(newest), Some(floor)) = (self.newest, self.floor)
            && newest.wrapping_sub(floor) > MAX_AGE
        {
            self.floor = Some(newest.wrapping_sub(MAX_AGE));
        }
    }

    fn insert(&mut self, task: u32) {
        self.see(task);
        if self.contains(task) {
            return;
        }
        if self.tasks.len() >= MAX_OPEN {
            let newest = self.newest.unwrap_or(task);
            let mut ages: Vec<_> = self.tasks.iter().map(|task| newest.wrapping_sub(*task)).collect();
            let (_, middle, _) = ages.select_nth_unstable(MAX_OPEN / 2);
            let floor = newest.wrapping_sub(*middle);
            self.tasks.retain(|task| is_after(*task, floor));
            self.floor = Some(floor);
        }
        if !self.contains(task) {
            self.tasks.insert(task);
        }
    }

    fn contains(&self, task: u32) -> bool {
        self.floor.is_some_and(|floor| !is_after(task, floor)) || self.tasks.contains(&task)
    }
}

/// Whether a number was given to a task later than another was.
fn is_after(task: u32, other: u32) -> bool {
    let distance = task.wrapping_sub(other);
    distance != 0 && distance < 1 << 31
}

/// Who serves a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Server {
    Task(u32),
    Thread(u32),
}

#[derive(Debug)]
struct Open {
    /// Where it was read from; several if it is one of several.
    descriptors: Vec<u32>,
    parent: Option<Arc<Parent>>,
}

/// Where an activation comes from.
#[derive(Debug, Default)]
pub(super) struct Origin {
    request: Option<Arc<Parent>>,
    environment: Option<Arc<Parent>>,
}

impl Origin {
    /// The span that the trace with this root belongs under.
    pub(super) fn parent(&self, root: &Span) -> Option<Parent> {
        let of_command = || match &root.kind {
            SpanKind::Invoke {
                function: Some(function),
            } if is_command(&function.name) => self.environment.as_ref(),
            _ => None,
        };
        self.request
            .as_ref()
            .or_else(of_command)
            .map(|parent| (**parent).clone())
    }
}

fn is_command(export: &str) -> bool {
    export == COMMAND || (export.starts_with("wasi:cli/run@") && export.ends_with("#run"))
}

impl Requests {
    pub(super) fn environment(&mut self, parent: Parent) {
        self.environment = Some(Arc::new(parent));
    }

    /// Nothing is known any more of what was read and written.
    pub(super) fn forget(&mut self) {
        for server in self.open.keys() {
            if let Server::Task(task) = server {
                self.confused.insert(*task);
            }
        }
        self.open.clear();
        self.by_descriptor.clear();
    }

    /// A request was read.
    fn read(&mut self, server: Server, descriptor: u32, parent: Option<Parent>, problem: Option<RequestProblem>) {
        self.names_parents |= parent.is_some();
        if self
            .by_descriptor
            .get(&descriptor)
            .is_some_and(|known| *known != server)
        {
            // The number is used again, or the connection was handed on.
            self.end(descriptor);
        }
        if let Server::Task(task) = server {
            self.confused.see(task);
        }
        if self.open.len() >= MAX_OPEN {
            self.forget();
            if let Server::Task(task) = server {
                self.confused.insert(task);
            }
            return;
        }
        // What is behind this one in the same read, or comes before it is answered, is read by nobody when its turn comes.
        let is_behind = problem == Some(RequestProblem::Pipelined);
        let open = self.open.entry(server).or_insert_with(|| Open {
            descriptors: Vec::new(),
            parent: None,
        });
        let is_again = open.descriptors.contains(&descriptor);
        if let Server::Task(task) = server
            && (is_behind || !open.descriptors.is_empty())
        {
            self.confused.insert(task);
        }
        // A thread that reads on from where it has read a whole request is done with that.
        open.parent = if open.descriptors.is_empty() || (is_again && open.descriptors.len() == 1) {
            parent.map(Arc::new)
        } else {
            None
        };
        if !is_again && open.descriptors.len() < MAX_DESCRIPTORS {
            open.descriptors.push(descriptor);
        }
        self.by_descriptor.insert(descriptor, server);
    }

    /// Something was written back.
    pub(super) fn end(&mut self, descriptor: u32) {
        let Some(server) = self.by_descriptor.remove(&descriptor) else {
            return;
        };
        if let Some(open) = self.open.get_mut(&server) {
            open.descriptors.retain(|known| *known != descriptor);
            // One of several is left; it is not known which was meant before.
            if open.descriptors.is_empty() {
                self.open.remove(&server);
            }
        }
    }

    /// A syscall of an activation, or of work that one has handed over, may be an answer.
    pub(super) fn syscall(&mut self, number: u64, descriptor: u64) {
        if !self.by_descriptor.is_empty()
            && WRITES.contains(&number)
            && let Ok(descriptor) = u32::try_from(descriptor)
        {
            self.end(descriptor);
        }
    }

    pub(super) fn thread_exit(&mut self, tid: u32) {
        if let Some(open) = self.open.remove(&Server::Thread(tid)) {
            for descriptor in open.descriptors {
                self.by_descriptor.remove(&descriptor);
            }
        }
    }

    /// Who an outermost activation of this task or thread works for. `Err`: one of the requests, but it is not known which.
    fn origin(&self, task: u32, tid: u32) -> Result<Origin, ()> {
        let server = if task == 0 {
            Server::Thread(tid)
        } else {
            Server::Task(task)
        };
        let open = self
            .open
            .get(&server)
            .filter(|_| !(task != 0 && self.confused.contains(task)));
        let request = match open {
            Some(open) if open.descriptors.len() == 1 => open.parent.clone(),
            _ if self.names_parents => return Err(()),
            _ => None,
        };
        Ok(Origin {
            request,
            environment: self.environment.clone(),
        })
    }
}

impl Context<'_> {
    pub(super) fn request(
        &mut self,
        descriptor: u32,
        task: u32,
        is_exclusive: bool,
        parent: Option<Parent>,
        problem: Option<RequestProblem>,
    ) {
        let tid = self.tid;
        let requests = &mut self.state.requests;
        let server = match task {
            0 if is_exclusive => Server::Thread(tid),
            0 => {
                // Nothing tells who works on it.
                requests.names_parents |= parent.is_some();
                requests.end(descriptor);
                return;
            }
            task => Server::Task(task),
        };
        requests.read(server, descriptor, parent, problem);
    }

    /// Who the outermost activation works for that begins now.
    pub(super) fn origin(&mut self) -> Origin {
        let task = std::mem::take(&mut self.thread().task);
        let tid = self.tid;
        self.state.requests.origin(task, tid).unwrap_or_else(|()| {
            self.count("parent_unknown");
            Origin::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::span::ParentSource;

    fn parent(number: u8) -> Parent {
        let text = format!("00-{:032x}-{:016x}-01", 1, number.max(1));
        Parent::parse(text.as_bytes(), ParentSource::Request).unwrap()
    }

    fn served(requests: &Requests, task: u32, tid: u32) -> Option<u8> {
        let origin = requests.origin(task, tid).ok()?;
        origin.request.map(|parent| parent.span_id[7])
    }

    #[test]
    fn a_task_serves_what_it_has_read_on_any_thread_until_it_answers() {
        let mut requests = Requests::default();
        requests.read(Server::Task(7), 4, Some(parent(1)), None);
        requests.read(Server::Task(8), 5, Some(parent(2)), None);
        assert_eq!(served(&requests, 7, 1), Some(1));
        assert_eq!(served(&requests, 7, 2), Some(1));
        assert_eq!(served(&requests, 8, 1), Some(2));
        assert!(requests.origin(9, 1).is_err() && requests.origin(0, 1).is_err());
        requests.end(4);
        assert!(requests.origin(7, 1).is_err());
        requests.read(Server::Task(7), 4, Some(parent(3)), None);
        assert_eq!(served(&requests, 7, 1), Some(3));
    }

    #[test]
    fn a_request_without_parent_takes_the_place_of_the_one_before() {
        let mut requests = Requests::default();
        requests.read(Server::Task(7), 4, Some(parent(1)), None);
        requests.end(4);
        requests.read(Server::Task(7), 4, None, None);
        assert!(requests.origin(7, 1).unwrap().request.is_none());
    }

    #[test]
    fn a_connection_on_which_requests_overlap_is_not_trusted_any_more() {
        let mut requests = Requests::default();
        requests.read(Server::Task(7), 4, Some(parent(1)), None);
        requests.read(Server::Task(7), 4, Some(parent(2)), None);
        assert!(requests.origin(7, 1).is_err());
        requests.end(4);
        requests.read(Server::Task(7), 4, Some(parent(3)), None);
        assert!(requests.origin(7, 1).is_err());
        requests.read(Server::Task(8), 5, None, Some(RequestProblem::Pipelined));
        requests.end(5);
        requests.read(Server::Task(8), 5, Some(parent(4)), None);
        assert!(requests.origin(8, 1).is_err());
    }

    #[test]
    fn a_thread_with_requests_of_two_connections_serves_neither_until_both_are_answered() {
        let mut requests = Requests::default();
        requests.read(Server::Thread(1), 4, Some(parent(1)), None);
        requests.read(Server::Thread(1), 5, Some(parent(2)), None);
        assert!(requests.origin(0, 1).is_err());
        requests.end(5);
        assert_eq!(served(&requests, 0, 1), None);
        requests.syscall(3, 4);
        requests.read(Server::Thread(1), 6, Some(parent(3)), None);
        assert_eq!(served(&requests, 0, 1), Some(3));
        // The next one of the same connection, answered through another descriptor.
        requests.read(Server::Thread(1), 6, Some(parent(4)), None);
        assert_eq!(served(&requests, 0, 1), Some(4));
        requests.thread_exit(1);
        assert!(requests.by_descriptor.is_empty() && requests.open.is_empty());
    }

    #[test]
    fn however_many_tasks_are_confused_the_next_ones_are_linked() {
        let mut requests = Requests::default();
        let first = u32::MAX - 100_000;
        for number in 0..300_000u32 {
            let task = first.wrapping_add(number).max(1);
            requests.read(Server::Task(task), 4, None, Some(RequestProblem::Pipelined));
            requests.end(4);
            assert!(requests.confused.tasks.len() <= MAX_OPEN);
        }
        requests.read(Server::Task(300_000), 5, Some(parent(1)), None);
        assert_eq!(served(&requests, 300_000, 1), Some(1));
        requests.end(5);
        // What was confused stays so, however long ago that was.
        for number in (0..300_000u32).step_by(1000) {
            let task = first.wrapping_add(number).max(1);
            requests.read(Server::Task(task), 5, Some(parent(1)), None);
            assert!(requests.origin(task, 1).is_err(), "{task}");
            requests.end(5);
        }
        requests.confused.see(1 << 30);
        requests.confused.see(5 << 29);
        assert!(requests.confused.contains(300_000) && !requests.confused.contains(5 << 29));
    }

    #[test]
    fn a_task_whose_request_had_no_room_is_not_trusted() {
        let mut requests = Requests::default();
        for task in 1..=MAX_OPEN as u32 + 1 {
            requests.read(Server::Task(task), task, Some(parent(1)), None);
        }
        let last = MAX_OPEN as u32 + 1;
        requests.read(Server::Task(last), last, Some(parent(2)), None);
        assert!(requests.origin(last, 1).is_err());
    }

    #[test]
    fn lost_records_leave_nothing_to_be_served() {
        let mut requests = Requests::default();
        requests.read(Server::Task(7), 4, Some(parent(1)), None);
        requests.forget();
        assert!(requests.origin(7, 1).is_err());
    }

    proptest! {
        /// Connections are tasks; each is read from and written to in order, the others at any time between.
        #[test]
        fn connections_in_any_order_are_never_mixed_up(steps in proptest::collection::vec((0u32..6, 0u32..3), 0..200)) {
            let mut requests = Requests::default();
            let mut open: [Option<u8>; 6] = [None; 6];
            for (number, (connection, thread)) in steps.into_iter().enumerate() {
                let place = &mut open[connection as usize];
                if let Some(expected) = place.take() {
                    prop_assert_eq!(served(&requests, connection + 1, thread), Some(expected));
                    requests.end(connection + 10);
                } else {
                    let name = number as u8 | 1;
                    requests.read(Server::Task(connection + 1), connection + 10, Some(parent(name)), None);
                    *place = Some(name);
                }
            }
            prop_assert!(requests.open.len() <= 6);
        }
    }
}
