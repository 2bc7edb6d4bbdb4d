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

    fn context_at(self) -> usize {
        self.entry_bytes() - 8
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
    let word = |at: usize| Some(u64::from_le_bytes(*vmcontext.get(at..)?.first_chunk()?));
    let entry_bytes = layout.entry_bytes();
    let is_entry = |at: usize| -> Option<bool> {
        let context = word(at + layout.context_at())?;
        Some(is_code(word(at)?) && is_code(word(at + 8)?) && context != 0 && context % 8 == 0)
    };
    // Only where the callee is can the array be: for each place, walk back by whole entries as far as they look like some.
    let mut found: Option<usize> = None;
    let mut place = FIXED_BYTES;
    while let Some(context) = word(place + layout.context_at()) {
        let at = place;
        place += 8;
        if context != callee_vmctx || is_entry(at) != Some(true) {
            continue;
        }
        for ordinal in 0..import_count.min((at - FIXED_BYTES) / entry_bytes + 1) {
            let start = at - ordinal * entry_bytes;
            if ordinal > 0 && is_entry(start) != Some(true) {
                break;
            }
            // What was not read cannot contradict.
            let is_array = start <= MAX_ARRAY_START
                && (ordinal + 1..import_count).all(|later| is_entry(start + later * entry_bytes).unwrap_or(true));
            if !is_array {
                continue;
            }
            let is_first = (0..ordinal)
                .all(|earlier| word(start + earlier * entry_bytes + layout.context_at()) != Some(callee_vmctx));
            if !is_first {
                continue;
            }
            if found.is_some_and(|found| found != ordinal) {
                return None;
            }
            found = Some(ordinal);
        }
    }
    found.map(|ordinal| ordinal as u32)
}
