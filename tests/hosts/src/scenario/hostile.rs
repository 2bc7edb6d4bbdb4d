//! `hostile`: guests whose every name is an attack on whatever prints it.
//!
//! Text of the WebAssembly format cannot hold all of these, so the modules are encoded byte by byte.

use wasm_encoder::{
    CodeSection, CustomSection, Encode as _, EntityType, ExportKind, ExportSection, Function, FunctionSection,
    ImportSection, Instruction, Module as Encoder, TypeSection,
};
use wasmtime::{Linker, Module, Result};

use super::{Guests, Scenario, Setup, TaskFuture};
use crate::counts::HostCall;
use crate::options::Options;
use crate::session::{Session, State};
use crate::syscalls::Syscalls;

pub(super) const SCENARIO: Scenario = Scenario {
    name: "hostile",
    about: "modules, functions, exports and imports with names made to break diagrams, labels and terminals",
    guests: |engine| {
        Ok(Guests::from(vec![
            Module::new(engine, hostile_module())?,
            Module::new(engine, garbled_module())?,
        ]))
    },
    link,
    task,
    heartbeat: None,
    max_tasks: u16::MAX,
};

/// What the module itself is called.
const MODULE_NAME: &str = "pack\"et\nend\n%%{init: {\"theme\": \"dark\"}}%%<b>\u{202e}";

/// Names that WebAssembly allows, all different. Each is used for an import module, an import field, an export and a
/// function.
fn names() -> Vec<String> {
    let mut names: Vec<String> = [
        "",
        " ",
        "end",
        "loop 9\u{d7} forged",
        "participant X as kernel",
        "Note over H,K: forged",
        "A-->>B: forged",
        "a->>b: x; c->>d: y",
        ";",
        "%%{init: {\"theme\": \"forest\"}}%%",
        "%% comment",
        "#quot;#59;#35;",
        "quotes \" ' ` \u{201c}",
        "back\\slash\\n\\",
        "line\nbreak\r\nand\ttab",
        "next\u{85}line\u{2028}separator",
        "<img src=x onerror=alert(1)>&lt;br/>",
        "{label=\"a\",le=\"+Inf\"} 1",
        "x\"} 1\n# EOF\nforged_total 7",
        "host.write",
        "wasm[0]::function[1]::forged",
        "../../etc/passwd",
        "%s%n%p{}{0}$(id)`id`",
        "\u{1b}[31mred\u{1b}[0m\u{1b}]0;title\u{7}",
        "nul\0byte",
        "control\u{1}\u{8}\u{7f}\u{9b}",
        "\u{202e}gnp.exe\u{202c}\u{2066}\u{5d0}\u{5d1}",
        "zero\u{200b}width\u{feff}",
        "e\u{301}\u{301}\u{301}\u{1f600}\u{1f1f8}\u{1f1ea}",
    ]
    .map(str::to_owned)
    .into();
    names.push("x".repeat(10_000));
    names.push("A-->>B: long\n".repeat(800));
    names.push("\u{1f600}".repeat(2_500));
    names
}

/// The import module and field that the export at `index` calls.
fn import(names: &[String], index: usize) -> (&str, &str) {
    (&names[index], &names[(index + 1) % names.len()])
}

/// A guest with every name in every place.
fn hostile_module() -> Vec<u8> {
    let names = names();
    let imports: Vec<_> = (0..names.len()).map(|index| import(&names, index)).collect();
    let exports: Vec<_> = names.iter().map(String::as_str).collect();
    let helpers: Vec<_> = names.iter().map(String::as_bytes).collect();
    encode(
        MODULE_NAME.as_bytes(),
        &imports,
        &helpers,
        &exports,
        b"not UTF-8 \xff\xc3\x28 \xf0\x9f",
    )
}

/// One call, in a module whose own name is not UTF-8, so that the runtime drops all of its names.
fn garbled_module() -> Vec<u8> {
    encode(
        b"\xff\xfe not UTF-8",
        &[("garbled", "write")],
        &[b"never seen"],
        &["go"],
        b"never seen either",
    )
}

/// A module in which each of `exports` calls a function, called as in `helpers`, which calls the import of the same
/// position in `imports`. No function has parameters or results. The name of the first export in the name section is
/// `last_name`; the others have none.
fn encode(
    module_name: &[u8],
    imports: &[(&str, &str)],
    helpers: &[&[u8]],
    exports: &[&str],
    last_name: &[u8],
) -> Vec<u8> {
    let count = imports.len() as u32;
    let mut types = TypeSection::new();
    types.ty().function([], []);
    let mut import_section = ImportSection::new();
    for (module, field) in imports {
        import_section.import(module, field, EntityType::Function(0));
    }
    let mut function_section = FunctionSection::new();
    let mut code = CodeSection::new();
    for callee in 0..2 * count {
        function_section.function(0);
        let mut function = Function::new([]);
        function
            .instruction(&Instruction::Call(callee))
            .instruction(&Instruction::End);
        code.function(&function);
    }
    let mut export_section = ExportSection::new();
    for (name, index) in exports.iter().zip(2 * count..) {
        export_section.export(name, ExportKind::Func, index);
    }
    let mut function_names: Vec<(u32, &[u8])> = (count..).zip(helpers.iter().copied()).collect();
    function_names.push((2 * count, last_name));
    let name_section = name_section(module_name, &function_names);
    let name_section = CustomSection {
        name: "name".into(),
        data: name_section.into(),
    };

    let mut module = Encoder::new();
    module
        .section(&types)
        .section(&import_section)
        .section(&function_section)
        .section(&export_section)
        .section(&code);
    module.section(&name_section);
    module.finish()
}

/// The contents of a name section, in which names may be any bytes.
fn name_section(module_name: &[u8], functions: &[(u32, &[u8])]) -> Vec<u8> {
    const MODULE: u8 = 0;
    const FUNCTIONS: u8 = 1;
    let mut module = Vec::new();
    module_name.encode(&mut module);

    let mut function_map = Vec::new();
    functions.len().encode(&mut function_map);
    for (index, name) in functions {
        index.encode(&mut function_map);
        name.encode(&mut function_map);
    }

    let mut section = vec![MODULE];
    module.encode(&mut section);
    section.push(FUNCTIONS);
    function_map.encode(&mut section);
    section
}

fn task<'a>(session: &'a mut Session, options: &'a Options) -> TaskFuture<'a> {
    Box::pin(async move {
        let names = names();
        for _ in 0..u64::from(options.calls) * u64::from(options.repeat) {
            for name in &names {
                session.call::<(), ()>(0, name, ()).await??;
            }
            session.call::<(), ()>(1, "go", ()).await??;
        }
        Ok(())
    })
}

fn link(linker: &mut Linker<State>, setup: &Setup) -> Result<()> {
    let names = names();
    for index in 0..names.len() {
        let (module, field) = import(&names, index);
        link_write(linker, setup, module, field)?;
    }
    link_write(linker, setup, "garbled", "write")
}

/// `module.field()`: one `write`.
fn link_write(linker: &mut Linker<State>, setup: &Setup, module: &str, field: &str) -> Result<()> {
    let call = HostCall::new(&setup.counts, module, field);
    let syscalls = Syscalls::of(&call);
    let output = setup.output.clone();
    linker.func_wrap(module, field, move || -> Result<()> {
        call.enter();
        syscalls.write(&*output, b"hostile\n")?;
        Ok(())
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_is_there_twice() {
        let mut names = names();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn the_name_section_holds_bytes_that_are_not_utf8() {
        let module = hostile_module();
        assert!(module.windows(2).any(|window| window == b"\xff\xc3"));
        assert!(std::str::from_utf8(&module).is_err());
    }
}
