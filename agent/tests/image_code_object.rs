//! Code objects that wasmtime wrote (see `fixtures/images/README.md`), against what wasmtime itself says of them.

use std::{collections::BTreeSet, fs, path::PathBuf};

use object::{Object, ObjectSymbol};
use proptest::prelude::*;
use serde_json::Value;
use wasmscope::image::{
    CodeObject, MAX_NAME_BYTES, bounded_name,
    code_object::{CodeKind, ItemKind, Symbol, SymbolSource, Unavailable, is_code_object},
};

const VERSIONS: [&str; 7] = ["24", "36", "38", "42", "43", "48", "50"];

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images")
}

fn bytes(name: &str) -> Vec<u8> {
    fs::read(folder().join(format!("{name}.cwasm"))).expect("the fixture is committed")
}

fn code_object(name: &str) -> CodeObject {
    CodeObject::read(&bytes(name)).expect("wasmtime wrote it")
}

fn what_wasmtime_says(name: &str) -> Value {
    let text = fs::read_to_string(folder().join(format!("{name}.json"))).expect("the fixture is committed");
    serde_json::from_str(&text).expect("JSON")
}

fn modules() -> impl Iterator<Item = String> {
    let everywhere = VERSIONS
        .iter()
        .flat_map(|version| ["host_calls", "nameless", "traps"].map(|stem| format!("{version}/{stem}")));
    let only_48 = [
        "hostile",
        "many_imports",
        "host_calls_no_symbols",
        "nameless_no_symbols",
        "hostile_no_symbols",
    ];
    everywhere.chain(only_48.map(|stem| format!("48/{stem}")))
}

fn components() -> impl Iterator<Item = String> {
    let with_symbols = ["36", "38", "42", "43", "46", "48", "50"].map(|version| format!("{version}/component"));
    with_symbols.into_iter().chain(["48/component_no_symbols".to_owned()])
}

fn all_images() -> impl Iterator<Item = String> {
    modules().chain(components())
}

fn kind_word(kind: ItemKind) -> &'static str {
    match kind {
        ItemKind::Function => "function",
        ItemKind::Table => "table",
        ItemKind::Memory => "memory",
        ItemKind::Global => "global",
        ItemKind::Tag => "tag",
    }
}

fn bounded(value: &Value) -> String {
    bounded_name(value.as_str().expect("a string").as_bytes()).into_owned()
}

#[test]
fn imports_and_exports_are_those_that_wasmtime_lists() {
    for name in modules() {
        let image = code_object(&name);
        let said = what_wasmtime_says(&name);
        let names = image.module(0).expect("a known version");
        let imports: Vec<_> = names
            .imports
            .iter()
            .map(|i| (i.module.to_string(), i.name.to_string(), kind_word(i.kind)))
            .collect();
        let expected: Vec<_> = said["imports"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|i| (bounded(&i[0]), bounded(&i[1]), i[2].as_str().expect("a word")))
            .collect();
        assert_eq!(imports, expected, "{name}");
        let exports: Vec<_> = names
            .exports
            .iter()
            .map(|e| (e.name.to_string(), kind_word(e.kind)))
            .collect();
        let expected: Vec<_> = said["exports"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|e| (bounded(&e[0]), e[1].as_str().expect("a word")))
            .collect();
        assert_eq!(exports, expected, "{name}");
    }
}

#[test]
fn the_name_of_a_module_is_that_of_its_name_section() {
    for name in modules().filter(|name| name.starts_with("48/")) {
        let said = what_wasmtime_says(&name);
        assert_eq!(code_object(&name).name(), said["name"].as_str(), "{name}");
    }
}

#[test]
fn imported_functions_are_counted_without_the_other_imports() {
    for version in VERSIONS {
        let image = code_object(&format!("{version}/host_calls"));
        assert_eq!(image.function_import_count(0), Some(3), "{version}");
        assert_eq!(image.import(0, 1), Some(("host", "nap")), "{version}");
        assert_eq!(
            image.import(0, 2),
            Some(("wasi_snapshot_preview1", "fd_write")),
            "{version}"
        );
        assert_eq!(image.import(0, 3), None, "{version}");
    }
    let image = code_object("48/many_imports");
    assert_eq!(image.function_import_count(0), Some(300));
    assert_eq!(image.import(0, 299), Some(("interface5", "function_299")));
}

#[test]
fn an_export_name_belongs_to_the_function_that_the_source_exports_under_it() {
    for version in VERSIONS {
        for stem in ["host_calls", "traps"] {
            let image = code_object(&format!("{version}/{stem}"));
            let mut checked = 0;
            for entry in image.symbols() {
                let Symbol::Function {
                    module_index,
                    function_index,
                    name: Some(name),
                } = entry.symbol
                else {
                    continue;
                };
                // The sources name the function exported as `x` `$exp_x`.
                let Some(export) = name.strip_prefix("exp_") else {
                    continue;
                };
                let expected = if name == "exp_memory_grow" { "grow" } else { export };
                assert_eq!(
                    image.export_name(module_index, function_index),
                    Some(expected),
                    "{version}/{stem}"
                );
                checked += 1;
            }
            assert!(checked >= 2, "{version}/{stem}");
        }
    }
}

#[test]
fn of_several_exports_of_one_function_the_first_names_it() {
    let image = code_object("48/many_imports");
    assert_eq!(image.export_name(0, 300), Some("last"));
    assert_eq!(image.export_name(0, 299), Some("reexported_import"));
    assert_eq!(image.export_name(0, 5), None);
}

#[test]
fn every_symbol_is_found_at_its_first_and_last_byte_and_says_what_the_symbol_table_says() {
    for name in all_images().filter(|name| !name.ends_with("no_symbols")) {
        let image_bytes = bytes(&name);
        let image = code_object(&name);
        assert_eq!(*image.symbol_source(), SymbolSource::SymbolTable, "{name}");
        let file = object::File::parse(&*image_bytes).expect("an ELF file");
        let mut count = 0;
        for symbol in file.symbols().filter(|symbol| symbol.size() > 0) {
            let found = image.lookup(symbol.address()).expect("the first byte is known");
            assert_eq!(
                image.lookup(symbol.address() + symbol.size() - 1),
                Some(found),
                "{name}"
            );
            assert_eq!(
                (u64::from(found.start), u64::from(found.len)),
                (symbol.address(), symbol.size()),
                "{name}"
            );
            assert_eq!(spelled(&found.symbol), symbol.name().expect("UTF-8"), "{name}");
            count += 1;
        }
        assert_eq!(image.symbols().len(), count, "{name}");
    }
}

fn spelled(symbol: &Symbol<'_>) -> String {
    match symbol {
        Symbol::Function {
            module_index,
            function_index,
            name: Some(name),
        } => {
            format!("wasm[{module_index}]::function[{function_index}]::{name}")
        }
        Symbol::Function {
            module_index,
            function_index,
            name: None,
        } => {
            format!("wasm[{module_index}]::function[{function_index}]")
        }
        Symbol::ArrayToWasm {
            module_index,
            function_index,
        } => {
            format!("wasm[{module_index}]::array_to_wasm_trampoline[{function_index}]")
        }
        Symbol::WasmToArray { signature } => format!("signatures[{signature}]::wasm_to_array_trampoline"),
        Symbol::ModuleStart {
            module_index,
            is_entry: false,
        } => format!("module_start[{module_index}]::Wasm"),
        Symbol::ModuleStart {
            module_index,
            is_entry: true,
        } => format!("module_start[{module_index}]::Array"),
        Symbol::Builtin(name) => format!("wasmtime_builtin_{name}"),
        Symbol::ComponentTrampoline(name) | Symbol::Other(name) => (*name).to_owned(),
    }
}

#[test]
fn gaps_between_functions_and_the_end_of_the_text_belong_to_nothing() {
    let image = code_object("48/host_calls");
    let leaf = image.lookup(0).expect("the first function");
    let next = image.symbols().nth(1).expect("more than one");
    assert!(leaf.start + leaf.len < next.start, "functions are aligned");
    assert_eq!(image.lookup(u64::from(leaf.start + leaf.len)), None);
    assert_eq!(image.lookup(image.text_bytes()), None);
    assert_eq!(image.lookup(u64::MAX), None);
}

#[test]
fn without_symbols_the_runtimes_own_table_says_the_same() {
    for stem in ["host_calls", "nameless", "hostile", "component"] {
        let with_symbols = code_object(&format!("48/{stem}"));
        let without_symbols = code_object(&format!("48/{stem}_no_symbols"));
        assert_eq!(*without_symbols.symbol_source(), SymbolSource::FunctionTable, "{stem}");
        assert_eq!(without_symbols.symbols().len(), with_symbols.symbols().len(), "{stem}");
        for (with, without) in with_symbols.symbols().zip(without_symbols.symbols()) {
            let start = with.start;
            assert_eq!((start, with.len), (without.start, without.len), "{stem}");
            match (with.symbol, without.symbol) {
                (
                    Symbol::Function {
                        module_index,
                        function_index,
                        name,
                    },
                    Symbol::Function {
                        module_index: module,
                        function_index: function,
                        name: full_name,
                    },
                ) => {
                    assert_eq!((module_index, function_index), (module, function), "{stem}");
                    // Symbols have at most 96 graphic characters of a name.
                    let is_plain = name.is_none_or(|name| name.len() < 96 && !name.contains('?'));
                    assert!(
                        name.is_some() == full_name.is_some() && (!is_plain || name == full_name),
                        "{stem}"
                    );
                }
                (Symbol::Builtin(_), Symbol::Builtin(_)) => {}
                (Symbol::ComponentTrampoline(_), Symbol::ComponentTrampoline(_)) => {
                    let import = |image: &CodeObject| image.lowered_import(u64::from(start)).cloned();
                    assert!(import(&with_symbols).is_some(), "{stem}");
                    assert_eq!(import(&with_symbols), import(&without_symbols), "{stem}");
                }
                (with, without) => assert_eq!(with, without, "{stem}"),
            }
        }
    }
}

#[test]
fn a_component_has_the_functions_and_imports_of_each_of_its_modules() {
    for name in ["48/component", "48/component_no_symbols"] {
        let image = code_object(name);
        assert_eq!(image.kind(), CodeKind::Component);
        let functions: BTreeSet<_> = image
            .symbols()
            .filter_map(|entry| match entry.symbol {
                Symbol::Function {
                    module_index,
                    function_index,
                    name,
                } => Some((module_index, function_index, name)),
                _ => None,
            })
            .collect();
        let expected = [(0, 0, Some("allocate")), (1, 2, Some("twice")), (1, 3, Some("exp_run"))];
        assert_eq!(functions, BTreeSet::from(expected), "{name}");
        assert_eq!(image.import(1, 0), Some(("clock", "now")), "{name}");
        assert_eq!(image.import(1, 1), Some(("clock", "log")), "{name}");
        assert_eq!(image.function_import_count(0), Some(0), "{name}");
        assert_eq!(image.export_name(1, 3), Some("run"), "{name}");
        assert_eq!(image.export_name(0, 0), Some("realloc"), "{name}");
        let trampolines = image
            .symbols()
            .filter(|e| matches!(e.symbol, Symbol::ComponentTrampoline(_)))
            .count();
        assert_eq!(trampolines, 4, "{name}");
    }
}

#[test]
fn a_trap_is_at_the_same_wasm_offset_whatever_version_compiled_it() {
    let of_version = |version: &str| -> BTreeSet<(String, u32)> {
        let image = code_object(&format!("{version}/traps"));
        (0..image.text_bytes())
            .filter_map(|offset| Some((image.trap_code(offset)?.to_owned(), image.wasm_offset(offset)?)))
            // Where the stack is checked moved with the shape of functions.
            .filter(|(code, _)| code != "stack_overflow")
            .collect()
    };
    let expected = of_version("48");
    assert!(expected.len() >= 7, "{expected:?}");
    for version in VERSIONS {
        assert_eq!(of_version(version), expected, "{version}");
    }
}

#[test]
fn declared_limits_of_memories_are_read_where_the_format_is_known() {
    for version in VERSIONS {
        let is_known = version.parse::<u32>().expect("a number") >= 46;
        for (name, memory, table, imports_growable) in [
            ("traps", Some((1, None)), Some((3, None)), false),
            // Its memory is imported.
            ("host_calls", None, Some((2, None)), true),
        ] {
            let image = code_object(&format!("{version}/{name}"));
            let limits = image.module(0).expect("names").limits.clone();
            assert_eq!(limits.is_some(), is_known, "{version}/{name}");
            let Some(limits) = limits else { continue };
            let memories = limits.memories.iter();
            let memories: Vec<_> = memories.map(|memory| (memory.minimum, memory.maximum)).collect();
            let tables: Vec<_> = limits
                .tables
                .iter()
                .map(|table| (table.minimum, table.maximum))
                .collect();
            assert_eq!(memories, Vec::from_iter(memory), "{version}/{name}");
            assert_eq!(tables, Vec::from_iter(table), "{version}/{name}");
            assert_eq!(limits.imports_growable, imports_growable, "{version}/{name}");
        }
    }
}

#[test]
fn trap_codes_are_those_that_wasmtime_decodes() {
    let mut seen = BTreeSet::new();
    for name in all_images().filter(|name| name.starts_with("48/")) {
        let image = code_object(&name);
        let said = what_wasmtime_says(&name);
        let traps = said["traps"].as_array().expect("a list");
        for trap in traps {
            let offset = trap[0].as_u64().expect("an offset");
            let expected = snake_case(trap[1].as_str().expect("a word"));
            assert_eq!(
                image.trap_code(offset),
                Some(expected.as_str()),
                "{name} at {offset:#x}"
            );
            seen.insert(expected);
        }
        let offsets: BTreeSet<_> = traps.iter().filter_map(|trap| trap[0].as_u64()).collect();
        for offset in (0..image.text_bytes()).filter(|offset| !offsets.contains(offset)) {
            assert_eq!(image.trap_code(offset), None, "{name} at {offset:#x}");
        }
    }
    assert!(seen.len() >= 7, "the fixtures have all kinds of traps: {seen:?}");
}

fn snake_case(camel: &str) -> String {
    let mut snake = String::new();
    for letter in camel.chars() {
        if letter.is_uppercase() && !snake.is_empty() {
            snake.push('_');
        }
        snake.extend(letter.to_lowercase());
    }
    snake
}

/// Without wasmtime's word for it in other versions, the machine code is the witness: `unreachable` is compiled to `ud2`.
#[test]
fn trap_codes_of_all_versions_fit_the_machine_code() {
    const UD2: [u8; 2] = [0x0f, 0x0b];
    for version in VERSIONS {
        let name = format!("{version}/traps");
        let image_bytes = bytes(&name);
        let image = code_object(&name);
        let (mut unreachable_count, mut memory_count) = (0, 0);
        for entry in image.symbols() {
            let Symbol::Function {
                name: Some(function), ..
            } = entry.symbol
            else {
                continue;
            };
            for offset in u64::from(entry.start)..u64::from(entry.start + entry.len) {
                let Some(code) = image.trap_code(offset) else { continue };
                let at = (image.text_offset() + offset) as usize;
                match (function, code) {
                    ("exp_unreachable", "unreachable_code_reached") => {
                        assert_eq!(image_bytes[at..at + 2], UD2, "{version}");
                        unreachable_count += 1;
                    }
                    ("exp_load", "memory_out_of_bounds") => memory_count += 1,
                    ("exp_divide", "integer_division_by_zero" | "integer_overflow")
                    | ("exp_convert", "bad_conversion_to_integer" | "integer_overflow")
                    | ("exp_indirect", "indirect_call_to_null" | "bad_signature" | "table_out_of_bounds")
                    | (_, "stack_overflow") => {}
                    other => panic!("{version}: {other:?}"),
                }
            }
        }
        assert_eq!((unreachable_count, memory_count), (1, 1), "{version}");
    }
}

#[test]
fn hostile_names_are_kept_as_text_and_bounded() {
    let image = code_object("48/hostile");
    assert!(image.name().is_some_and(|name| name.starts_with("evil\u{1b}[31m")));
    assert_eq!(image.import(0, 1), Some(("", "")));
    let (module, name) = image.import(0, 2).expect("the long one");
    assert!(module.len() <= MAX_NAME_BYTES && module.ends_with('…'));
    assert!(name.len() <= MAX_NAME_BYTES && name.ends_with("é…"));
    // A function that calls itself a function of another module is still the one it is.
    let fake = image.symbols().find_map(|entry| match entry.symbol {
        Symbol::Function {
            module_index,
            function_index,
            name: Some(name),
        } if name.starts_with("wasm[7]") => Some((module_index, function_index)),
        _ => None,
    });
    assert_eq!(fake, Some((0, 3)));
}

#[test]
fn an_unknown_version_has_symbols_but_no_names_and_says_why() {
    let mut image_bytes = bytes("50/host_calls");
    let at = find(&image_bytes, b"\x00\x0250") + 2;
    image_bytes[at..at + 2].copy_from_slice(b"77");
    let image = CodeObject::read(&image_bytes).expect("still an image");
    assert_eq!(image.engine_version(), "77");
    assert_eq!(
        image.module(0).err(),
        Some(Unavailable::UnknownVersion("77".to_owned()))
    );
    assert_eq!(
        image.traps_unavailable(),
        Some(&Unavailable::UnknownVersion("77".to_owned()))
    );
    assert_eq!(image.import(0, 0), None);
    assert!(matches!(
        image.lookup(0).map(|entry| entry.symbol),
        Some(Symbol::Function { name: Some("leaf"), .. })
    ));
}

#[test]
fn a_version_that_lies_about_the_layout_gives_no_names() {
    for (version, lie) in [("50", "36"), ("50", "42"), ("42", "50"), ("42", "36"), ("38", "50")] {
        let mut image_bytes = bytes(&format!("{version}/host_calls"));
        let at = find(&image_bytes, format!("\0\u{2}{version}").as_bytes()) + 2;
        image_bytes[at..at + 2].copy_from_slice(lie.as_bytes());
        let image = CodeObject::read(&image_bytes).expect("still an image");
        assert_eq!(
            image.module(0).err(),
            Some(Unavailable::Malformed),
            "{version} as {lie}"
        );
    }
}

#[test]
fn imports_that_contradict_the_symbols_are_not_believed() {
    let mut image_bytes = bytes("50/host_calls");
    // The first import becomes a memory, so that the functions would be numbered differently.
    let at = find(&image_bytes, b"\x01\x0d\x04\x00\x01\x02\x00") + 6;
    image_bytes[at] = 2;
    let image = CodeObject::read(&image_bytes).expect("still an image");
    assert_eq!(image.module(0).err(), Some(Unavailable::Malformed));
}

fn find(haystack: &[u8], needle: &[u8]) -> usize {
    haystack
        .windows(needle.len())
        .position(|window| window == needle)
        .expect("it is there")
}

#[test]
fn the_content_hash_tells_guests_apart_and_is_the_same_for_the_same_image() {
    let mut hashes = BTreeSet::new();
    for name in modules() {
        let image_bytes = bytes(&name);
        let image = code_object(&name);
        let hash = image.content_hash(&image_bytes).expect("readable");
        assert!(
            hash.len() == 12 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()),
            "{hash}"
        );
        assert_eq!(image.content_hash(&image_bytes).expect("readable"), hash);
        hashes.insert(hash);
    }
    // Symbols are no part of it: with and without them, it is the same guest.
    let without_symbols = 3;
    assert_eq!(hashes.len(), modules().count() - without_symbols);
}

#[test]
fn what_wasmtime_did_not_write_is_refused() {
    let program = fs::read("/proc/self/exe").expect("readable");
    assert!(!is_code_object(&program));
    CodeObject::read(&program).expect_err("a program is no code object");
    assert!(is_code_object(&bytes("50/traps")));
    for text in [&b""[..], b"\x7fELF", b"\0asm\x01\0\0\0"] {
        CodeObject::read(text).expect_err("too short or another format");
    }
}

/// Everything that can be asked of an image.
fn exercise(image_bytes: &Vec<u8>) {
    let Ok(image) = CodeObject::read(image_bytes) else {
        return;
    };
    for offset in (0..image.text_bytes().min(8192)).step_by(7) {
        let _ = (image.lookup(offset), image.trap_code(offset));
    }
    for module_index in 0..3 {
        for index in 0..8 {
            let _ = (
                image.import(module_index, index),
                image.export_name(module_index, index),
            );
        }
    }
    for entry in image.symbols() {
        if let Symbol::Function { name: Some(name), .. } | Symbol::Builtin(name) | Symbol::Other(name) = entry.symbol {
            assert!(name.len() <= MAX_NAME_BYTES);
        }
    }
    let _ = image.content_hash(image_bytes);
}

#[test]
fn an_image_cut_at_any_place_does_not_panic() {
    for name in ["48/host_calls", "48/component_no_symbols", "24/traps"] {
        let whole = bytes(name);
        let text_start = 0x1000;
        for len in (0..text_start).step_by(97).chain((0x2000..whole.len()).step_by(13)) {
            exercise(&whole[..len].to_vec());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_mutated_image_does_not_panic(
        image in 0..6usize,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        only_metadata: bool,
    ) {
        let names = ["48/host_calls", "48/component", "48/component_no_symbols", "24/traps", "42/host_calls", "48/hostile_no_symbols"];
        let mut image_bytes = bytes(names[image]);
        let start = if only_metadata { 0x2000 } else { 0 };
        for (index, value) in changes {
            let len = image_bytes.len() - start;
            image_bytes[start + index.index(len)] = value;
        }
        exercise(&image_bytes);
    }

    #[test]
    fn section_headers_with_wild_numbers_do_not_panic(
        section in 0..14usize, field in 0..8usize, value in prop_oneof![any::<u64>(), Just(u64::MAX), Just(1 << 40)],
    ) {
        let mut image_bytes = bytes("48/host_calls");
        let table = u64::from_le_bytes(image_bytes[0x28..0x30].try_into().expect("eight bytes")) as usize;
        let at = table + section * 64 + field * 8;
        image_bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        exercise(&image_bytes);
    }
}

#[test]
fn a_component_names_its_lowered_imports_and_lifted_exports() {
    for name in components() {
        let image = code_object(&name);
        let names = image.component().expect("its format is known");
        let lowered: Vec<_> = names
            .lowered_imports()
            .iter()
            .map(|import| (&*import.interface, &*import.function))
            .collect();
        assert_eq!(
            lowered,
            [("host:demo/clock@1.0.0", "now"), ("host:demo/clock@1.0.0", "log")],
            "{name}"
        );
        assert_eq!(names.export_name(1, 3), Some("run"), "{name}");
        assert_eq!(names.export_name(0, 0), None, "{name}");
        // Each is lowered once, for the two ways to call it.
        let functions: Vec<_> = image
            .symbols()
            .filter(|entry| matches!(entry.symbol, Symbol::ComponentTrampoline(_)))
            .map(|entry| image.lowered_import(u64::from(entry.start + entry.len - 1)))
            .map(|import| {
                import
                    .expect("all trampolines are of lowered imports")
                    .function
                    .to_string()
            })
            .collect();
        let count = |function: &str| functions.iter().filter(|known| *known == function).count();
        assert_eq!((functions.len(), count("now"), count("log")), (4, 2, 2), "{name}");
    }
}

#[test]
fn a_module_has_no_names_of_a_component() {
    assert_eq!(code_object("48/host_calls").component(), Err(Unavailable::Absent));
    assert_eq!(code_object("48/host_calls").lowered_import(0), None);
}

#[test]
fn a_component_of_a_version_that_is_not_known_has_no_names() {
    let mut bytes = bytes("48/component");
    let position = bytes.windows(4).position(|window| window == [0, 2, b'4', b'8']);
    bytes[position.expect("its version") + 2] = b'9';
    let image = CodeObject::read(&bytes).expect("it is still a code object");
    assert_eq!(image.component(), Err(Unavailable::UnknownVersion("98".to_owned())));
}

#[test]
fn a_component_tells_where_it_keeps_the_host_functions_that_it_lowers() {
    for name in components() {
        let image = code_object(&name);
        let lowerings = image.lowerings().expect("its trampolines are those of a known kind");
        // As its trampolines say when they are disassembled: the function of the first of two, and its data.
        let first = match name.split('/').next() {
            Some("36" | "38" | "50") => 0x70,
            _ => 0x80,
        };
        assert_eq!(lowerings.end(), first + 2 * 16, "{name}");
        assert_eq!(lowerings.ways().len(), 2, "{name}");
        let symbols: Vec<_> = image.symbols().collect();
        for way in lowerings.ways() {
            assert!(
                symbols
                    .iter()
                    .any(|entry| entry.start == *way && matches!(entry.symbol, Symbol::ComponentTrampoline(_)))
            );
        }
        let mut context = vec![0; lowerings.end()];
        context[first..first + 8].copy_from_slice(&0x1000_u64.to_le_bytes());
        context[first + 16..first + 24].copy_from_slice(&0x2000_u64.to_le_bytes());
        assert_eq!(lowerings.functions(&context).collect::<Vec<_>>(), [0x1000, 0x2000]);
        assert_eq!(lowerings.functions(&context[..first + 24]).count(), 1);
        assert_eq!(lowerings.functions(&context[..first]).count(), 0);
    }
    assert_eq!(code_object("48/host_calls").lowerings(), None);
}
