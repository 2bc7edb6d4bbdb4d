//! Where in an x86-64 function to put uprobes for its end that cost a tenth of one on its `ret`: at instructions that the
//! kernel emulates and that every call passes exactly once.
//!
//! A function ends in a stretch without calls, which is entered once and not left again. Each edge into it gets a *gate*: a
//! conditional jump is one under its own condition, which the probe evaluates; after a call it is the first jump on the way,
//! or the gates of the function called if nothing but tear-down follows, or whatever instruction comes next.

use iced_x86::{Code, ConditionCode, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};

use std::cell::Cell;

use wasmscope_common::MAX_FRAME_BYTES;

use super::prologue::{decode, is_emulated, is_write, target_inside};

/// Longest function looked at, bytes.
const MAX_CODE_BYTES: usize = 16 << 10;
/// Calls followed from a function into the one that does its work.
const MAX_DEPTH: u32 = 3;
/// Functions looked at for the gates of one.
const MAX_FUNCTIONS: u32 = 32;

/// A place for a probe on the end of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gate {
    /// Virtual address in the file's own numbering.
    pub address: u64,
    /// The kernel emulates the instruction.
    pub emulated: bool,
    /// The function ends here only if this x86 condition (low four bits of the opcode of its conditional jump) holds.
    pub condition: Option<u8>,
    /// The function's result at the gate.
    pub result: GateResult,
    /// Stack pointer at the entry of the function minus that at the gate, bytes; a multiple of 8.
    pub frame_bytes: u32,
}

/// What a function that returns a truth value is about to return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateResult {
    /// It is in `al`.
    Register,
    /// Every path from here on returns this.
    Constant(bool),
}

/// Finds the gates of the function at `address`. `read` gives the code of the function that begins at an address, if it is
/// known. `None` if that cannot be done for every way out, or if none of them is cheap.
pub fn gates(address: u64, read: &dyn Fn(u64) -> Option<Vec<u8>>) -> Option<Vec<Gate>> {
    let found = gates_of(address, read, 0, &Cell::new(MAX_FUNCTIONS))?;
    found.iter().any(|gate| gate.emulated).then_some(found)
}

fn gates_of(address: u64, read: &dyn Fn(u64) -> Option<Vec<u8>>, depth: u32, budget: &Cell<u32>) -> Option<Vec<Gate>> {
    budget.set(budget.get().checked_sub(1)?);
    let code = read(address)?;
    let flow = Flow::read(&code, address)?;
    let mut gates = Vec::new();
    for (from, to) in flow.edges() {
        let Some(from) = from else {
            gates.push(flow.gate(flow.first_cheap(to), None)?);
            continue;
        };
        if let Some(condition) = flow.condition(from, to) {
            gates.push(flow.gate_before(from, to, Some(condition))?);
            continue;
        }
        let is_own_way = flow.arrivals[to] == 1;
        let cheap = flow.first_cheap(to);
        if is_own_way && flow.steps[cheap].emulated {
            gates.push(flow.gate(cheap, None)?);
        } else if let Some(inner) = flow.gates_of_callee(from, to, read, depth, budget) {
            gates.extend(inner);
        } else if is_own_way {
            gates.push(flow.gate(to, None)?);
        } else {
            // The last call itself: its time is missing, so only where a failed function clears up.
            let gate = flow.gate_before(from, to, None)?;
            gates.push(Some(gate).filter(|gate| gate.result == GateResult::Constant(false))?);
        }
    }
    Some(gates)
}

/// One instruction and where it leads.
#[derive(Debug)]
struct Step {
    offset: usize,
    instruction: Instruction,
    emulated: bool,
    is_call: bool,
    is_return: bool,
    successors: Vec<usize>,
}

/// What is known of whether general registers are zero, and which of them the flags tell it of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Facts {
    is_zero: [Option<bool>; 16],
    tested: Option<usize>,
    /// What is known of the result's lowest bit, if something has been written there.
    result: Written,
}

/// What is written into the result register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Written {
    #[default]
    Nothing,
    Constant(bool),
    Unknown,
}

/// The control flow of a function.
struct Flow {
    address: u64,
    steps: Vec<Step>,
    /// Stack pointer before each step minus that at the function's entry; `None` where the entry does not lead.
    stack: Vec<Option<i64>>,
    /// What is known before each step.
    facts: Vec<Facts>,
    /// Whether a `ret` can be reached.
    returns: Vec<bool>,
    /// Whether no call comes from here on.
    is_clean: Vec<bool>,
    /// Edges that lead to each step from steps that the entry leads to.
    arrivals: Vec<usize>,
}

impl Flow {
    fn read(code: &[u8], address: u64) -> Option<Self> {
        if code.is_empty() || code.len() > MAX_CODE_BYTES {
            return None;
        }
        let mut number_at = vec![usize::MAX; code.len()];
        let mut steps = Vec::new();
        for instruction in decode(code, address) {
            let offset = usize::try_from(instruction.ip() - address).ok()?;
            if instruction.is_invalid() {
                return None;
            }
            number_at[offset] = steps.len();
            let flow = instruction.flow_control();
            steps.push(Step {
                offset,
                emulated: is_emulated(&instruction, code, offset as u64),
                is_call: matches!(flow, FlowControl::Call | FlowControl::IndirectCall),
                is_return: flow == FlowControl::Return,
                instruction,
                successors: Vec::new(),
            });
        }
        let count = steps.len();
        for (number, step) in steps.iter_mut().enumerate() {
            let next = Some(number + 1).filter(|next| *next < count);
            let inside = |step: &Step| {
                let number = number_at[target_inside(&step.instruction, code, address)?];
                (number != usize::MAX).then_some(number)
            };
            step.successors = match step.instruction.flow_control() {
                // Code that goes on beyond what there is of it is not all of the function.
                FlowControl::Next => vec![next?],
                FlowControl::Call | FlowControl::IndirectCall => next.into_iter().collect(),
                FlowControl::Return | FlowControl::Exception | FlowControl::Interrupt => Vec::new(),
                FlowControl::UnconditionalBranch => vec![inside(step)?],
                FlowControl::ConditionalBranch => vec![inside(step)?, next?],
                // Where it leads is not known.
                FlowControl::IndirectBranch | FlowControl::XbeginXabortXend => return None,
            };
        }
        let stack = stack_distances(&steps)?;
        let returns = fixpoint(&steps, false, |step, known| {
            step.is_return || step.successors.iter().any(|next| known[*next])
        });
        let is_clean = fixpoint(&steps, true, |step, known| {
            !step.is_call && step.successors.iter().all(|next| known[*next] || !returns[*next])
        });
        let mut arrivals = vec![0; steps.len()];
        for (number, step) in steps.iter().enumerate() {
            if stack[number].is_some() {
                step.successors.iter().for_each(|next| arrivals[*next] += 1);
            }
        }
        Some(Self {
            address,
            facts: facts(&steps),
            steps,
            stack,
            returns,
            is_clean,
            arrivals,
        })
    }

    /// Those of a step's successors from which the function can return.
    fn next(&self, number: usize) -> impl Iterator<Item = usize> + '_ {
        self.steps[number]
            .successors
            .iter()
            .copied()
            .filter(|next| self.returns[*next])
    }

    /// Edges into the last stretch; from nowhere if the function makes no calls.
    fn edges(&self) -> Vec<(Option<usize>, usize)> {
        if self.is_clean[0] && self.returns[0] {
            return vec![(None, 0)];
        }
        (0..self.steps.len())
            .filter(|number| self.stack[*number].is_some() && self.returns[*number] && !self.is_clean[*number])
            .flat_map(|number| self.next(number).map(move |next| (Some(number), next)))
            .filter(|(_, next)| self.is_clean[*next])
            .collect()
    }

    /// The condition under which a conditional jump takes the edge to `to`.
    fn condition(&self, from: usize, to: usize) -> Option<u8> {
        let step = &self.steps[from];
        let [taken, passed] = step.successors[..] else {
            return None;
        };
        let code = condition_number(step.instruction.condition_code())?;
        if taken == passed {
            return None;
        }
        Some(if to == taken { code } else { code ^ 1 })
    }

    /// The first emulated instruction from `entry` on to which nothing else leads, before the flow divides; `entry` if
    /// there is none.
    fn first_cheap(&self, entry: usize) -> usize {
        let mut at = entry;
        for _ in 0..self.steps.len() {
            if self.steps[at].emulated {
                return at;
            }
            let mut next = self.next(at);
            match (next.next(), next.next()) {
                (Some(only), None) if self.arrivals[only] == 1 => at = only,
                _ => break,
            }
        }
        entry
    }

    fn gate(&self, at: usize, condition: Option<u8>) -> Option<Gate> {
        let facts = Facts {
            result: Written::Nothing,
            ..self.facts[at]
        };
        self.make(at, condition, self.result_from(at, facts)?)
    }

    /// At `from`, for those that go on to `to`.
    fn gate_before(&self, from: usize, to: usize, condition: Option<u8>) -> Option<Gate> {
        let step = &self.steps[from];
        let facts = after(step, Some(to), self.facts[from]);
        let facts = Facts {
            result: if step.is_call {
                Written::Unknown
            } else {
                Written::Nothing
            },
            ..facts
        };
        self.make(from, condition, self.result_from(to, facts)?)
    }

    fn make(&self, at: usize, condition: Option<u8>, result: GateResult) -> Option<Gate> {
        let frame = -self.stack[at]?;
        Some(Gate {
            address: self.address + self.steps[at].offset as u64,
            emulated: self.steps[at].emulated,
            condition,
            result,
            frame_bytes: frame_bytes(frame)?,
        })
    }

    /// The gates of the function called directly at `call`, if its result is this function's and it is called from nowhere
    /// else here.
    fn gates_of_callee(
        &self,
        call: usize,
        to: usize,
        read: &dyn Fn(u64) -> Option<Vec<u8>>,
        depth: u32,
        budget: &Cell<u32>,
    ) -> Option<Vec<Gate>> {
        let step = &self.steps[call];
        if depth >= MAX_DEPTH || step.instruction.flow_control() != FlowControl::Call {
            return None;
        }
        let untouched = Facts::default();
        if self.result_from(to, untouched) != Some(GateResult::Register) {
            return None;
        }
        let callee = step.instruction.near_branch_target();
        let is_same = |step: &&Step| step.is_call && step.instruction.near_branch_target() == callee;
        if self.steps.iter().filter(is_same).count() != 1 {
            return None;
        }
        let inner = gates_of(callee, read, depth + 1, budget)?;
        // The call itself pushes the return address.
        let frame = 8 - self.stack[call]?;
        inner.iter().any(|gate| gate.emulated).then_some(())?;
        inner
            .into_iter()
            .map(|gate| {
                Some(Gate {
                    frame_bytes: frame_bytes(i64::from(gate.frame_bytes) + frame)?,
                    ..gate
                })
            })
            .collect()
    }

    /// What the function returns, from `start` on.
    fn result_from(&self, start: usize, facts: Facts) -> Option<GateResult> {
        let begin = if facts.result == Written::Unknown {
            Written::Unknown
        } else {
            Written::Nothing
        };
        let mut result = None;
        let mut visits = 0;
        let mut pending = vec![(start, Facts { result: begin, ..facts })];
        while let Some((at, before)) = pending.pop() {
            visits += 1;
            // Loops and many branches: not a tear-down.
            if visits > 512 {
                return None;
            }
            let step = &self.steps[at];
            if step.is_return {
                match result {
                    Some(known) if known != before.result => return None,
                    _ => result = Some(before.result),
                }
                continue;
            }
            pending.extend(self.next(at).map(|next| (next, after(step, Some(next), before))));
        }
        match result? {
            Written::Nothing => Some(GateResult::Register),
            Written::Constant(value) => Some(GateResult::Constant(value)),
            Written::Unknown => None,
        }
    }
}

fn frame_bytes(frame: i64) -> Option<u32> {
    let fits = frame % 8 == 0 && frame <= i64::from(MAX_FRAME_BYTES);
    u32::try_from(frame).ok().filter(|_| fits)
}

/// As in the opcodes of conditional jumps.
fn condition_number(condition: ConditionCode) -> Option<u8> {
    Some(match condition {
        ConditionCode::None => return None,
        ConditionCode::o => 0,
        ConditionCode::no => 1,
        ConditionCode::b => 2,
        ConditionCode::ae => 3,
        ConditionCode::e => 4,
        ConditionCode::ne => 5,
        ConditionCode::be => 6,
        ConditionCode::a => 7,
        ConditionCode::s => 8,
        ConditionCode::ns => 9,
        ConditionCode::p => 10,
        ConditionCode::np => 11,
        ConditionCode::l => 12,
        ConditionCode::ge => 13,
        ConditionCode::le => 14,
        ConditionCode::g => 15,
    })
}

/// Repeats `rule` on every step until nothing changes.
fn fixpoint(steps: &[Step], start: bool, rule: impl Fn(&Step, &[bool]) -> bool) -> Vec<bool> {
    let mut known = vec![start; steps.len()];
    let mut changed = true;
    while changed {
        changed = false;
        for (number, step) in steps.iter().enumerate().rev() {
            let value = rule(step, &known);
            changed |= value != known[number];
            known[number] = value;
        }
    }
    known
}

/// What is known before each step, of all paths from the entry.
fn facts(steps: &[Step]) -> Vec<Facts> {
    let mut known: Vec<Option<Facts>> = vec![None; steps.len()];
    let mut pending = vec![(0, Facts::default())];
    while let Some((number, new)) = pending.pop() {
        let merged = known[number].map_or(new, |old| old.common(new));
        // Facts only ever get fewer, so this ends.
        if known[number] == Some(merged) {
            continue;
        }
        known[number] = Some(merged);
        let step = &steps[number];
        pending.extend(
            step.successors
                .iter()
                .map(|next| (*next, after(step, Some(*next), merged))),
        );
    }
    known.into_iter().map(Option::unwrap_or_default).collect()
}

impl Facts {
    fn common(self, other: Self) -> Self {
        Self {
            is_zero: std::array::from_fn(|register| {
                self.is_zero[register].filter(|known| other.is_zero[register] == Some(*known))
            }),
            tested: self.tested.filter(|tested| other.tested == Some(*tested)),
            result: if self.result == other.result {
                self.result
            } else {
                Written::Unknown
            },
        }
    }
}

/// What is known after a step that goes on to `next`.
fn after(step: &Step, next: Option<usize>, before: Facts) -> Facts {
    let instruction = &step.instruction;
    let mut facts = before;
    if step.is_call {
        // Callee-saved registers keep their values: rbx, rsp, rbp, r12 to r15.
        for register in [0, 1, 2, 6, 7, 8, 9, 10, 11] {
            facts.is_zero[register] = None;
        }
        facts.tested = None;
        facts.result = Written::Unknown;
        return facts;
    }
    if instruction.flow_control() == FlowControl::ConditionalBranch {
        if let (Some(tested), [taken, passed]) = (facts.tested, &step.successors[..])
            && taken != passed
        {
            let is_taken = next == Some(*taken);
            match instruction.condition_code() {
                ConditionCode::e => facts.is_zero[tested] = Some(is_taken),
                ConditionCode::ne => facts.is_zero[tested] = Some(!is_taken),
                _ => {}
            }
        }
        return facts;
    }
    facts.result = match written(instruction, &before) {
        Written::Nothing => facts.result,
        other => other,
    };
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(instruction);
    for used in info.used_registers() {
        if is_write(used.access())
            && used.register().is_gpr()
            && let Some(number) = general(used.register())
        {
            facts.is_zero[number] = None;
            if facts.tested == Some(number) {
                facts.tested = None;
            }
        }
    }
    if instruction.rflags_modified() != 0 {
        facts.tested = tested_register(instruction);
    }
    facts
}

/// The register that the zero flag tells of after `test r, r` with all of its bits.
fn tested_register(instruction: &Instruction) -> Option<usize> {
    let is_test = matches!(instruction.code(), Code::Test_rm64_r64)
        && instruction.op0_kind() == OpKind::Register
        && instruction.op0_register() == instruction.op1_register();
    is_test.then(|| general(instruction.op0_register())).flatten()
}

fn general(register: Register) -> Option<usize> {
    let full = register.full_register();
    full.is_gpr64().then(|| full.number())
}

/// Follows the stack pointer from the entry on; `None` if it is moved by what is not known, or by different amounts on two
/// paths to one place.
fn stack_distances(steps: &[Step]) -> Option<Vec<Option<i64>>> {
    let mut distances = vec![None; steps.len()];
    let mut pending = vec![(0, 0i64)];
    let mut factory = InstructionInfoFactory::new();
    while let Some((number, distance)) = pending.pop() {
        match distances.get(number)? {
            Some(known) if *known != distance => return None,
            Some(_) => continue,
            None => distances[number] = Some(distance),
        }
        let step = &steps[number];
        let moved = if step.is_call || step.is_return {
            0
        } else {
            stack_change(&step.instruction, &mut factory)?
        };
        let after = distance.checked_add(moved)?;
        pending.extend(step.successors.iter().map(|next| (*next, after)));
    }
    Some(distances)
}

fn stack_change(instruction: &Instruction, factory: &mut InstructionInfoFactory) -> Option<i64> {
    if instruction.is_stack_instruction() {
        return match instruction.mnemonic() {
            Mnemonic::Push | Mnemonic::Pop => Some(i64::from(instruction.stack_pointer_increment())),
            _ => None,
        };
    }
    let is_immediate = matches!(
        instruction.code(),
        Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 | Code::Add_rm64_imm8 | Code::Add_rm64_imm32
    );
    if is_immediate && instruction.op0_kind() == OpKind::Register && instruction.op0_register() == Register::RSP {
        let amount = instruction.immediate(1) as i64;
        return if instruction.mnemonic() == Mnemonic::Sub {
            amount.checked_neg()
        } else {
            Some(amount)
        };
    }
    let info = factory.info(instruction);
    let moves_it = info
        .used_registers()
        .iter()
        .any(|used| used.register().full_register() == Register::RSP && is_write(used.access()));
    (!moves_it).then_some(0)
}

/// What an instruction writes into `al`.
fn written(instruction: &Instruction, facts: &Facts) -> Written {
    let is_result = |register: Register| register.full_register() == Register::RAX;
    let to_register = instruction.op0_kind() == OpKind::Register
        && is_result(instruction.op0_register())
        && instruction.op0_register() != Register::AH;
    if to_register {
        match instruction.code() {
            Code::Mov_r8_imm8 | Code::Mov_r32_imm32 | Code::Mov_r64_imm64 | Code::Mov_rm64_imm32 => {
                return Written::Constant(instruction.immediate(1) & 1 != 0);
            }
            Code::Xor_r32_rm32 | Code::Xor_rm32_r32 | Code::Xor_r8_rm8 | Code::Xor_rm8_r8
                if instruction.op1_kind() == OpKind::Register
                    && instruction.op0_register() == instruction.op1_register() =>
            {
                return Written::Constant(false);
            }
            Code::Sete_rm8 | Code::Setne_rm8 => {
                let is_zero = facts.tested.and_then(|tested| facts.is_zero[tested]);
                return is_zero.map_or(Written::Unknown, |is_zero| {
                    Written::Constant(is_zero == (instruction.code() == Code::Sete_rm8))
                });
            }
            _ => {}
        }
    }
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(instruction);
    let writes_it = info
        .used_registers()
        .iter()
        .any(|used| is_result(used.register()) && is_write(used.access()));
    if writes_it { Written::Unknown } else { Written::Nothing }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    const ADDRESS: u64 = 0x40_0000;

    fn find(code: &[u8]) -> Option<Vec<Gate>> {
        gates(ADDRESS, &|address| (address == ADDRESS).then(|| code.to_vec()))
    }

    #[test]
    fn each_edge_into_the_last_stretch_has_its_gate() {
        let code = [
            0x53, // 00 push rbx
            0xff, 0xd0, // 01 call rax
            0x85, 0xc0, // 03 test eax, eax
            0x74, 0x06, // 05 je 0d
            0xff, 0xd1, // 07 call rcx
            0x31, 0xc0, // 09 xor eax, eax
            0xeb, 0x02, // 0b jmp 0f
            0xb0, 0x01, // 0d mov al, 1
            0x5b, // 0f pop rbx
            0xc3, // 10 ret
        ];
        let gate = |offset, condition, result| Gate {
            address: ADDRESS + offset,
            emulated: true,
            condition,
            result,
            frame_bytes: 8,
        };
        assert_eq!(
            find(&code).expect("one gate an edge"),
            [
                gate(0x05, Some(4), GateResult::Constant(true)),
                gate(0x0b, None, GateResult::Register)
            ]
        );
    }

    #[test]
    fn what_the_branches_show_decides_the_result() {
        let code = [
            0x53, // 00 push rbx
            0xff, 0xd0, // 01 call rax
            0x48, 0x89, 0xc3, // 03 mov rbx, rax
            0x48, 0x85, 0xdb, // 06 test rbx, rbx
            0x74, 0x05, // 09 je 10
            0xe8, 0xf0, 0x0f, 0x00, 0x00, // 0b call elsewhere
            0x48, 0x85, 0xdb, // 10 test rbx, rbx
            0x0f, 0x94, 0xc0, // 13 sete al
            0x5b, // 16 pop rbx
            0xc3, // 17 ret
        ];
        let found = find(&code).expect("the shared tail needs no gate of its own");
        let seen: Vec<_> = found
            .iter()
            .map(|gate| (gate.address - ADDRESS, gate.condition, gate.result))
            .collect();
        assert_eq!(
            seen,
            [
                (0x09, Some(4), GateResult::Constant(true)),
                (0x0b, None, GateResult::Constant(false))
            ]
        );
    }

    #[test]
    fn a_tear_down_is_replaced_by_the_gates_of_the_callee() {
        let outer = [
            0x48, 0x83, 0xec, 0x48, // 00 sub rsp, 0x48
            0xe8, 0xf7, 0x0f, 0x00, 0x00, // 04 call +0x1000
            0x48, 0x83, 0xc4, 0x48, // 09 add rsp, 0x48
            0xc3, // 0d ret
        ];
        let inner = [
            0x53, // 00 push rbx
            0xff, 0xd0, // 01 call rax
            0xeb, 0x00, // 03 jmp 05
            0x5b, // 05 pop rbx
            0xc3, // 06 ret
        ];
        let functions = HashMap::from([(ADDRESS, outer.to_vec()), (ADDRESS + 0x1000, inner.to_vec())]);
        let found = gates(ADDRESS, &|address| functions.get(&address).cloned()).expect("the callee has one");
        assert_eq!(
            found,
            [Gate {
                address: ADDRESS + 0x1003,
                emulated: true,
                condition: None,
                result: GateResult::Register,
                // The outer frame, the return address, the inner push.
                frame_bytes: 0x48 + 8 + 8,
            }]
        );
    }

    #[test]
    fn a_loop_after_the_last_call_is_no_gate() {
        let code = [
            0xff, 0xd0, // 00 call rax
            0xff, 0xc9, // 02 dec ecx
            0x75, 0xfc, // 04 jne 02
            0xc3, // 06 ret
        ];
        assert_eq!(find(&code), None);
    }

    #[test]
    fn a_result_that_is_computed_after_the_gate_refuses_it() {
        let code = [
            0xff, 0xd0, // 00 call rax
            0xeb, 0x00, // 02 jmp 04
            0x0f, 0x94, 0xc0, // 04 sete al
            0xc3,
        ];
        assert_eq!(find(&code), None);
    }

    #[test]
    fn jumps_to_where_nobody_knows_refuse_it() {
        assert_eq!(find(&[0xff, 0xd0, 0xff, 0xe0]), None);
        assert_eq!(find(&[0xff, 0xd0, 0xe9, 0x00, 0x10, 0x00, 0x00]), None);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_hang(code in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            for gate in find(&code).unwrap_or_default() {
                assert!(gate.frame_bytes % 8 == 0);
            }
        }
    }
}
