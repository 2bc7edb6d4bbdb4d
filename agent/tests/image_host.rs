//! Host files as probes see them: one made here byte by byte, and the program that runs this test.

use std::fs::{self, File};

use proptest::prelude::*;
use wasmscope::image::{
    HostImage,
    host::{Evidence, TlsModel, looks_like_wasmtime},
};

const LEGACY_REPLACE: &str = "_ZN8wasmtime7runtime2vm12traphandlers3tls3raw7replace17hed2cde8f90dd9f41E";
const V0_REPLACE: &str = "_RNvNtNtNtNtNtCs8SNA7MBpM7Z_8wasmtime7runtime2vm12traphandlers3tls3raw7replace";
const LEGACY_SLOT: &str = "_ZN8wasmtime7runtime2vm3sys4unix7std_tls3TLS29_$u7b$$u7b$constant$u7d$$u7d$28_$u7b$$u7b$closure$u7d$$u7d$23__RUST_STD_INTERNAL_VAL17h830b2e00879b887eE";
const V0_SLOT: &str =
    "_RNvNCNKNvNtNtNtNtNtCsj7FSLG1y9E8_8wasmtime7runtime2vm3sys4unix7std_tls3TLS0s_023___RUST_STD_INTERNAL_VAL";
const V0_OTHER_SLOT: &str = "_RNvNCNKNvNtNtNtNtNtCsj7FSLG1y9E8_8wasmtime7runtime2vm3sys4unix7std_tls19COMPONENT_ASYNC_TLS0s_023___RUST_STD_INTERNAL_VAL";
const V0_TRAMPOLINE: &str =
    "_RINvMs9_NtNtCsj7FSLG1y9E8_8wasmtime7runtime4funcNtB6_8HostFunc21array_call_trampolineuEB6_";
const V0_TRAMPOLINE_CLOSURE: &str =
    "_RNCINvMs9_NtNtCsj7FSLG1y9E8_8wasmtime7runtime4funcNtB6_8HostFunc21array_call_trampolineuE0B6_";

const FUNCTION: u8 = 2;
const THREAD_LOCAL: u8 = 6;
const TEXT_ADDRESS: u64 = 0x40_1000;
const TEXT_OFFSET: u64 = 0x1000;
const TLS_BYTES: u64 = 0x3c8;

/// What to put into a file.
struct Plan {
    symbols: Vec<(String, u8, u64)>,
    dynamic_symbols: Vec<(String, u8, u64)>,
    /// Entries of the dynamic section.
    dynamic: Vec<(u64, u64)>,
    read_only_data: Vec<u8>,
}

impl Plan {
    fn with_symbols(symbols: &[(&str, u8, u64)]) -> Self {
        let symbols = symbols
            .iter()
            .map(|(name, kind, value)| ((*name).to_owned(), *kind, *value))
            .collect();
        Self {
            symbols,
            dynamic_symbols: Vec::new(),
            dynamic: Vec::new(),
            read_only_data: Vec::new(),
        }
    }

    fn pie(mut self) -> Self {
        const FLAGS_1: u64 = 0x6fff_fffb;
        const PIE: u64 = 0x0800_0000;
        self.dynamic.push((FLAGS_1, PIE));
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut file = vec![0; 0x2000];
        let mut sections: Vec<[u64; 6]> = vec![[0; 6]]; // name, type, offset, size, link, entry size
        let mut names = vec![0];
        let mut add = |file: &mut Vec<u8>, name: &str, kind: u64, bytes: &[u8], link: u64, entry: u64| -> u64 {
            let name_at = names.len() as u64;
            names.extend(name.as_bytes());
            names.push(0);
            file.resize(file.len().next_multiple_of(8), 0);
            sections.push([name_at, kind, file.len() as u64, bytes.len() as u64, link, entry]);
            file.extend(bytes);
            sections.last().expect("just added")[2]
        };
        add(&mut file, ".rodata", 1, &self.read_only_data, 0, 0);
        let (strings, table) = symbol_table(&self.symbols);
        add(&mut file, ".strtab", 3, &strings, 0, 0);
        if !self.symbols.is_empty() {
            add(&mut file, ".symtab", 2, &table, 2, 24);
        }
        let strings_index = if self.symbols.is_empty() { 3 } else { 4 };
        let (strings, table) = symbol_table(&self.dynamic_symbols);
        add(&mut file, ".dynstr", 3, &strings, 0, 0);
        if !self.dynamic_symbols.is_empty() {
            add(&mut file, ".dynsym", 11, &table, strings_index, 24);
        }
        let dynamic: Vec<u8> = self
            .dynamic
            .iter()
            .flat_map(|(tag, value)| [*tag, *value])
            .flat_map(u64::to_le_bytes)
            .collect();
        let dynamic_at = add(&mut file, ".dynamic", 6, &dynamic, 0, 16);
        let note = [
            &[4u32, 4, 3].map(u32::to_le_bytes).concat()[..],
            b"GNU\0",
            &[0xde, 0xad, 0xbe, 0xef],
        ]
        .concat();
        let note_at = add(&mut file, ".note.gnu.build-id", 7, &note, 0, 0);
        let names_index = sections.len() as u16;
        let name_at = names.len() as u64;
        names.extend(b".shstrtab\0");
        sections.push([name_at, 3, file.len() as u64, names.len() as u64, 0, 0]);
        file.extend(&names);
        file.resize(file.len().next_multiple_of(8), 0);
        let sections_at = file.len() as u64;
        for [name, kind, offset, size, link, entry] in &sections {
            for (value, bytes) in [
                (*name, 4),
                (*kind, 4),
                (0, 8),
                (0, 8),
                (*offset, 8),
                (*size, 8),
                (*link, 4),
                (0, 4),
                (8, 8),
                (*entry, 8),
            ] {
                file.extend(&value.to_le_bytes()[..bytes]);
            }
        }
        let programs = [
            // type, flags, offset, address, file bytes, memory bytes, align
            [1u64, 5, TEXT_OFFSET, TEXT_ADDRESS, 0x1000, 0x1000, 0x1000],
            [7, 4, 0x1800, 0x60_0008, 0x28, TLS_BYTES, 16],
            [
                2,
                6,
                dynamic_at,
                0x70_0000,
                dynamic.len() as u64,
                dynamic.len() as u64,
                8,
            ],
            [4, 4, note_at, 0x71_0000, note.len() as u64, note.len() as u64, 4],
        ];
        let mut header = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        for (value, bytes) in [
            (3u64, 2),
            (62, 2),
            (1, 4),
            (0, 8),
            (64, 8),
            (sections_at, 8),
            (0, 4),
            (64, 2),
            (56, 2),
            (programs.len() as u64, 2),
            (64, 2),
            (sections.len() as u64, 2),
            (u64::from(names_index), 2),
        ] {
            header.extend(&value.to_le_bytes()[..bytes]);
        }
        for [kind, flags, offset, address, file_bytes, memory_bytes, align] in programs {
            header.extend(&kind.to_le_bytes()[..4]);
            header.extend(&flags.to_le_bytes()[..4]);
            header.extend(
                [offset, address, address, file_bytes, memory_bytes, align]
                    .map(u64::to_le_bytes)
                    .concat(),
            );
        }
        file[..header.len()].copy_from_slice(&header);
        file
    }
}

fn symbol_table(symbols: &[(String, u8, u64)]) -> (Vec<u8>, Vec<u8>) {
    let (mut strings, mut table) = (vec![0], vec![0; 24]);
    for (name, kind, value) in symbols {
        table.extend((strings.len() as u32).to_le_bytes());
        table.extend([*kind, 0, 1, 0]);
        table.extend(value.to_le_bytes());
        table.extend(0x40u64.to_le_bytes());
        strings.extend(name.as_bytes());
        strings.push(0);
    }
    (strings, table)
}

fn read(plan: &Plan) -> HostImage {
    HostImage::read(&plan.bytes()).expect("a valid file")
}

#[test]
fn the_activation_swap_is_found_in_both_manglings_at_its_place_in_the_file() {
    for name in [LEGACY_REPLACE, V0_REPLACE] {
        let image = read(&Plan::with_symbols(&[(name, FUNCTION, TEXT_ADDRESS + 0x120)]));
        let [function] = image.symbols.tls_replace.as_slice() else {
            panic!("{:?}", image.symbols)
        };
        assert_eq!(function.address, TEXT_ADDRESS + 0x120);
        assert_eq!(function.file_offset, TEXT_OFFSET + 0x120);
        assert_eq!(function.size, 0x40);
        assert_eq!(image.evidence(), Some(Evidence::RuntimeSymbols));
    }
}

#[test]
fn a_closure_within_a_trampoline_is_no_trampoline() {
    let image = read(&Plan::with_symbols(&[
        (V0_TRAMPOLINE, FUNCTION, TEXT_ADDRESS),
        (V0_TRAMPOLINE_CLOSURE, FUNCTION, TEXT_ADDRESS + 0x40),
    ]));
    let addresses: Vec<_> = image
        .symbols
        .array_call_trampolines
        .iter()
        .map(|function| function.address)
        .collect();
    assert_eq!(addresses, [TEXT_ADDRESS]);
}

#[test]
fn functions_folded_into_one_count_once() {
    let image = read(&Plan::with_symbols(&[
        (V0_REPLACE, FUNCTION, TEXT_ADDRESS),
        (LEGACY_REPLACE, FUNCTION, TEXT_ADDRESS),
    ]));
    assert_eq!(image.symbols.tls_replace.len(), 1);
}

#[test]
fn a_function_outside_the_file_is_not_offered() {
    let image = read(&Plan::with_symbols(&[(V0_REPLACE, FUNCTION, TEXT_ADDRESS + 0x1000)]));
    assert!(image.symbols.tls_replace.is_empty());
}

#[test]
fn where_the_switch_itself_exists_its_caller_is_left_out() {
    let naked = "_RNvNtNtCs5hI0lMML5Ef_23wasmtime_internal_fiber11stackswitch6x86_6422wasmtime_fiber_switch_";
    let caller = "_RNvNtNtCs5hI0lMML5Ef_23wasmtime_internal_fiber11stackswitch6x86_6421wasmtime_fiber_switch";
    let both = read(&Plan::with_symbols(&[
        (caller, FUNCTION, TEXT_ADDRESS),
        (naked, FUNCTION, TEXT_ADDRESS + 0x40),
    ]));
    assert_eq!(
        both.symbols.fiber_switch.iter().map(|f| f.address).collect::<Vec<_>>(),
        [TEXT_ADDRESS + 0x40]
    );
    let older = read(&Plan::with_symbols(&[(
        "wasmtime_fiber_switch_36_0_0",
        FUNCTION,
        TEXT_ADDRESS,
    )]));
    assert_eq!(older.symbols.fiber_switch.len(), 1);
}

#[test]
fn the_slot_of_an_executable_lies_below_the_thread_pointer() {
    for name in [LEGACY_SLOT, V0_SLOT] {
        let plan = Plan::with_symbols(&[(V0_OTHER_SLOT, THREAD_LOCAL, 0x30), (name, THREAD_LOCAL, 0x28)]).pie();
        let image = read(&plan);
        assert!(image.is_executable);
        let slot = image.symbols.tls_slot.expect("the slot has a symbol");
        assert_eq!(slot.block_offset, 0x28);
        // The block ends, aligned to 16, where 0x600008 + 0x3c8 rounds up to 0x6003d0: 0x3c8 after its start.
        assert_eq!(
            slot.model,
            TlsModel::LocalExec {
                thread_pointer_offset: 0x28 - 0x3c8
            }
        );
    }
}

#[test]
fn the_slot_of_a_library_is_found_through_the_vector() {
    let image = read(&Plan::with_symbols(&[(V0_SLOT, THREAD_LOCAL, 0x28)]));
    assert!(!image.is_executable);
    assert_eq!(image.symbols.tls_slot.map(|slot| slot.model), Some(TlsModel::Dynamic));
}

#[test]
fn a_slot_outside_the_thread_local_block_is_refused() {
    let image = read(&Plan::with_symbols(&[(V0_SLOT, THREAD_LOCAL, TLS_BYTES)]).pie());
    assert_eq!(image.symbols.tls_slot, None);
}

#[test]
fn the_build_id_is_read_from_its_note() {
    assert_eq!(read(&Plan::with_symbols(&[])).build_id.as_deref(), Some("deadbeef"));
}

#[test]
fn the_quick_look_finds_symbols_exports_and_messages_and_nothing_in_other_files() {
    let look = |plan: &Plan| looks_like_wasmtime(&plan.bytes()).expect("a valid file");
    assert_eq!(
        look(&Plan::with_symbols(&[(LEGACY_REPLACE, FUNCTION, TEXT_ADDRESS)])),
        Some(Evidence::RuntimeSymbols)
    );
    let mut library = Plan::with_symbols(&[]);
    library
        .dynamic_symbols
        .push(("wasmtime_store_new".to_owned(), FUNCTION, TEXT_ADDRESS));
    assert_eq!(look(&library), Some(Evidence::CApi));
    assert!(read(&library).exports_c_api);
    let mut stripped = Plan::with_symbols(&[]);
    stripped.read_only_data = vec![b' '; (1 << 20) - 10];
    // Across the border of two reads.
    stripped.read_only_data.extend(b"all fuel consumed by WebAssembly");
    assert_eq!(look(&stripped), Some(Evidence::Messages));
    assert_eq!(look(&Plan::with_symbols(&[("main", FUNCTION, TEXT_ADDRESS)])), None);
}

#[test]
fn the_running_test_is_an_executable_without_wasmtime() {
    let file = File::open("/proc/self/exe").expect("readable");
    let image = HostImage::read(&file).expect("a valid file");
    assert!(image.is_executable && image.has_symbol_table);
    assert_eq!(image.evidence(), None);
    assert!(image.tls.is_some_and(|tls| tls.memory_bytes > 0));
    let text = image
        .loads
        .iter()
        .find(|load| load.is_executable)
        .expect("there is code");
    assert_eq!(image.file_offset(text.address + 1), Some(text.file_offset + 1));
    assert_eq!(image.file_offset(u64::MAX), None);
}

#[test]
fn the_c_library_is_no_executable_although_it_can_be_run() {
    let maps = fs::read_to_string("/proc/self/maps").expect("readable");
    let path = maps
        .split_whitespace()
        .find(|word| word.contains("/libc.so"))
        .expect("dynamically linked");
    let image = HostImage::read(&File::open(path).expect("readable")).expect("a valid file");
    assert!(!image.is_executable);
}

fn whole_plan() -> Plan {
    let mut plan = Plan::with_symbols(&[
        (V0_REPLACE, FUNCTION, TEXT_ADDRESS),
        (V0_TRAMPOLINE, FUNCTION, TEXT_ADDRESS + 0x40),
        (LEGACY_SLOT, THREAD_LOCAL, 0x28),
    ])
    .pie();
    plan.dynamic_symbols
        .push(("wasmtime_store_new".to_owned(), FUNCTION, TEXT_ADDRESS));
    plan
}

#[test]
fn a_file_cut_at_any_place_does_not_panic() {
    let whole = whole_plan().bytes();
    for len in (0..whole.len()).step_by(5) {
        let part = whole[..len].to_vec();
        let _ = (HostImage::read(&part), looks_like_wasmtime(&part));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_mutated_file_does_not_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4u8), 1..8),
    ) {
        let mut file = whole_plan().bytes();
        let headers = 64 + 4 * 56;
        for (index, value, place) in changes {
            // Most bytes are padding; most changes should not be.
            let start = if place == 0 { 0 } else { 0x2000 };
            let end = if place == 0 { headers } else { file.len() };
            file[start + index.index(end - start)] = value;
        }
        let _ = (HostImage::read(&file), looks_like_wasmtime(&file));
    }
}
