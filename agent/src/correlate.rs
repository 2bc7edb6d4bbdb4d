//! From a stream of events to traces.
//!
//! Identity is the activation, not the thread: async embedders leave a guest on its fiber and resume it elsewhere. A
//! thread only says which activations are on it right now. Events of one thread arrive in order; a fiber that is
//! suspended on one thread is resumed on another only later, so the stream is in causal order.
//!
//! The correlator never fails and never panics: what does not fit is counted, and the next swap, which names the
//! activation that was on top, sets a thread right again.

mod activation;
mod cold;
mod helpers;
mod instances;
mod pauses;
mod request;
mod room;
mod runtime_call;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use self::activation::{Activation, FailedCall, complete, outcome};
pub use self::{activation::MAX_SPANS_PER_TRACE, room::MAX_OPEN_BYTES};
use crate::{
    event::{Coverage, Event, EventKind, FunctionId, ImportId},
    span::{Bound, Function, Import, Loss, Module, Outcome, Pause, Process, Span, SpanKind, Starts, Trace, TraceId},
    syscalls,
};

/// How long an activation that ended waits for the event that tells whether it failed, nanoseconds.
pub const SETTLE_NS: u64 = 100_000_000;
/// Activations open at once in one process.
pub const MAX_OPEN_ACTIVATIONS: usize = 65_536;
/// Threads of one process of which it is known what they do.
const MAX_THREADS: usize = 65_536;
/// An activation record lies in the frame of the function that pushes and pops it: at most this far above the stack
/// pointer when it is popped because wasm returned. A suspended fiber's record is popped from another stack.
const MAX_FRAME_BYTES: u64 = 16 << 10;
/// Cold starts kept of one trace.
const MAX_COLD_STARTS: usize = 256;
/// Records on one stack are less than this apart.
const MAX_STACK_BYTES: u64 = 64 << 20;

/// Builds traces. Feed it events, take traces.
#[derive(Debug, Default)]
pub struct Correlator {
    processes: HashMap<u32, ProcessState>,
    functions: HashMap<FunctionId, Arc<Function>>,
    modules: HashMap<(String, String), Arc<Module>>,
    imports: HashMap<ImportId, Arc<Import>>,
    losses: BTreeMap<(&'static str, &'static str), u64>,
    finished: Vec<Trace>,
    room: room::Room,
}

#[derive(Debug)]
struct ProcessState {
    process: Arc<Process>,
    coverage: Coverage,
    threads: HashMap<u32, ThreadState>,
    activations: HashMap<u64, Activation>,
    modules: cold::Modules,
    requests: request::Requests,
    instances: instances::Instances,
    /// A host call has been seen to begin.
    has_host_calls: bool,
    /// Probes that are paused, or were not long ago.
    pauses: Vec<Pause>,
}

#[derive(Debug, Default)]
struct ThreadState {
    /// Activations on the thread, outermost first.
    stack: Vec<u64>,
    /// The asynchronous task that it runs at the next event; 0: none, or not known.
    task: u32,
    /// An activation that has just left; the next event of the thread tells whether it failed.
    ended: Option<(Activation, u64)>,
}

impl ThreadState {
    /// Nothing is known of it that is not known of one that was never met.
    fn is_idle(&self) -> bool {
        self.stack.is_empty() && self.task == 0 && self.ended.is_none()
    }
}

impl Correlator {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty one whose traces under way take at most so many bytes.
    pub fn with_room(max_bytes: usize) -> Self {
        Self {
            room: room::Room::new(max_bytes),
            ..Self::default()
        }
    }

    /// Takes the next event.
    pub fn push(&mut self, event: Event) {
        let Event { at_ns, pid, tid, kind } = event;
        match kind {
            EventKind::Process { process, coverage } => self.define_process(pid, *process, coverage),
            EventKind::Function {
                id,
                module,
                hash,
                index,
                name,
            } => {
                let module = self
                    .modules
                    .entry((module.clone(), hash.clone()))
                    .or_insert_with(|| Arc::new(Module { name: module, hash }))
                    .clone();
                self.functions.insert(id, Arc::new(Function { module, index, name }));
            }
            EventKind::Import { id, module, name } => {
                self.imports.insert(id, Arc::new(Import { module, name }));
            }
            EventKind::Forgotten { functions, imports } => self.forget(&functions, &imports),
            EventKind::Lost { loss } => self.lost(&loss),
            kind @ (EventKind::ModulePublished { .. } | EventKind::Phase { .. }) => {
                if let Some(state) = self.processes.get_mut(&pid)
                    && !state.module_event(at_ns, tid, kind)
                {
                    *self.losses.entry(("correlate", "phase_limit")).or_default() += 1;
                }
            }
            EventKind::ProcessGone => {
                self.close_process(pid, at_ns);
                let state = self.processes.remove(&pid);
                let undecided = state.map_or(0, |state| state.modules.undecided_count());
                if undecided > 0 {
                    *self.losses.entry(("correlate", cold::UNASSIGNED)).or_default() += undecided as u64;
                }
            }
            EventKind::ProbesPaused { probes } => self.pause(at_ns, pid, &probes),
            EventKind::ProbesSilent { probes } => self.silence(at_ns, pid, &probes),
            EventKind::ProbesResumed { probes } => self.resume(at_ns, pid, &probes),
            kind => self.in_process(at_ns, pid, tid, kind),
        }
    }

    /// Functions, imports and modules that are known.
    pub fn definition_count(&self) -> usize {
        self.functions.len() + self.imports.len() + self.modules.len()
    }

    /// Processes that are known.
    pub fn process_count(&self) -> usize {
        self.processes.len()
    }

    /// Traces keep what they refer to.
    fn forget(&mut self, functions: &[FunctionId], imports: &[ImportId]) {
        for id in functions {
            self.functions.remove(id);
        }
        for id in imports {
            self.imports.remove(id);
        }
        self.modules.retain(|_, module| Arc::strong_count(module) > 1);
    }

    /// Decides what has been waiting for a thread's next event since before `before_ns`.
    pub fn settle(&mut self, before_ns: u64) {
        let pids: Vec<_> = self.processes.keys().copied().collect();
        for pid in pids {
            self.settle_process(pid, before_ns);
        }
    }

    fn settle_process(&mut self, pid: u32, before_ns: u64) {
        if let Some(state) = self.processes.get_mut(&pid) {
            for thread in state.threads.values_mut() {
                if thread.ended.as_ref().is_some_and(|(_, at_ns)| *at_ns < before_ns)
                    && let Some((activation, at_ns)) = thread.ended.take()
                {
                    let outcome = outcome(&activation, state.coverage, false);
                    let done = complete(activation, at_ns, Bound::Exact, outcome);
                    place(&mut state.activations, &state.process, done, &mut self.finished);
                }
            }
            // The end of a thread may not be heard of.
            state.threads.retain(|_, thread| !thread.is_idle());
            if state.threads.len() > MAX_THREADS {
                let count = state.threads.len();
                state
                    .threads
                    .retain(|_, thread| !thread.stack.is_empty() || thread.ended.is_some());
                let lost_count = (count - state.threads.len()) as u64;
                *self.losses.entry(("correlate", "thread_limit")).or_default() += lost_count;
            }
        }
    }

    /// Ends everything that is still open, at the end of a capture.
    pub fn finish(&mut self, at_ns: u64) {
        let pids: Vec<_> = self.processes.keys().copied().collect();
        for pid in pids {
            self.close_process(pid, at_ns);
        }
    }

    /// Takes the traces that are complete.
    pub fn take_finished(&mut self) -> Vec<Trace> {
        let finished = std::mem::take(&mut self.finished);
        // What a trace had no room for is missing from the capture as well.
        for loss in finished.iter().flat_map(|trace| &trace.losses) {
            if let Some(reason) = activation::LIMITS.iter().find(|reason| **reason == loss.reason) {
                *self.losses.entry(("correlate", reason)).or_default() += loss.count;
            }
        }
        finished
    }

    /// What the correlator itself could not place, since the last call.
    pub fn take_losses(&mut self) -> Vec<Loss> {
        std::mem::take(&mut self.losses)
            .into_iter()
            .map(|((layer, reason), count)| Loss {
                layer: layer.to_owned(),
                reason: reason.to_owned(),
                count,
            })
            .collect()
    }

    fn define_process(&mut self, pid: u32, process: Process, coverage: Coverage) {
        match self.processes.get_mut(&pid) {
            Some(state) if state.process.start_ns == process.start_ns => {
                state.process = Arc::new(process);
                state.coverage = coverage;
            }
            _ => {
                self.processes.insert(
                    pid,
                    ProcessState {
                        process: Arc::new(process),
                        coverage,
                        threads: HashMap::new(),
                        activations: HashMap::new(),
                        modules: cold::Modules::default(),
                        requests: request::Requests::default(),
                        instances: instances::Instances::default(),
                        has_host_calls: false,
                        pauses: Vec::new(),
                    },
                );
            }
        }
    }

    fn lost(&mut self, loss: &Loss) {
        for state in self.processes.values_mut() {
            for activation in state.activations.values_mut() {
                activation.lose(&loss.layer, &loss.reason, loss.count);
            }
        }
    }

    fn in_process(&mut self, at_ns: u64, pid: u32, tid: u32, kind: EventKind) {
        let Some(state) = self.processes.get_mut(&pid) else {
            // The last threads of a process end after it has been seen to be gone. What does not return may be how a process
            // becomes one that is watched.
            if matches!(
                kind,
                EventKind::ThreadExit
                    | EventKind::Syscall {
                        activation: 0,
                        is_open: true,
                        ..
                    }
            ) {
                return;
            }
            *self.losses.entry(("correlate", "unknown_process")).or_default() += 1;
            return;
        };
        let mut context = Context {
            state,
            functions: &self.functions,
            imports: &self.imports,
            losses: &mut self.losses,
            finished: &mut self.finished,
            room: &self.room,
            at_ns,
            tid,
        };
        match kind {
            EventKind::HttpRequest {
                descriptor,
                task,
                is_exclusive,
                parent,
                problem,
            } => return context.request(descriptor, task, is_exclusive, parent, problem),
            EventKind::RequestEnd { descriptor } => return context.state.requests.end(descriptor),
            EventKind::RequestsUncertain => return context.state.requests.forget(),
            EventKind::Environment { parent } => return context.state.requests.environment(parent),
            EventKind::Task { task } => {
                context.thread().task = task;
                return;
            }
            _ => {}
        }
        context.settle_thread(matches!(kind, EventKind::Unwind));
        match kind {
            EventKind::ActivationSwap {
                old,
                new,
                stack_pointer,
                entry,
            } => context.swap(old, new, stack_pointer, entry),
            EventKind::HostCall {
                activation,
                entry,
                import,
                frame,
                stack,
                truncated,
            } => context.host_call(activation, entry, import, frame, &stack, truncated),
            EventKind::HostCallEnd { frame, succeeded } => context.host_call_end(frame, succeeded),
            EventKind::Syscall {
                activation,
                entry,
                duration_ns,
                number,
                result,
                arguments,
                stack,
                truncated,
                handed_over_ns,
                is_open,
            } => {
                context.state.requests.syscall(number, arguments[0]);
                let name = syscalls::name(number);
                let (args, result) = syscalls::without_addresses(&name, arguments, result);
                let span = Span {
                    start_ns: at_ns,
                    end_ns: at_ns.saturating_add(duration_ns),
                    start_bound: Bound::Exact,
                    end_bound: if is_open { Bound::Open } else { Bound::Exact },
                    tid,
                    kind: SpanKind::Syscall {
                        number,
                        name,
                        args,
                        result,
                        on_helper: handed_over_ns.is_some(),
                    },
                    outcome: match syscalls::errno(result) {
                        _ if is_open => Outcome::Unfinished,
                        Some(errno) => Outcome::Errno { errno },
                        None => Outcome::Ok,
                    },
                    stack: context.stack(&stack),
                    stack_truncated: truncated,
                    children: Vec::new(),
                    suspends: Vec::new(),
                };
                match handed_over_ns {
                    Some(handed_over_ns) => context.helper_leaf(activation, handed_over_ns, span),
                    None if is_open && activation == 0 => context.open_leaf(span),
                    None => context.leaf(activation, entry, span),
                }
            }
            EventKind::Trap {
                activation,
                entry,
                code,
                stack,
                native_offset,
                wasm_offset,
            } => {
                let span = context.trap_span(&code, &stack, native_offset, wasm_offset);
                context.trap(activation, entry, code, span);
            }
            EventKind::RuntimeCall {
                activation,
                entry,
                call,
                stack_pointer,
                stack,
                truncated,
                native_offset,
                wasm_offset,
            } => {
                let span = context.runtime_call_span(call, &stack, truncated, wasm_offset);
                context.runtime_call(activation, entry, stack_pointer, native_offset, span);
            }
            EventKind::RuntimeCallEnd { stack_pointer, result } => context.runtime_call_end(stack_pointer, result),
            EventKind::Raise {
                activation,
                entry,
                code,
                stack,
                native_offset,
                wasm_offset,
            } => {
                let word = code.as_deref().unwrap_or(activation::RAISED_BY_RUNTIME);
                let span = context.trap_span(word, &stack, native_offset, wasm_offset);
                context.raise(activation, entry, code.is_some(), span);
            }
            EventKind::ThreadExit => context.thread_exit(),
            EventKind::FirstCall { activation, image } => context.first_call(activation, image),
            _ => {}
        }
    }

    fn close_process(&mut self, pid: u32, at_ns: u64) {
        self.settle_process(pid, u64::MAX);
        self.close_activations(pid, at_ns);
    }

    fn close_activations(&mut self, pid: u32, at_ns: u64) {
        let Some(state) = self.processes.get_mut(&pid) else {
            return;
        };
        state.threads.clear();
        // Callees began after their callers, so the youngest is closed first and lands in its parent.
        let mut open: Vec<_> = state
            .activations
            .values()
            .map(|a| (a.span.start_ns, a.address))
            .collect();
        open.sort_unstable_by(|a, b| b.cmp(a));
        for (_, address) in open {
            if let Some(activation) = state.activations.remove(&address) {
                let end_ns = at_ns.max(activation.last_ns);
                let done = complete(activation, end_ns, Bound::Open, Outcome::Unfinished);
                place(&mut state.activations, &state.process, done, &mut self.finished);
            }
        }
    }
}

/// One event, with what it may touch.
struct Context<'a> {
    state: &'a mut ProcessState,
    functions: &'a HashMap<FunctionId, Arc<Function>>,
    imports: &'a HashMap<ImportId, Arc<Import>>,
    losses: &'a mut BTreeMap<(&'static str, &'static str), u64>,
    finished: &'a mut Vec<Trace>,
    room: &'a room::Room,
    at_ns: u64,
    tid: u32,
}

impl Context<'_> {
    fn count(&mut self, reason: &'static str) {
        *self.losses.entry(("correlate", reason)).or_default() += 1;
    }

    fn stack(&self, ids: &[FunctionId]) -> Vec<Arc<Function>> {
        ids.iter().filter_map(|id| self.functions.get(id).cloned()).collect()
    }

    fn thread(&mut self) -> &mut ThreadState {
        self.state.threads.entry(self.tid).or_default()
    }

    /// The thread's next event is here: an activation that has left it can be judged.
    fn settle_thread(&mut self, unwinding: bool) {
        let Some((mut activation, at_ns)) = self.thread().ended.take() else {
            return;
        };
        if unwinding {
            activation.event_count += 1;
            activation.unwind_runtime_call(at_ns);
        } else if self.state.coverage.unwinds {
            activation.catch();
        }
        let outcome = outcome(&activation, self.state.coverage, unwinding);
        let done = complete(activation, at_ns, Bound::Exact, outcome);
        place(&mut self.state.activations, &self.state.process, done, self.finished);
    }

    fn swap(&mut self, old: Option<u64>, new: u64, stack_pointer: u64, entry: Option<FunctionId>) {
        if let Some(old) = old {
            self.resynchronise(old);
            self.name(old, entry);
        }
        let stack = &self.thread().stack;
        let top = stack.last().copied();
        let below = stack.len().checked_sub(2).and_then(|index| stack.get(index)).copied();
        match top {
            Some(top) if new == 0 || below == Some(new) => self.leave(top, stack_pointer),
            Some(top) if below.is_none() && self.returns_to(new, top, stack_pointer) => {
                // Both were there before the probes were.
                self.leave(top, stack_pointer);
                self.adopt(new);
                self.thread().stack.push(new);
            }
            None if new == 0 => self.count("end_without_begin"),
            _ => self.enter(new),
        }
        // It was told for this swap; whatever became of it, the next one may be another's.
        self.thread().task = 0;
    }

    /// Whether `top` returns to an activation that began before the probes did. A record that is pushed lies in the
    /// frame of the code that pushes it; here it is `top` that lies there, and `new` is further up the same stack.
    fn returns_to(&self, new: u64, top: u64, stack_pointer: u64) -> bool {
        lies_in_frame(top, stack_pointer)
            && new > top
            && new - top < MAX_STACK_BYTES
            && !self.state.activations.contains_key(&new)
    }

    /// Makes the thread agree with what the kernel saw on top of it.
    fn resynchronise(&mut self, old: u64) {
        if self.thread().stack.last().copied().unwrap_or(0) == old {
            return;
        }
        let position = self.thread().stack.iter().position(|address| *address == old);
        let keep = position.map_or(0, |position| position + 1);
        let missed: Vec<_> = self.thread().stack.drain(keep..).collect();
        for address in missed.into_iter().rev() {
            self.count("end_missed");
            if let Some(activation) = self.state.activations.remove(&address) {
                let last_ns = activation.last_ns;
                let done = complete(activation, last_ns, Bound::Inferred, Outcome::Unknown);
                place(&mut self.state.activations, &self.state.process, done, self.finished);
            }
        }
        if old != 0 && position.is_none() {
            self.adopt(old);
            self.thread().stack.push(old);
        }
    }

    /// Makes sure that an activation whose begin was not seen is known.
    fn adopt(&mut self, address: u64) {
        let bound = if self.state.coverage.activations {
            Bound::Open
        } else {
            Bound::Inferred
        };
        let (at_ns, tid) = (self.at_ns, self.tid);
        if let Some(activation) = self.state.activations.get_mut(&address) {
            // Seen on another thread before: it was resumed here, unseen.
            if let Some((start_ns, from_tid)) = activation.suspended.take() {
                activation.add_suspend(start_ns, from_tid, at_ns, tid);
            }
            return;
        }
        self.begin(address, None, bound);
    }

    fn begin(&mut self, address: u64, parent: Option<u64>, start_bound: Bound) {
        let origin = if parent.is_none() && start_bound == Bound::Exact {
            self.origin()
        } else {
            request::Origin::default()
        };
        if self.state.activations.len() >= MAX_OPEN_ACTIVATIONS {
            self.count("too_many_activations");
            return;
        }
        let stack = parent
            .and_then(|parent| self.state.activations.get(&parent))
            .and_then(|parent| parent.open_call.as_ref())
            .map(|call| call.stack.clone())
            .unwrap_or_default();
        let span = Span {
            start_ns: self.at_ns,
            end_ns: self.at_ns,
            start_bound,
            end_bound: Bound::Open,
            tid: self.tid,
            kind: SpanKind::Invoke { function: None },
            outcome: Outcome::Unfinished,
            stack,
            stack_truncated: false,
            children: Vec::new(),
            suspends: Vec::new(),
        };
        let Some(share) = self.room.share(room::activation_bytes() + room::span_bytes(&span)) else {
            self.count(room::OPEN_TRACES_LIMIT);
            return;
        };
        self.state.activations.insert(
            address,
            Activation {
                address,
                span,
                parent,
                open_call: None,
                open_frame: 0,
                open_runtime_call: None,
                failed_call: None,
                trap: None,
                last_ns: self.at_ns,
                suspended: None,
                event_count: 1,
                span_count: 1,
                share,
                losses: BTreeMap::new(),
                cold: Vec::new(),
                is_warm: false,
                origin,
                pauses: self.state.pauses_at(self.at_ns),
                is_muted: false,
            },
        );
    }

    fn enter(&mut self, new: u64) {
        let parent = self.thread().stack.last().copied();
        let (at_ns, tid) = (self.at_ns, self.tid);
        let known = self.state.activations.get_mut(&new).map(|activation| {
            activation.event_count += 1;
            activation.last_ns = at_ns;
            activation.suspended.take().map(|(start_ns, from_tid)| {
                activation.add_suspend(start_ns, from_tid, at_ns, tid);
            })
        });
        match known {
            Some(Some(())) => {}
            Some(None) => {
                // The record's place on the stack is used again, so the end of the one before was missed.
                self.count("end_missed");
                if let Some(activation) = self.state.activations.remove(&new) {
                    let last_ns = activation.last_ns.min(at_ns);
                    let done = complete(activation, last_ns, Bound::Inferred, Outcome::Unknown);
                    place(&mut self.state.activations, &self.state.process, done, self.finished);
                }
                for thread in self.state.threads.values_mut() {
                    thread.stack.retain(|address| *address != new);
                }
                self.begin(new, parent.filter(|parent| *parent != new), Bound::Exact);
            }
            None => self.begin(new, parent, Bound::Exact),
        }
        self.thread().stack.push(new);
    }

    fn leave(&mut self, top: u64, stack_pointer: u64) {
        self.thread().stack.pop();
        let (at_ns, tid) = (self.at_ns, self.tid);
        if !lies_in_frame(top, stack_pointer) {
            if let Some(activation) = self.state.activations.get_mut(&top) {
                activation.event_count += 1;
                activation.last_ns = at_ns;
                activation.suspended = Some((at_ns, tid));
            }
            return;
        }
        let Some(mut activation) = self.state.activations.remove(&top) else {
            self.count("end_without_begin");
            return;
        };
        // It may have gone unnamed.
        self.settle_cold_starts();
        activation.event_count += 1;
        if self.state.coverage.unwinds {
            self.thread().ended = Some((activation, at_ns));
        } else {
            let outcome = outcome(&activation, self.state.coverage, false);
            let done = complete(activation, at_ns, Bound::Exact, outcome);
            place(&mut self.state.activations, &self.state.process, done, self.finished);
        }
    }

    /// The activation an event belongs to, made known if it was not.
    fn activation(&mut self, address: u64, entry: Option<FunctionId>) -> Option<&mut Activation> {
        let address = if address == 0 {
            self.thread().stack.last().copied()?
        } else {
            address
        };
        if self.state.coverage.activations {
            self.resynchronise(address);
        } else {
            // Nothing tells when activations come and go: the event itself does, and so does another export.
            self.leave_other_export(address, entry);
            self.adopt(address);
        }
        self.name(address, entry);
        let at_ns = self.at_ns;
        let activation = self.state.activations.get_mut(&address)?;
        activation.event_count += 1;
        activation.last_ns = activation.last_ns.max(at_ns);
        Some(activation)
    }

    /// Without probes, a record's place on the stack is used again unseen; that the entry changes shows it.
    fn leave_other_export(&mut self, address: u64, entry: Option<FunctionId>) {
        let entered = entry.and_then(|entry| self.functions.get(&entry));
        let is_other = self.state.activations.get(&address).is_some_and(|activation| {
            matches!(
                (&activation.span.kind, entered),
                (SpanKind::Invoke { function: Some(known) }, Some(entered)) if known != entered
            )
        });
        if is_other && let Some(activation) = self.state.activations.remove(&address) {
            let last_ns = activation.last_ns;
            let done = complete(activation, last_ns, Bound::Inferred, Outcome::Unknown);
            place(&mut self.state.activations, &self.state.process, done, self.finished);
        }
    }

    fn name(&mut self, address: u64, entry: Option<FunctionId>) {
        let Some(found) = entry.and_then(|entry| self.functions.get(&entry)) else {
            return;
        };
        if let Some(activation) = self.state.activations.get_mut(&address)
            && let SpanKind::Invoke { function } = &mut activation.span.kind
            && function.is_none()
        {
            *function = Some(found.clone());
            self.state.modules.judge(activation);
            self.settle_cold_starts();
        }
    }

    fn host_call(
        &mut self,
        address: u64,
        entry: Option<FunctionId>,
        import: Option<ImportId>,
        frame: u64,
        stack: &[FunctionId],
        truncated: bool,
    ) {
        let span = Span {
            start_ns: self.at_ns,
            end_ns: self.at_ns,
            start_bound: Bound::Exact,
            end_bound: Bound::Open,
            tid: self.tid,
            kind: SpanKind::HostCall {
                import: import.and_then(|import| self.imports.get(&import).cloned()),
            },
            outcome: Outcome::Unfinished,
            stack: self.stack(stack),
            stack_truncated: truncated,
            children: Vec::new(),
            suspends: Vec::new(),
        };
        let at_ns = self.at_ns;
        let Some(activation) = self.activation(address, entry) else {
            self.count("host_call_without_activation");
            return;
        };
        activation.close_call(at_ns, Bound::Inferred, Outcome::Unknown);
        activation.catch();
        activation.open_call = Some(span);
        activation.open_frame = frame;
        activation.is_muted = false;
        self.state.has_host_calls = true;
    }

    fn host_call_end(&mut self, frame: u64, succeeded: bool) {
        let at_ns = self.at_ns;
        let top = self.thread().stack.last().copied();
        let top = top.and_then(|top| self.state.activations.get_mut(&top));
        let Some(activation) = top.filter(|activation| activation.open_call.is_some()) else {
            // Before the first begin, they are of calls that began before the probes were there.
            if self.state.has_host_calls {
                self.count("host_call_end_without_begin");
            }
            return;
        };
        if frame != 0 && activation.open_frame != 0 && frame != activation.open_frame {
            // Something else that the host function called returns through the same code.
            return;
        }
        activation.event_count += 1;
        activation.last_ns = activation.last_ns.max(at_ns);
        let outcome = if succeeded { Outcome::Ok } else { Outcome::HostError };
        if !succeeded && let Some(call) = &activation.open_call {
            activation.failed_call = Some(FailedCall { import: call.import() });
        }
        activation.close_call(at_ns, Bound::Exact, outcome);
    }

    fn leaf(&mut self, address: u64, entry: Option<FunctionId>, span: Span) {
        let Some(activation) = self.activation(address, entry) else {
            self.count("syscall_without_activation");
            return;
        };
        activation.last_ns = activation.last_ns.max(span.end_ns);
        activation.add(span);
    }

    fn trap(&mut self, address: u64, entry: Option<FunctionId>, code: String, span: Span) {
        let at_ns = self.at_ns;
        let Some(activation) = self.activation(address, entry) else {
            self.count("trap_without_activation");
            return;
        };
        // Guest code was running, so the host call before is over.
        activation.close_call(at_ns, Bound::Inferred, Outcome::Unknown);
        activation.trap = Some(code);
        activation.add(span);
    }

    fn thread_exit(&mut self) {
        self.state.requests.thread_exit(self.tid);
        let Some(thread) = self.state.threads.remove(&self.tid) else {
            return;
        };
        for address in thread.stack.into_iter().rev() {
            if let Some(activation) = self.state.activations.remove(&address) {
                let done = complete(activation, self.at_ns, Bound::Open, Outcome::Unfinished);
                place(&mut self.state.activations, &self.state.process, done, self.finished);
            }
        }
    }
}

/// Whether an activation record lies in the frame that `stack_pointer` belongs to.
fn lies_in_frame(activation: u64, stack_pointer: u64) -> bool {
    activation > stack_pointer && activation - stack_pointer < MAX_FRAME_BYTES
}

/// Puts a completed activation into the host call that made it, or makes it a trace.
fn place(
    activations: &mut HashMap<u64, Activation>,
    process: &Arc<Process>,
    done: Activation,
    finished: &mut Vec<Trace>,
) {
    if let Some(parent) = done.parent.and_then(|parent| activations.get_mut(&parent)) {
        parent.event_count += done.event_count;
        parent.span_count += done.span_count - 1;
        parent.last_ns = parent.last_ns.max(done.span.end_ns);
        for ((layer, reason), count) in &done.losses {
            parent.lose(layer, reason, *count);
        }
        let room = MAX_COLD_STARTS.saturating_sub(parent.cold.len());
        if let excess @ 1.. = done.cold.len().saturating_sub(room) {
            parent.lose("correlate", activation::COLD_START_LIMIT, excess as u64);
        }
        parent.cold.extend(done.cold.into_iter().take(room));
        let end_ns = done.span.end_ns;
        // The rest is given back: the activation is over, and its span is added like any other.
        let all_but = room::activation_bytes() + room::span_bytes(&done.span);
        parent.share.absorb(done.share, all_but);
        parent.add(done.span);
        parent.close_muted(end_ns);
        return;
    }
    let parent = done.origin.parent(&done.span);
    let pauses = pauses::within(&done.span, &done.pauses);
    finished.push(Trace {
        pauses,
        id: trace_id(process, done.address, done.span.start_ns),
        process: process.clone(),
        root: done.span,
        losses: done
            .losses
            .into_iter()
            .map(|((layer, reason), count)| Loss { layer, reason, count })
            .collect(),
        event_count: done.event_count,
        starts: Starts {
            cold: done.cold,
            is_warm: done.is_warm,
        },
        parent,
    });
}

/// The same activation of the same run always gets the same id.
fn trace_id(process: &Process, address: u64, start_ns: u64) -> TraceId {
    use sha2::{Digest as _, Sha256};
    let mut hash = Sha256::new();
    for part in [u64::from(process.pid), process.start_ns, address, start_ns] {
        hash.update(part.to_le_bytes());
    }
    let mut id = [0; 16];
    id.copy_from_slice(&hash.finalize()[..16]);
    // All zero is the one value that W3C forbids.
    if id == [0; 16] {
        id[15] = 1;
    }
    TraceId(id)
}

#[cfg(test)]
mod tests;
