//! Which import a guest called: finds the host function among the imported functions of the calling instance's `VMContext`.
//!
//! The array of imported functions starts behind arrays whose lengths are not known from outside (memories), so it is found: every
//! entry of it must look like one.

/// Bytes of a `VMContext` worth reading: covers some 2,000 imports.
pub const MAX_VMCONTEXT_BYTES: usize = 64 << 10;

const MAGIC: &[u8; 4] = b"core";
/// Magic, store, builtins, epoch, collector, types: what every `VMContext` of 64-bit targets begins with.
const FIXED_BYTES: usize = 0x30;
/// Distance from the fixed part at which the array can start at most: 1,000 imported memories of 24 bytes.
const MAX_ARRAY_START: usize = FIXED_BYTES + 24_000;

/// How a version of wasmtime lays out an imported function (`VMFunctionImport`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImportLayout {
    /// `wasm_call, array_call, vmctx`; wasmtime 24 to 44.
    ThreeWords,
    /// `array_call, wasm_call, type_index, vmctx`; wasmtime 45 to 50.
    FourWords,
}

impl ImportLayout {
    /// The layout of a major version of wasmtime, if it is one whose source has been read and whose functions come after memories.
    pub fn of_major(major: u32) -> Option<Self> {
        match major {
            24..=44 => Some(Self::ThreeWords),
            45..=50 => Some(Self::FourWords),
            _ => None,
        }
    }

    fn entry_bytes(self) -> usize {
        match self {
            Self::ThreeWords => 24,
            Self::FourWords => 32,
        }
    }
}

/// Ordinal of the imported function whose context is `callee_vmctx`, of `import_count` functions that the module imports.
///
/// `vmcontext` is the calling instance's context as far as it was read (see [`MAX_VMCONTEXT_BYTES`]); `is_code` says whether an
/// address is in an executable mapping. If several imports were satisfied by the same host function, the first is meant: at run time
/// they are one function. `None` if nothing fits, or if it fits at different places with different results.
pub fn import_ordinal(
    vmcontext: &[u8],
    layout: ImportLayout,
    import_count: u32,
    callee_vmctx: u64,
    is_code: impl Fn(u64) -> bool,
) -> Option<u32> {
    let import_count = usize::try_from(import_count).ok()?;
    if !vmcontext.starts_with(MAGIC) || callee_vmctx == 0 || import_count == 0 {
        return None;
    }
    let stride = layout.entry_bytes() / 8;
    let words: Vec<u64> = vmcontext
        .as_chunks::<8>()
        .0
        .iter()
        .take(MAX_VMCONTEXT_BYTES / 8)
        .map(|word| u64::from_le_bytes(*word))
        .collect();
    let entry_count = (words.len() + 1).saturating_sub(stride);
    // For each place, from the last to the first: how many entries lie from here on, how far the callee's is, whether the read ended.
    let mut runs: Vec<Run> = Vec::with_capacity(entry_count);
    for (place, entry) in words.windows(stride).enumerate().rev() {
        let context = entry[stride - 1];
        let run = if is_code(entry[0]) && is_code(entry[1]) && context != 0 && context % 8 == 0 {
            let later = (entry_count - 1 - place).checked_sub(stride).map(|later| runs[later]);
            let later = later.unwrap_or(Run {
                len: 0,
                callee_at: None,
                is_cut: true,
            });
            let callee_at = if context == callee_vmctx {
                Some(0)
            } else {
                later.callee_at.map(|at| at + 1)
            };
            Run {
                len: later.len + 1,
                callee_at,
                is_cut: later.is_cut,
            }
        } else {
            Run::default()
        };
        runs.push(run);
    }
    runs.reverse();

    let mut found = None;
    for place in FIXED_BYTES / 8..runs.len().min(MAX_ARRAY_START / 8) {
        let run = runs[place];
        let is_whole = run.len >= import_count;
        // Where the read ended within the array, only the first of its entries can be the start.
        let is_start = || place < stride + FIXED_BYTES / 8 || runs[place - stride].len == 0;
        let is_cut_array = run.is_cut && run.len > 0 && is_start();
        if !is_whole && !is_cut_array {
            continue;
        }
        let Some(ordinal) = run.callee_at.filter(|ordinal| *ordinal < import_count) else {
            continue;
        };
        if found.is_some_and(|found| found != ordinal) {
            return None;
        }
        found = Some(ordinal);
    }
    found.map(|ordinal| ordinal as u32)
}

/// Addresses (`array_call`) of the imported functions of a calling instance, in order, as far as its context was read. The
/// arguments are those of [`import_ordinal`], and so is the care: `None` if it cannot be told where the array starts.
pub fn imported_functions(
    vmcontext: &[u8],
    layout: ImportLayout,
    import_count: u32,
    callee_vmctx: u64,
    is_code: impl Fn(u64) -> bool,
) -> Option<Vec<u64>> {
    let ordinal = import_ordinal(vmcontext, layout, import_count, callee_vmctx, &is_code)? as usize;
    let stride = layout.entry_bytes() / 8;
    let array_call = match layout {
        ImportLayout::ThreeWords => 1,
        ImportLayout::FourWords => 0,
    };
    let words: Vec<u64> = vmcontext
        .as_chunks::<8>()
        .0
        .iter()
        .take(MAX_VMCONTEXT_BYTES / 8)
        .map(|word| u64::from_le_bytes(*word))
        .collect();
    let mut found: Option<Vec<u64>> = None;
    for (place, entry) in words.windows(stride).enumerate() {
        if entry[stride - 1] != callee_vmctx || !is_code(entry[0]) || !is_code(entry[1]) {
            continue;
        }
        let Some(array) = place
            .checked_sub(ordinal * stride)
            .filter(|start| *start >= FIXED_BYTES / 8)
            .and_then(|start| words.get(start..))
        else {
            continue;
        };
        let functions: Vec<u64> = array
            .chunks_exact(stride)
            .take(import_count as usize)
            .map_while(|entry| (is_code(entry[0]) && is_code(entry[1])).then_some(entry[array_call]))
            .collect();
        let is_cut = functions.len() == array.len() / stride;
        if functions.len() < import_count as usize && !is_cut {
            continue;
        }
        // Behind the context may lie what it was made from: the same list, or its beginning where the read ended.
        match &found {
            Some(known) if known.starts_with(&functions) => {}
            Some(known) if !functions.starts_with(known) => return None,
            _ => found = Some(functions),
        }
    }
    found
}

/// What lies from a place of the context on, entry after entry.
#[derive(Clone, Copy, Default)]
struct Run {
    /// Entries.
    len: usize,
    /// Which of them is the callee's first.
    callee_at: Option<usize>,
    /// It goes on to the end of what was read.
    is_cut: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST_CODE: u64 = 0x5555_0000_1000;
    const JIT_CODE: u64 = 0x7f00_0000_2000;

    fn is_code(address: u64) -> bool {
        address == HOST_CODE || address == JIT_CODE
    }

    fn context(layout: ImportLayout, owned_memories: u64, callees: &[u64]) -> Vec<u8> {
        let mut words = vec![
            u64::from(u32::from_le_bytes(*MAGIC)),
            0x7f11_0000,
            0x7f12_0000,
            0x7f13_0000,
            0,
            0x7f14_0000,
        ];
        words.extend((0..owned_memories).map(|i| 0x7f20_0000 + i * 16));
        words.extend((0..owned_memories).flat_map(|_| [0x7f30_0000_0000, 65536]));
        for callee in callees {
            match layout {
                ImportLayout::ThreeWords => words.extend([JIT_CODE, HOST_CODE, *callee]),
                ImportLayout::FourWords => words.extend([HOST_CODE, JIT_CODE, 7, *callee]),
            }
        }
        words.extend([0x7f40_0000, 0x7f41_0000, 0, 0, 0, 0]);
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn all_imported_functions_are_listed_by_one_of_them() {
        for layout in [ImportLayout::ThreeWords, ImportLayout::FourWords] {
            let vmcontext = context(layout, 2, &[0x100, 0x200, 0x300]);
            for callee in [0x100, 0x200, 0x300] {
                let found = imported_functions(&vmcontext, layout, 3, callee, is_code);
                assert_eq!(found, Some(vec![HOST_CODE; 3]), "{layout:?} {callee:#x}");
            }
            let twice = [vmcontext.clone(), vmcontext[FIXED_BYTES..].to_vec()].concat();
            let cut = &twice[..twice.len() - 0x30 - layout.entry_bytes()];
            for bytes in [&twice[..], cut] {
                let found = imported_functions(bytes, layout, 3, 0x100, is_code);
                assert_eq!(found, Some(vec![HOST_CODE; 3]), "{layout:?}");
            }
            assert_eq!(imported_functions(&vmcontext, layout, 3, 0x400, is_code), None);
            assert_eq!(imported_functions(&vmcontext, layout, 4, 0x200, is_code), None);
        }
    }

    #[test]
    fn each_import_is_found_by_its_context_in_both_layouts() {
        for layout in [ImportLayout::ThreeWords, ImportLayout::FourWords] {
            let callees = [0x7f50_0000, 0x7f50_0040, 0x7f50_0080];
            let bytes = context(layout, 2, &callees);
            for (ordinal, callee) in callees.into_iter().enumerate() {
                assert_eq!(
                    import_ordinal(&bytes, layout, 3, callee, is_code),
                    Some(ordinal as u32),
                    "{layout:?}"
                );
            }
        }
    }

    #[test]
    fn a_context_that_is_no_import_is_not_found() {
        let bytes = context(ImportLayout::FourWords, 1, &[0x7f50_0000]);
        assert_eq!(
            import_ordinal(&bytes, ImportLayout::FourWords, 1, 0x7f50_0040, is_code),
            None
        );
    }

    #[test]
    fn of_one_host_function_imported_twice_the_first_import_is_meant() {
        let bytes = context(ImportLayout::FourWords, 1, &[0x7f50_0000, 0x7f50_0040, 0x7f50_0040]);
        assert_eq!(
            import_ordinal(&bytes, ImportLayout::FourWords, 3, 0x7f50_0040, is_code),
            Some(1)
        );
    }

    #[test]
    fn fewer_entries_than_imports_are_not_the_array() {
        let bytes = context(ImportLayout::FourWords, 1, &[0x7f50_0000, 0x7f50_0040]);
        assert_eq!(
            import_ordinal(&bytes, ImportLayout::FourWords, 3, 0x7f50_0040, is_code),
            None
        );
    }

    #[test]
    fn an_array_that_was_read_in_part_still_answers_for_that_part() {
        let callees: Vec<u64> = (0..100).map(|i| 0x7f50_0000 + i * 64).collect();
        let bytes = context(ImportLayout::FourWords, 1, &callees);
        let part = &bytes[..0x48 + 10 * 32];
        assert_eq!(
            import_ordinal(part, ImportLayout::FourWords, 100, callees[9], is_code),
            Some(9)
        );
        assert_eq!(
            import_ordinal(part, ImportLayout::FourWords, 100, callees[10], is_code),
            None
        );
    }

    #[test]
    fn a_component_context_is_refused() {
        let mut bytes = context(ImportLayout::FourWords, 1, &[0x7f50_0000]);
        bytes[..4].copy_from_slice(b"comp");
        assert_eq!(
            import_ordinal(&bytes, ImportLayout::FourWords, 1, 0x7f50_0000, is_code),
            None
        );
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(tail in proptest::collection::vec(proptest::sample::select(vec![0u8, 8, 16]), 0..2000), count: u32) {
            let mut bytes = MAGIC.to_vec();
            bytes.extend(tail);
            for layout in [ImportLayout::ThreeWords, ImportLayout::FourWords] {
                import_ordinal(&bytes, layout, count, 0x0808_0808_0808_0808, |address| address != 0);
                imported_functions(&bytes, layout, count, 0x0808_0808_0808_0808, |address| address != 0);
            }
        }
    }
}
