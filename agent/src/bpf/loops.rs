//! What Linux before 6.3 asks of loops, checked without it.

use aya_obj::generated::{BPF_CALL, BPF_EXIT, BPF_JA, BPF_JMP, BPF_JMP32, bpf_insn};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _, SymbolKind};

use super::load::OBJECT;

const INSTRUCTION_BYTES: usize = size_of::<bpf_insn>();

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Seen {
    #[default]
    Never,
    /// On the path to the instruction that is looked at.
    Before,
    Done,
}

/// Steps from an instruction to one before it on the path to it that are no jumps, which such kernels refuse ("back-edge"). They look at
/// instructions depth first, what comes next before what is jumped to (6.1: `check_cfg` in kernel/bpf/verifier.c).
fn refused_steps(code: &[u8]) -> Vec<(usize, usize)> {
    let instructions = code.as_chunks::<INSTRUCTION_BYTES>().0;
    let mut seen = vec![Seen::Never; instructions.len()];
    let mut refused = Vec::new();
    // With each instruction how many of the steps from it have been taken.
    let mut path = vec![(0, 0)];
    while let Some((index, taken)) = path.last_mut() {
        let index = *index;
        seen[index] = Seen::Before;
        let steps = steps_from(index, instructions[index]);
        let Some(&(to, is_jump)) = steps.get(*taken) else {
            seen[index] = Seen::Done;
            path.pop();
            continue;
        };
        *taken += 1;
        match seen[to] {
            Seen::Never => path.push((to, 0)),
            Seen::Before if !is_jump => refused.push((index, to)),
            Seen::Before | Seen::Done => {}
        }
    }
    refused
}

/// Where an instruction may go on within its function, in the order in which kernels look there, and whether it jumps.
fn steps_from(index: usize, [code, _, offset @ .., _, _, _, _]: [u8; INSTRUCTION_BYTES]) -> Vec<(usize, bool)> {
    let target = || {
        let distance = isize::from(i16::from_le_bytes(offset)) + 1;
        index.checked_add_signed(distance).unwrap()
    };
    let (class, operation) = (u32::from(code & 7), u32::from(code & 0xf0));
    match operation {
        _ if ![BPF_JMP, BPF_JMP32].contains(&class) => vec![(index + 1, false)],
        BPF_EXIT => Vec::new(),
        BPF_CALL => vec![(index + 1, false)],
        BPF_JA => {
            assert_eq!(class, BPF_JMP, "no long jumps, which came with 6.6");
            vec![(target(), true)]
        }
        _ => vec![(index + 1, true), (target(), true)],
    }
}

#[test]
fn loops_are_entered_from_above() {
    let object = object::File::parse(OBJECT).unwrap();
    let mut functions = 0;
    let mut refused = Vec::new();
    for symbol in object
        .symbols()
        .filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0)
    {
        let section = object.section_by_index(symbol.section_index().unwrap()).unwrap();
        let code = section.data_range(symbol.address(), symbol.size()).unwrap().unwrap();
        functions += 1;
        refused.extend(
            refused_steps(code)
                .iter()
                .map(|(from, to)| format!("{}: {from} to {to}", symbol.name().unwrap())),
        );
    }
    assert!(functions > 20, "{functions}");
    assert_eq!(refused, [""; 0]);
}

#[test]
fn a_loop_that_is_entered_in_its_middle_is_found() {
    // goto 2; 1: r0 += 1; 2: r0 += 1; if r0 != 9 goto 1; exit
    let code = |jump: u8| {
        [
            [0x05, 0, 1, 0, 0, 0, 0, 0],
            [0x07, 0, 0, 0, 1, 0, 0, 0],
            [0x07, 0, 0, 0, 1, 0, 0, 0],
            [0x55, 0, jump, 0xff, 9, 0, 0, 0],
            [0x95, 0, 0, 0, 0, 0, 0, 0],
        ]
        .concat()
    };
    assert_eq!(refused_steps(&code(0xfd)), [(1, 2)]);
    // From above, as to 2.
    assert_eq!(refused_steps(&code(0xfe)), []);
}
