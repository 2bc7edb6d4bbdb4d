//! Which steps of loading and instantiating belong together, and to which code object: pairs of marks become phases.
//!
//! A code object is compiled or loaded on one thread, so the code that becomes executable inside such a call is what the
//! call makes. Of an instantiation, the runtime's pointer to the module tells which it is: the pointer was seen when the
//! module was made. What cannot be told so stays unknown.

use std::collections::{BTreeMap, HashMap, HashSet};

use wasmscope_common::{Mark, MarkEnd, SiteKind};

use super::Pipeline;
use crate::{
    event::{Event, EventKind},
    span::PhaseKind,
};

/// Code objects followed in one process.
const MAX_IMAGES: usize = 1024;
/// Modules known by their pointer in one process.
const MAX_MODULES: usize = 16_384;
/// Threads with something open in one process.
const MAX_THREADS: usize = 4096;
/// Steps of one load: the deepest nesting is four, and no call appears twice but a component's modules.
const MAX_STEPS: usize = 64;
/// Start functions that run at once in one process.
const MAX_STARTS: usize = 4096;
/// An activation that a call makes lies this close below the call's own frame.
const MAX_FRAMES_BYTES: u64 = 64 << 10;
/// No pointer is lower.
const LOWEST_POINTER: u64 = 4096;

/// What is being loaded, has been loaded, and is being instantiated in one process.
#[derive(Debug, Default)]
pub(super) struct Loads {
    /// By start of text.
    images: BTreeMap<u64, Image>,
    /// By the runtime's pointer.
    modules: HashMap<u64, ModuleKey>,
    threads: HashMap<u32, Thread>,
    /// Start functions that run, by the stack pointer of the call that runs them: they may move to other threads.
    starts: HashMap<u64, Running>,
    /// Images that have not been called.
    uncalled_count: usize,
}

#[derive(Debug)]
struct Image {
    end: u64,
    is_component: bool,
    module_count: u32,
    instantiated: HashSet<u32>,
    is_called: bool,
}

/// One core module of a code object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ModuleKey {
    /// Start of the object's text.
    pub(super) text: u64,
    /// Its number in the object.
    pub(super) index: u32,
}

#[derive(Debug, Default)]
struct Thread {
    open: Vec<Open>,
    closed: Vec<Step>,
    /// What became executable meanwhile.
    text: Option<u64>,
    /// The last modules that a store was told of, oldest first.
    registered: Vec<(u64, u64)>,
    making: Option<Making>,
    /// The instance that was made last, if nothing has happened since.
    made: Option<Made>,
}

#[derive(Debug)]
struct Open {
    kind: SiteKind,
    stack_pointer: u64,
    start_ns: u64,
}

#[derive(Debug)]
struct Step {
    kind: SiteKind,
    start_ns: u64,
    end_ns: u64,
}

#[derive(Debug)]
struct Making {
    stack_pointer: u64,
    start_ns: u64,
    key: Option<ModuleKey>,
}

#[derive(Clone, Copy, Debug)]
struct Made {
    key: Option<ModuleKey>,
    is_first: bool,
}

/// What an instance runs before anybody may call it.
#[derive(Debug)]
struct Running {
    tid: u32,
    start_ns: u64,
    made: Option<Made>,
    activation: Option<u64>,
}

/// A phase that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) kind: PhaseKind,
    pub(super) key: Option<ModuleKey>,
    pub(super) start_ns: u64,
    pub(super) end_ns: u64,
    pub(super) is_first: bool,
}

impl Loads {
    /// Code at `text` is about to become executable.
    pub(super) fn published(&mut self, tid: u32, text: std::ops::Range<u64>, is_component: bool) {
        let overlapping: Vec<_> = self
            .images
            .iter()
            .filter(|(start, image)| **start < text.end && text.start < image.end)
            .map(|(start, _)| *start)
            .collect();
        for start in overlapping {
            self.remove(start);
        }
        if self.images.len() >= MAX_IMAGES
            && let Some(start) = self.images.first_key_value().map(|(start, _)| *start)
        {
            self.remove(start);
        }
        self.uncalled_count += 1;
        self.images.insert(
            text.start,
            Image {
                end: text.end,
                is_component,
                module_count: 0,
                instantiated: HashSet::new(),
                is_called: false,
            },
        );
        if let Some(thread) = self.threads.get_mut(&tid)
            && !thread.open.is_empty()
        {
            thread.text = Some(text.start);
        }
    }

    fn remove(&mut self, start: u64) {
        if let Some(image) = self.images.remove(&start) {
            self.uncalled_count -= usize::from(!image.is_called);
            self.modules.retain(|_, key| key.text != start);
        }
    }

    /// A step begins.
    pub(super) fn begin(&mut self, kind: SiteKind, tid: u32, mark: &Mark) -> Vec<Done> {
        if self.threads.len() >= MAX_THREADS && !self.threads.contains_key(&tid) {
            self.threads.clear();
        }
        let thread = self.threads.entry(tid).or_default();
        let (start_ns, stack_pointer) = (mark.header.at_ns, mark.stack_pointer);
        let made = thread.made.take();
        match kind {
            SiteKind::RegisterModule => {
                // The upper half of a register that holds a small number is not said to be zero.
                let [_, kind, argument, pointee] = mark.arguments;
                // Compilers may pass what the argument points to instead of its address.
                let is_known = |pointer: &u64| self.modules.contains_key(pointer);
                let pointer = [pointee, argument].into_iter().find(is_known).or_else(|| {
                    let mut pointers = [pointee, argument].into_iter();
                    pointers.find(|pointer| *pointer >= LOWEST_POINTER)
                });
                if kind as u32 == 0
                    && let Some(pointer) = pointer
                {
                    if thread.registered.len() >= 2 {
                        thread.registered.remove(0);
                    }
                    thread.registered.push((pointer, start_ns));
                } else {
                    thread.registered.clear();
                }
                Vec::new()
            }
            SiteKind::MakeInstance => {
                thread.making = thread.instantiation(&self.modules, &self.images, stack_pointer);
                Vec::new()
            }
            SiteKind::StartInstance => {
                if self.starts.len() < MAX_STARTS {
                    let start = Running {
                        tid,
                        start_ns,
                        made,
                        activation: None,
                    };
                    self.starts.insert(stack_pointer, start);
                }
                Vec::new()
            }
            _ => {
                thread.registered.clear();
                let done = thread.begin_load(kind);
                if thread.open.len() >= MAX_STEPS {
                    thread.open.clear();
                }
                thread.open.push(Open {
                    kind,
                    stack_pointer,
                    start_ns,
                });
                done
            }
        }
    }

    /// A step ends.
    pub(super) fn end(&mut self, kind: SiteKind, tid: u32, end: &MarkEnd) -> Vec<Done> {
        let end_ns = end.header.at_ns;
        if kind == SiteKind::StartInstance {
            let start = self.starts.remove(&end.stack_pointer);
            return start
                .and_then(|start| {
                    start.made.map(|made| Done {
                        kind: PhaseKind::Start,
                        key: made.key,
                        start_ns: start.start_ns,
                        end_ns,
                        is_first: made.is_first,
                    })
                })
                .into_iter()
                .collect();
        }
        let Some(thread) = self.threads.get_mut(&tid) else {
            return Vec::new();
        };
        if kind == SiteKind::MakeInstance {
            let making = thread
                .making
                .take_if(|making| making.stack_pointer == end.stack_pointer);
            let Some(making) = making else { return Vec::new() };
            let is_first = making.key.is_some_and(|key| {
                let image = self.images.get_mut(&key.text);
                image.is_some_and(|image| image.instantiated.insert(key.index))
            });
            thread.made = Some(Made {
                key: making.key,
                is_first,
            });
            return vec![Done {
                kind: PhaseKind::Instantiate,
                key: making.key,
                start_ns: making.start_ns,
                end_ns,
                is_first,
            }];
        }
        let begun = thread
            .open
            .iter()
            .rposition(|open| open.kind == kind && open.stack_pointer == end.stack_pointer);
        let Some(position) = begun else { return Vec::new() };
        let start_ns = thread.open[position].start_ns;
        // What is above has been left by a panic.
        thread.open.truncate(position);
        if thread.closed.len() < MAX_STEPS {
            thread.closed.push(Step { kind, start_ns, end_ns });
        }
        if kind == SiteKind::MakeModule
            && let Some(text) = thread.text
            && let Some(image) = self.images.get_mut(&text)
        {
            // `Ok` and the pointer; of an error, the first register is not zero.
            if end.result == 0 && end.second_result >= LOWEST_POINTER {
                if self.modules.len() >= MAX_MODULES {
                    self.modules.clear();
                }
                let index = image.module_count;
                self.modules.insert(end.second_result, ModuleKey { text, index });
            }
            image.module_count += 1;
        }
        if thread.open.is_empty() {
            thread.end_load(kind)
        } else {
            Vec::new()
        }
    }

    /// The activation on top of a thread changes.
    pub(super) fn swapped(&mut self, tid: u32, new: u64) {
        if new == 0 {
            return;
        }
        if let Some(thread) = self.threads.get_mut(&tid) {
            thread.made = None;
        }
        let start = self.starts.iter_mut().find(|(stack_pointer, start)| {
            start.tid == tid
                && start.activation.is_none()
                && new < **stack_pointer
                && **stack_pointer - new < MAX_FRAMES_BYTES
        });
        if let Some((_, start)) = start {
            start.activation = Some(new);
        }
    }

    /// An activation turns out to have been entered through the code at `entry`; returns the image if that is the first call
    /// into it. What an instance runs at its start does not count.
    pub(super) fn first_call(&mut self, activation: u64, entry: u64) -> Option<u64> {
        if self.uncalled_count == 0 || entry == 0 {
            return None;
        }
        let (text, image) = self.images.range_mut(..=entry).next_back()?;
        if image.is_called || entry >= image.end {
            return None;
        }
        if self.starts.values().any(|start| start.activation == Some(activation)) {
            return None;
        }
        image.is_called = true;
        self.uncalled_count -= 1;
        Some(*text)
    }

    /// Records were lost: what was open may have ended, and a pointer may stand for another module by now.
    pub(super) fn forget(&mut self) {
        self.threads.clear();
        self.starts.clear();
        self.modules.clear();
    }

    /// A thread is gone.
    pub(super) fn thread_gone(&mut self, tid: u32) {
        self.threads.remove(&tid);
    }
}

impl Thread {
    /// What an instance that is being made belongs to. Stores are told of a module twice for an instance that a program
    /// asks for: when imports are matched and when the instance is made. Of a component's modules, only then. Anything else
    /// that makes an instance is the runtime itself, for a memory or function of the host's.
    fn instantiation(
        &mut self,
        modules: &HashMap<u64, ModuleKey>,
        images: &BTreeMap<u64, Image>,
        stack_pointer: u64,
    ) -> Option<Making> {
        let registered = std::mem::take(&mut self.registered);
        let (pointer, last_ns) = *registered.last()?;
        let key = modules.get(&pointer).copied();
        let start_ns = match *registered.as_slice() {
            [(first, first_ns), _] if first == pointer => first_ns,
            _ if key.is_some_and(|key| images.get(&key.text).is_some_and(|image| image.is_component)) => last_ns,
            _ => return None,
        };
        Some(Making {
            stack_pointer,
            start_ns,
            key,
        })
    }

    /// A step of loading begins. If it is the first of a load, the one before is over.
    fn begin_load(&mut self, kind: SiteKind) -> Vec<Done> {
        if !self.open.is_empty() {
            return Vec::new();
        }
        let has = |wanted: SiteKind| self.closed.iter().any(|step| step.kind == wanted);
        let goes_on = match kind {
            SiteKind::Assemble | SiteKind::MakeModule => true,
            SiteKind::LoadCode | SiteKind::Publish => {
                !has(SiteKind::LoadCode) && !has(SiteKind::Publish) && !has(SiteKind::Compile)
            }
            _ => false,
        };
        if goes_on {
            return Vec::new();
        }
        let done = self.phases();
        self.closed.clear();
        self.text = None;
        done
    }

    /// The outermost step that was open has ended.
    fn end_load(&mut self, kind: SiteKind) -> Vec<Done> {
        let has_module = self
            .closed
            .iter()
            .any(|step| matches!(step.kind, SiteKind::Assemble | SiteKind::MakeModule));
        match kind {
            SiteKind::Compile => {}
            // The rest comes after it where the function around it has been inlined.
            _ if !has_module => return Vec::new(),
            _ => {}
        }
        let done = self.phases();
        // The text stays: more modules of the same object may follow.
        self.closed.clear();
        done
    }

    fn phases(&self) -> Vec<Done> {
        let of = |wanted: SiteKind| self.closed.iter().find(|step| step.kind == wanted);
        let (Some(text), Some(start_ns), Some(end_ns)) = (
            self.text,
            self.closed.iter().map(|step| step.start_ns).min(),
            self.closed.iter().map(|step| step.end_ns).max(),
        ) else {
            return Vec::new();
        };
        let done = |kind, start_ns, end_ns| Done {
            kind,
            key: Some(ModuleKey { text, index: 0 }),
            start_ns,
            end_ns,
            is_first: true,
        };
        let mut phases = Vec::new();
        if let Some(load) = of(SiteKind::LoadCode) {
            // Where something asked for compilation, a cache had the code.
            if start_ns < load.start_ns {
                phases.push(done(PhaseKind::Read, start_ns, load.start_ns));
            }
            phases.push(done(PhaseKind::Deserialize, load.start_ns, end_ns));
        } else if of(SiteKind::Compile).is_some() {
            phases.push(done(PhaseKind::Compile, start_ns, end_ns));
        } else if of(SiteKind::Publish).is_none() {
            return Vec::new();
        }
        if let Some(publish) = of(SiteKind::Publish) {
            phases.push(done(PhaseKind::Publish, publish.start_ns, publish.end_ns));
        }
        phases
    }
}

impl Pipeline {
    /// A step of loading or instantiating begins.
    pub(super) fn cold_begin(&mut self, kind: SiteKind, mark: &Mark, events: &mut Vec<Event>) {
        let (pid, tid) = (mark.header.pid, mark.header.tid);
        let Some(watched) = self.processes.get_mut(&pid) else {
            return;
        };
        let done = watched.loads.begin(kind, tid, mark);
        self.tell_phases(pid, tid, &done, events);
    }

    /// A step of loading or instantiating ends.
    pub(super) fn cold_end(&mut self, kind: SiteKind, end: &MarkEnd, events: &mut Vec<Event>) {
        let (pid, tid) = (end.header.pid, end.header.tid);
        let Some(watched) = self.processes.get_mut(&pid) else {
            return;
        };
        let done = watched.loads.end(kind, tid, end);
        self.tell_phases(pid, tid, &done, events);
    }

    fn tell_phases(&mut self, pid: u32, tid: u32, done: &[Done], events: &mut Vec<Event>) {
        let Some(watched) = self.processes.get_mut(&pid) else {
            return;
        };
        for phase in done {
            let module = phase.key.and_then(|key| watched.guests.module_of(key.text, key.index));
            events.push(Event {
                at_ns: phase.end_ns,
                pid,
                tid,
                kind: EventKind::Phase {
                    phase: phase.kind,
                    start_ns: phase.start_ns,
                    image: phase.key.map_or(0, |key| key.text),
                    module: module.as_ref().map(|module| module.name.clone()),
                    hash: module.as_ref().map(|module| module.hash.clone()),
                    is_first: phase.is_first,
                },
            });
        }
    }

    /// Tells if an activation that has just become known is the first call into its module.
    pub(super) fn tell_first_call(
        &mut self,
        (pid, tid, at_ns): (u32, u32, u64),
        activation: u64,
        entry: u64,
        events: &mut Vec<Event>,
    ) {
        let Some(watched) = self.processes.get_mut(&pid) else {
            return;
        };
        if let Some(image) = watched.loads.first_call(activation, entry) {
            events.push(Event {
                at_ns,
                pid,
                tid,
                kind: EventKind::FirstCall { activation, image },
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use wasmscope_common::RecordHeader;
    use zerocopy::FromZeros as _;

    use super::*;

    const TID: u32 = 7;
    const TEXT: std::ops::Range<u64> = 0x7f00_0000_1000..0x7f00_0000_3000;
    const MODULE: u64 = 0x5500_0000_2000;

    /// Steps, each a nanosecond after the one before.
    #[derive(Default)]
    struct Play {
        loads: Loads,
        at_ns: u64,
        done: Vec<Done>,
    }

    impl Play {
        fn header(&mut self) -> RecordHeader {
            self.at_ns += 1;
            RecordHeader {
                at_ns: self.at_ns,
                ..RecordHeader::new_zeroed()
            }
        }

        fn begin(&mut self, kind: SiteKind, stack_pointer: u64) -> &mut Self {
            let mark = Mark {
                header: self.header(),
                stack_pointer,
                arguments: [0x10, 0, 0x20, MODULE],
                ..Mark::new_zeroed()
            };
            self.done.extend(self.loads.begin(kind, TID, &mark));
            self
        }

        fn end(&mut self, kind: SiteKind, stack_pointer: u64) -> &mut Self {
            let end = MarkEnd {
                header: self.header(),
                stack_pointer,
                second_result: MODULE,
                ..MarkEnd::new_zeroed()
            };
            self.done.extend(self.loads.end(kind, TID, &end));
            self
        }

        fn publish(&mut self) -> &mut Self {
            self.begin(SiteKind::Publish, 0x700);
            self.loads.published(TID, TEXT, false);
            self.end(SiteKind::Publish, 0x700)
        }

        fn load(&mut self) -> &mut Self {
            self.begin(SiteKind::LoadCode, 0x800)
                .publish()
                .end(SiteKind::LoadCode, 0x800)
        }

        fn assemble(&mut self) -> &mut Self {
            self.begin(SiteKind::Assemble, 0x800)
                .begin(SiteKind::MakeModule, 0x600)
                .end(SiteKind::MakeModule, 0x600)
                .end(SiteKind::Assemble, 0x800)
        }

        fn phases(&mut self) -> Vec<(PhaseKind, u64, u64)> {
            let done = std::mem::take(&mut self.done);
            done.iter()
                .map(|done| (done.kind, done.start_ns, done.end_ns))
                .collect()
        }
    }

    use PhaseKind::{Compile, Deserialize, Instantiate, Publish, Read};

    #[test]
    fn a_load_is_the_same_whatever_was_inlined_around_its_steps() {
        let mut play = Play::default();
        play.begin(SiteKind::Deserialize, 0x900)
            .load()
            .assemble()
            .end(SiteKind::Deserialize, 0x900);
        assert_eq!(play.phases(), [(Read, 1, 2), (Deserialize, 2, 10), (Publish, 3, 4)]);
        let mut play = Play::default();
        play.begin(SiteKind::ReadCode, 0x900)
            .end(SiteKind::ReadCode, 0x900)
            .load()
            .assemble();
        assert_eq!(play.phases(), [(Read, 1, 3), (Deserialize, 3, 10), (Publish, 4, 5)]);
    }

    #[test]
    fn a_compilation_that_a_cache_answers_is_none() {
        let mut play = Play::default();
        play.begin(SiteKind::Compile, 0x900)
            .load()
            .assemble()
            .end(SiteKind::Compile, 0x900);
        assert_eq!(play.phases(), [(Read, 1, 2), (Deserialize, 2, 10), (Publish, 3, 4)]);
        play.begin(SiteKind::Compile, 0x900)
            .publish()
            .assemble()
            .end(SiteKind::Compile, 0x900);
        assert_eq!(play.phases(), [(Compile, 11, 18), (Publish, 12, 13)]);
    }

    #[test]
    fn what_publishes_nothing_is_no_load() {
        let mut play = Play::default();
        play.begin(SiteKind::Compile, 0x900)
            .end(SiteKind::Compile, 0x900)
            .assemble();
        assert_eq!(play.phases(), []);
    }

    #[test]
    fn only_what_a_store_was_told_of_twice_is_an_instance_of_it() {
        let mut play = Play::default();
        play.begin(SiteKind::Compile, 0x900)
            .publish()
            .assemble()
            .end(SiteKind::Compile, 0x900);
        play.phases();
        for _ in 0..2 {
            // Imports do not match; then the host makes a memory.
            play.begin(SiteKind::RegisterModule, 0x900)
                .begin(SiteKind::MakeInstance, 0x880)
                .end(SiteKind::MakeInstance, 0x880);
            assert_eq!(play.phases(), []);
        }
        let begun = play.at_ns + 1;
        play.begin(SiteKind::RegisterModule, 0x900)
            .begin(SiteKind::RegisterModule, 0x900)
            .begin(SiteKind::MakeInstance, 0x880)
            .end(SiteKind::MakeInstance, 0x880);
        assert_eq!(
            play.done[0].key,
            Some(ModuleKey {
                text: TEXT.start,
                index: 0
            })
        );
        assert!(play.done[0].is_first);
        assert_eq!(play.phases(), [(Instantiate, begun, begun + 3)]);
    }

    #[test]
    fn what_an_instance_runs_at_its_start_is_not_its_first_call() {
        let mut play = Play::default();
        play.begin(SiteKind::Compile, 0x900)
            .publish()
            .assemble()
            .end(SiteKind::Compile, 0x900);
        play.begin(SiteKind::StartInstance, 0x900);
        play.loads.swapped(TID, 0x800);
        assert_eq!(play.loads.first_call(0x800, TEXT.start + 8), None);
        play.end(SiteKind::StartInstance, 0x900);
        assert_eq!(play.loads.first_call(0x800, TEXT.end), None);
        assert_eq!(play.loads.first_call(0x800, TEXT.start + 8), Some(TEXT.start));
        assert_eq!(play.loads.first_call(0x800, TEXT.start + 8), None);
    }

    #[test]
    fn losses_make_modules_unknown_rather_than_wrong() {
        let mut play = Play::default();
        play.begin(SiteKind::Compile, 0x900)
            .publish()
            .assemble()
            .end(SiteKind::Compile, 0x900);
        play.loads.forget();
        play.done.clear();
        play.begin(SiteKind::RegisterModule, 0x900)
            .begin(SiteKind::RegisterModule, 0x900)
            .begin(SiteKind::MakeInstance, 0x880)
            .end(SiteKind::MakeInstance, 0x880);
        assert_eq!((play.done[0].key, play.done[0].is_first), (None, false));
    }
}
