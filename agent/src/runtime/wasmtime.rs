//! wasmtime, embedded in Rust programs or as `libwasmtime.so`: one function swaps the activation record, generic
//! trampolines call host functions, one function makes an error of a trap.

use wasmscope_common::{ArgumentLocation, SiteKind};

use super::{Embedding, PlannedSite, ProbePlan, RuntimeAdapter, TlsPlan};
use crate::{
    bpf::SiteProgram,
    event::Coverage,
    image::{
        Functions, HostImage, ReadAt,
        gates::{GateResult, gates},
        host::{HostFunction, HostSymbols, TlsModel, looks_like_wasmtime},
        prologue::{self, ArgLocation},
        returns::return_points,
        swap,
        unwind_table::UnwindTable,
    },
};

/// Longest function looked at; wasmtime's trampolines have a few hundred bytes.
const MAX_FUNCTION_BYTES: u64 = 16 << 10;
/// Host functions probed in one image. wasmtime's command line has 963.
const MAX_HOST_FUNCTIONS: usize = 4096;

/// Functions probed of one step of a cold start; generic ones have a copy or two.
const MAX_FUNCTIONS_PER_PHASE: usize = 16;

/// The adapter.
#[derive(Debug)]
pub struct Wasmtime;

impl RuntimeAdapter for Wasmtime {
    fn name(&self) -> &'static str {
        "wasmtime"
    }

    fn plan(&self, image: &HostImage, file: &dyn ReadAt) -> Option<ProbePlan> {
        if image.evidence().is_none() {
            // Stripped: only the runtime's messages tell.
            looks_like_wasmtime(file).ok().flatten()?;
        }
        let symbols = &image.symbols;
        let recognised = if symbols.tls_replace.is_empty() {
            let table = UnwindTable::read(file, image).ok();
            table.and_then(|table| swap::find(file, image, &table))
        } else {
            None
        };
        let mut plan = ProbePlan {
            runtime_name: self.name(),
            build_id: image.build_id.clone(),
            embedding: Embedding::of(image),
            is_stripped: !image.has_symbol_table,
            recognises_swap: recognised.is_some(),
            tls: match symbols.tls_slot.or(recognised.as_ref().map(|swap| swap.slot)) {
                Some(slot) => match slot.model {
                    TlsModel::LocalExec { thread_pointer_offset } => TlsPlan::ThreadPointer(thread_pointer_offset),
                    TlsModel::Dynamic => TlsPlan::Block(slot.block_offset as i64),
                },
                None if image.is_executable => TlsPlan::Search,
                None => TlsPlan::Unknown,
            },
            tls_number: image.tls_number.and_then(|address| image.from_first_byte(address)),
            ..ProbePlan::default()
        };
        let swaps = symbols
            .tls_replace
            .iter()
            .chain(recognised.as_ref().map(|swap| &swap.function));
        for function in swaps.clone() {
            plan.enter(SiteProgram::ActivationSwap, function, file, 1);
        }
        for function in &symbols.from_runtime_box {
            plan.enter(SiteProgram::Unwind, function, file, 0);
        }
        plan.runtime_calls(symbols, file);
        let host_functions: Vec<_> = symbols.array_call_trampolines.iter().take(MAX_HOST_FUNCTIONS).collect();
        let mut without_end = plan.host_functions(host_functions.iter().copied(), image, file);
        let component_functions: Vec<_> = symbols.cabi_entrypoints.iter().take(MAX_HOST_FUNCTIONS).collect();
        without_end += plan.host_functions(component_functions.iter().copied(), image, file);
        let has_host_functions = !host_functions.is_empty() || !component_functions.is_empty();
        plan.coverage = Coverage {
            activations: swaps.count() > 0,
            host_calls: has_host_functions,
            host_call_ends: has_host_functions && without_end == 0,
            unwinds: !symbols.from_runtime_box.is_empty(),
        };
        plan.cold_starts(symbols, file);
        plan.learns_host_functions = host_functions.is_empty() && !image.has_symbol_table;
        plan.explain(image, without_end);
        if plan.coverage.activations {
            plan.follow_helpers(symbols, file);
            plan.task_offset = super::tokio::task_offset(symbols, file);
        }
        Some(plan)
    }

    fn learnt(
        &self,
        known: Vec<PlannedSite>,
        functions: &[HostFunction],
        all: &dyn Functions,
        file: &dyn ReadAt,
    ) -> ProbePlan {
        let known_count = known.len();
        let mut plan = ProbePlan {
            runtime_name: self.name(),
            sites: known,
            ..ProbePlan::default()
        };
        let without_end = plan.host_functions(functions.iter().take(MAX_HOST_FUNCTIONS), all, file);
        plan.sites.drain(..known_count);
        plan.coverage.host_calls = !functions.is_empty();
        plan.coverage.host_call_ends = !functions.is_empty() && without_end == 0;
        plan
    }
}

/// Path of the functions that call host functions for components, as of wasmtime 41.
pub const CABI_ENTRYPOINT: &str = "wasmtime::runtime::component::func::host::HostFn::cabi_entrypoint";
/// Path of the functions that call host functions.
pub const ARRAY_CALL: &str = "wasmtime::runtime::func::HostFunc::array_call_trampoline";

impl ProbePlan {
    /// Plans what guest code calls the runtime for.
    fn runtime_calls(&mut self, symbols: &HostSymbols, file: &dyn ReadAt) {
        for (functions, kind, returns) in [
            (&symbols.memory_grow, SiteKind::MemoryGrow, true),
            (&symbols.table_grow, SiteKind::TableGrow, true),
            (&symbols.out_of_gas, SiteKind::OutOfFuel, true),
            (&symbols.new_epoch, SiteKind::EpochDeadline, true),
            (&symbols.reported_trap, SiteKind::ReportedTrap, false),
            (&symbols.raise, SiteKind::Raise, false),
        ] {
            for function in functions {
                if !self.mark(kind, function, file, returns) {
                    // What began would never end, and be taken for the cause of what comes later.
                    self.drop_mark(function);
                    self.limits
                        .push(format!("{} is not seen: its returns cannot be probed", function.path));
                }
            }
        }
    }

    fn drop_mark(&mut self, function: &HostFunction) {
        self.sites
            .retain(|site| site.program != SiteProgram::Mark || site.file_offset != function.file_offset);
    }

    /// Plans begin and end of host calls; returns for how many functions there is no end.
    fn host_functions<'a>(
        &mut self,
        functions: impl IntoIterator<Item = &'a HostFunction>,
        all: &dyn Functions,
        file: &dyn ReadAt,
    ) -> usize {
        let mut without_end = 0;
        for function in functions {
            if function.path.contains("::component::") {
                self.enter_from_component(function, file);
            } else {
                self.enter(SiteProgram::HostCall, function, file, 2);
            }
            if !self.leave_through_gates(function, all, file)
                && !self.leave(SiteProgram::HostCallEnd, SiteKind::Plain, function, file)
            {
                without_end += 1;
            }
        }
        without_end
    }

    /// Plans the cheapest entry probe of a function at which its first `argument_count` arguments are known.
    fn enter(&mut self, program: SiteProgram, function: &HostFunction, file: &dyn ReadAt, argument_count: usize) {
        let code = read_code(function, file);
        // The swap program takes its argument from its register, so only the first instruction will do for it.
        let point = if program == SiteProgram::ActivationSwap {
            prologue::ProbePoint {
                offset: 0,
                emulated: prologue::entry_point(&code, function.address, [true, false, false, false]).offset == 0,
                args: [ArgLocation::Lost; prologue::ARGUMENT_COUNT],
                sp_delta: 0,
            }
        } else {
            let needed = std::array::from_fn(|index| index < argument_count);
            prologue::entry_point(&code, function.address, needed)
        };
        self.sites.push(PlannedSite {
            program,
            kind: SiteKind::Plain,
            file_offset: function.file_offset + u64::from(point.offset),
            arguments: [location(point.args[0]), location(point.args[1])],
            frame_bytes: point.sp_delta.unsigned_abs(),
            condition: None,
            emulated: point.emulated,
            function: function.path,
        });
    }

    /// Plans the cheapest entry probe of a host function for components: its identity is its second argument, and the return
    /// address, which lies in the trampoline of the lowered import, says what it is called.
    fn enter_from_component(&mut self, function: &HostFunction, file: &dyn ReadAt) {
        let code = read_code(function, file);
        let point = prologue::entry_point(&code, function.address, [false, true, false, false]);
        let return_address = ArgLocation::Stack {
            offset: point.sp_delta.unsigned_abs(),
        };
        self.sites.push(PlannedSite {
            program: SiteProgram::ComponentHostCall,
            kind: SiteKind::Plain,
            file_offset: function.file_offset + u64::from(point.offset),
            arguments: [location(point.args[1]), location(return_address)],
            frame_bytes: point.sp_delta.unsigned_abs(),
            condition: None,
            emulated: point.emulated,
            function: function.path,
        });
    }

    /// Plans a probe on the first instruction of a function that is called seldom, where its arguments are in their
    /// registers, and, if `with_end`, on its returns; `false` if those are wanted and not every way out is known.
    fn mark(&mut self, kind: SiteKind, function: &HostFunction, file: &dyn ReadAt, with_end: bool) -> bool {
        let code = read_code(function, file);
        let first_will_do = prologue::entry_point(&code, function.address, [true; prologue::ARGUMENT_COUNT]);
        self.sites.push(PlannedSite {
            program: SiteProgram::Mark,
            kind,
            file_offset: function.file_offset,
            arguments: [ArgumentLocation::Lost; 2],
            frame_bytes: 0,
            condition: None,
            emulated: first_will_do.emulated && first_will_do.offset == 0,
            function: function.path,
        });
        if !with_end {
            return true;
        }
        let Ok(points) = return_points(&code, function.address) else {
            return false;
        };
        // Where a function ends in a jump, its frame is gone as it is at a return, and only then does the stack pointer
        // match that of the begin. What it returns is not known there.
        let needs_result = matches!(
            kind,
            SiteKind::MakeModule
                | SiteKind::MemoryGrow
                | SiteKind::TableGrow
                | SiteKind::OutOfFuel
                | SiteKind::EpochDeadline
        );
        if needs_result && kind != SiteKind::MakeModule && !points.tail_jumps.is_empty() {
            return false;
        }
        let jumps = if needs_result {
            &[]
        } else {
            points.tail_jumps.as_slice()
        };
        let returns = points.returns.iter().map(|point| (point.probe_offset, point.emulated));
        let ends: Vec<_> = returns.chain(jumps.iter().map(|offset| (*offset, false))).collect();
        for (offset, emulated) in &ends {
            self.sites.push(PlannedSite {
                program: SiteProgram::MarkEnd,
                kind,
                file_offset: function.file_offset + u64::from(*offset),
                arguments: [ArgumentLocation::Lost; 2],
                frame_bytes: 0,
                condition: None,
                emulated: *emulated,
                function: function.path,
            });
        }
        !ends.is_empty()
    }

    /// Plans probes that every return of a host function passes and that are cheap on the usual path; `false` if there are
    /// none.
    fn leave_through_gates(&mut self, function: &HostFunction, all: &dyn Functions, file: &dyn ReadAt) -> bool {
        let read = |address| {
            let size = all.function_size(address).filter(|size| *size <= MAX_FUNCTION_BYTES)?;
            let file_offset = all.file_offset(address)?;
            Some(read_code(
                &HostFunction {
                    address,
                    size,
                    file_offset,
                    path: function.path,
                },
                file,
            ))
        };
        let Some(gates) = gates(function.address, &read) else {
            return false;
        };
        let sites: Option<Vec<_>> = gates
            .into_iter()
            .map(|gate| {
                let result = match gate.result {
                    GateResult::Register => ArgumentLocation::Register(0),
                    GateResult::Constant(value) => ArgumentLocation::Constant(value),
                };
                Some(PlannedSite {
                    program: SiteProgram::HostCallEnd,
                    kind: SiteKind::Plain,
                    file_offset: all.file_offset(gate.address)?,
                    arguments: [result, ArgumentLocation::Lost],
                    frame_bytes: gate.frame_bytes,
                    condition: gate.condition,
                    emulated: gate.emulated,
                    function: function.path,
                })
            })
            .collect();
        let Some(sites) = sites else { return false };
        // Functions that share their tail have its sites once, if their frames are alike.
        let is_taken = |site: &PlannedSite| {
            let mut planned = self.sites.iter();
            planned.any(|planned| planned.file_offset == site.file_offset && planned != site)
        };
        if sites.iter().any(is_taken) {
            return false;
        }
        for site in sites {
            if !self.sites.contains(&site) {
                self.sites.push(site);
            }
        }
        true
    }

    /// Plans a probe on every return of a function; `false` if not every way out is known.
    fn leave(&mut self, program: SiteProgram, kind: SiteKind, function: &HostFunction, file: &dyn ReadAt) -> bool {
        let code = read_code(function, file);
        let Ok(points) = return_points(&code, function.address) else {
            return false;
        };
        if points.returns.is_empty() || !points.tail_jumps.is_empty() {
            return false;
        }
        for point in points.returns {
            self.sites.push(PlannedSite {
                program,
                kind,
                file_offset: function.file_offset + u64::from(point.probe_offset),
                arguments: [ArgumentLocation::Lost; 2],
                frame_bytes: 0,
                condition: None,
                emulated: point.emulated,
                function: function.path,
            });
        }
        true
    }

    fn explain(&mut self, image: &HostImage, without_end: usize) {
        let mut limit = |words: String| self.limits.push(words);
        if !self.coverage.activations {
            let why = if image.has_symbol_table {
                "symbols not found"
            } else {
                "stripped, and the function that swaps activations is not recognised"
            };
            limit(format!(
                "{why}: invocations are seen only as far as they make syscalls or host calls"
            ));
        } else if !self.coverage.unwinds {
            limit("stripped: of invocations that fail, only traps and failing host calls are told".to_owned());
        }
        if !self.coverage.host_calls && !self.learns_host_functions {
            limit("no host call trampolines found: only host calls that make syscalls are seen".to_owned());
        }
        if self.learns_host_functions {
            limit("stripped: destructors that a host gives resources of components are not seen".to_owned());
        }
        if without_end > 0 {
            limit(format!(
                "{without_end} host functions whose returns cannot be probed: their ends are inferred"
            ));
        }
    }
}

impl ProbePlan {
    /// Plans what shows how a module comes to be ready for its first call. All of it is called seldom but for what makes
    /// an instance, which may happen per request: its sites cost three emulated hits and one single-stepped.
    fn cold_starts(&mut self, symbols: &HostSymbols, file: &dyn ReadAt) {
        let loading = &symbols.loading;
        let kinds: [(SiteKind, &[HostFunction], bool); 10] = [
            (SiteKind::Compile, &loading.compile, true),
            (SiteKind::Deserialize, &loading.deserialize, true),
            (SiteKind::ReadCode, &loading.read, true),
            (SiteKind::LoadCode, &loading.load, true),
            (SiteKind::Publish, &symbols.publish, true),
            (SiteKind::Assemble, &loading.assemble, true),
            (SiteKind::MakeModule, &loading.make_module, true),
            (SiteKind::RegisterModule, &loading.register, false),
            (SiteKind::MakeInstance, &symbols.instance_new, true),
            (SiteKind::StartInstance, &loading.start, true),
        ];
        for (kind, functions, with_end) in kinds {
            for function in functions.iter().take(MAX_FUNCTIONS_PER_PHASE) {
                if !self.mark(kind, function, file, with_end) {
                    // A begin without its end would time nothing.
                    self.drop_mark(function);
                    self.limits.push(format!(
                        "returns of {} cannot be probed: cold starts lack it",
                        function.path
                    ));
                }
            }
        }
        if symbols.publish.is_empty() {
            self.limits
                .push("cold starts are seen only as code that becomes executable".to_owned());
        } else if loading.make_module.is_empty() || loading.register.is_empty() {
            self.limits
                .push("instantiations cannot be told from each other".to_owned());
        }
    }
}

pub(super) fn read_code(function: &HostFunction, file: &dyn ReadAt) -> Vec<u8> {
    let mut code = vec![0; function.size.min(MAX_FUNCTION_BYTES) as usize];
    let mut filled = 0;
    while filled < code.len() {
        match file.read_at(function.file_offset + filled as u64, &mut code[filled..]) {
            Ok(0) | Err(_) => break,
            Ok(count) => filled += count,
        }
    }
    code.truncate(filled);
    code
}

pub(super) fn location(found: ArgLocation) -> ArgumentLocation {
    match found {
        ArgLocation::Register(number) => ArgumentLocation::Register(number),
        ArgLocation::Stack { offset } => u16::try_from(offset)
            .ok()
            .filter(|offset| offset % 8 == 0 && *offset < 0x7ff8)
            .map_or(ArgumentLocation::Lost, ArgumentLocation::Stack),
        ArgLocation::Lost => ArgumentLocation::Lost,
    }
}
