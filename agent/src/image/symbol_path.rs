//! Rust symbol names brought to one form: the path of a function, without hashes and generic arguments, for both manglings.

use std::fmt::{self, Write};

/// Longest demangled name considered; generic arguments can make a name of a kilobyte expand without limit.
const MAX_DEMANGLED_BYTES: usize = 64 << 10;

/// The path of a mangled Rust symbol; `None` if it is none, is too long, or carries a suffix (`.cold`) that makes it a part only.
///
/// Methods of a type are `path::Type::method`, methods of a trait `path::Trait::method` whoever implements them: the older mangling
/// writes default methods so, the newer one says `<Type as Trait>::method`.
pub(super) fn rust_path(mangled: &str) -> Option<String> {
    let demangled = rustc_demangle::try_demangle(mangled).ok()?;
    let mut text = BoundedText::default();
    write!(text, "{demangled:#}").ok()?;
    normalize(&text.0)
}

#[derive(Default)]
struct BoundedText(String);

impl Write for BoundedText {
    fn write_str(&mut self, piece: &str) -> fmt::Result {
        if self.0.len() + piece.len() > MAX_DEMANGLED_BYTES {
            return Err(fmt::Error);
        }
        self.0.push_str(piece);
        Ok(())
    }
}

/// Drops generic arguments and resolves the `<…>` that a path begins with.
fn normalize(text: &str) -> Option<String> {
    let Some(rest) = text.strip_prefix('<') else {
        return match text.split_once("::<impl ") {
            Some((_, rest)) => inherent(rest),
            None => without_generics(text),
        };
    };
    let end = matching_angle(rest)?;
    let (inner, method) = (&rest[..end], &rest[end + 1..]);
    let owner = match split_as(inner) {
        Some((_, owner)) => owner,
        None => inner,
    };
    let method = without_generics(method)?;
    // Nested `<<A as B>::C as D>` is nobody's function that is looked for; without_generics refuses it.
    Some(without_generics(owner)? + &method)
}

/// `Type>::method` of `<impl Type>::method`, which the older mangling writes where a type has methods in another module.
fn inherent(text: &str) -> Option<String> {
    let end = matching_angle(text)?;
    let (owner, method) = (&text[..end], &text[end + 1..]);
    if owner.contains(" for ") {
        return None;
    }
    Some(without_generics(owner)? + &without_generics(method)?)
}

/// Position of the `>` that closes an already opened `<`.
fn matching_angle(text: &str) -> Option<usize> {
    let mut depth = 1usize;
    let mut previous = 0;
    for (position, byte) in text.bytes().enumerate() {
        match byte {
            b'<' => depth += 1,
            b'>' if previous != b'-' => {
                depth -= 1;
                if depth == 0 {
                    return Some(position);
                }
            }
            _ => {}
        }
        previous = byte;
    }
    None
}

/// `Type as Trait`, split at the outermost ` as `.
fn split_as(text: &str) -> Option<(&str, &str)> {
    let mut depth = 0usize;
    let mut previous = 0;
    for (position, byte) in text.bytes().enumerate() {
        match byte {
            b'<' | b'(' | b'[' => depth += 1,
            b')' | b']' => depth = depth.saturating_sub(1),
            b'>' if previous != b'-' => depth = depth.saturating_sub(1),
            b' ' if depth == 0 && text[position..].starts_with(" as ") => {
                return Some((&text[..position], &text[position + 4..]));
            }
            _ => {}
        }
        previous = byte;
    }
    None
}

fn without_generics(text: &str) -> Option<String> {
    let mut path = String::with_capacity(text.len().min(256));
    let mut rest = text;
    while let Some(open) = rest.find('<') {
        let inner = &rest[open + 1..];
        // `<impl Type>` names where a method lives; a leading `<` is a type in place of a path.
        if inner.starts_with("impl ") || (open == 0 && path.is_empty()) {
            return None;
        }
        let close = matching_angle(inner)?;
        path.push_str(rest[..open].trim_end_matches("::"));
        rest = &inner[close + 1..];
    }
    path.push_str(rest);
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_manglings_of_a_plain_function_give_one_path() {
        let path = "wasmtime::runtime::vm::traphandlers::tls::raw::replace";
        let legacy = "_ZN8wasmtime7runtime2vm12traphandlers3tls3raw7replace17hed2cde8f90dd9f41E";
        let v0 = "_RNvNtNtNtNtNtCs8SNA7MBpM7Z_8wasmtime7runtime2vm12traphandlers3tls3raw7replace";
        assert_eq!(rust_path(legacy).as_deref(), Some(path));
        assert_eq!(rust_path(v0).as_deref(), Some(path));
    }

    #[test]
    fn the_suffix_of_an_internalized_symbol_is_dropped() {
        let mangled = "_ZN8wasmtime7runtime9component4func4host8HostFunc10entrypoint17h02846dea9803a357E.llvm.7764059572940539492";
        assert_eq!(
            rust_path(mangled).as_deref(),
            Some("wasmtime::runtime::component::func::host::HostFunc::entrypoint")
        );
    }

    #[test]
    fn a_part_of_a_function_is_not_the_function() {
        let mangled = "_ZN8wasmtime7runtime4trap16from_runtime_box17h9189cd955669c708E.cold";
        assert_ne!(
            rust_path(mangled).as_deref(),
            Some("wasmtime::runtime::trap::from_runtime_box")
        );
    }

    #[test]
    fn generic_arguments_are_dropped_wherever_they_stand() {
        for (text, path) in [
            ("<a::HostFunc>::call::<b::T, fn(u8) -> c::D<u8>>", "a::HostFunc::call"),
            ("<a::S<T> as b::HostFn<T>>::entry", "b::HostFn::entry"),
            ("a::Result<T>::map::<a::f<u8>>", "a::Result::map"),
            ("a::f::<u8>::{closure#0}", "a::f::{closure#0}"),
        ] {
            assert_eq!(normalize(text).as_deref(), Some(path));
        }
    }

    #[test]
    fn a_function_that_only_mentions_another_has_its_own_path() {
        let text = "core::result::Result<T, E>::maybe_catch::<<a::HostFunc>::array_call_trampoline<T>::{closure#0}>";
        assert_eq!(normalize(text).as_deref(), Some("core::result::Result::maybe_catch"));
    }

    #[test]
    fn what_is_not_rust_has_no_path() {
        assert_eq!(rust_path("wasmtime_engine_new"), None);
        assert_eq!(rust_path("_ZN3foo3barEv"), None);
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[<>a: \\-as(){}#]{0,60}", symbol in "_(R|ZN)[a-zA-Z0-9_]{0,60}") {
            normalize(&text);
            rust_path(&symbol);
        }
    }
}
