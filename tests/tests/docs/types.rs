//! The types of the configuration as their source has them: fields in their order, with what is said of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use syn::{Attribute, Expr, ExprLit, Fields, GenericArgument, Item, Lit, Meta, PathArguments, Type};
use wasmscope_tests::environment;

/// A field of a structure.
#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) name: String,
    /// All of its comment, in one line.
    pub(crate) text: String,
    /// Name of its type, without what it is wrapped in.
    pub(crate) inner: String,
    /// What it is wrapped in: `Option`, `Vec`, `BTreeMap`.
    pub(crate) wrapper: Option<String>,
}

/// A structure that can be configured.
#[derive(Debug)]
pub(crate) struct Structure {
    pub(crate) text: String,
    pub(crate) fields: Vec<Field>,
}

/// Every structure of the agent that serde reads, by name.
#[derive(Debug)]
pub(crate) struct Types(BTreeMap<String, Vec<Structure>>);

impl Types {
    pub(crate) fn of_the_agent() -> Self {
        let mut types = Self(BTreeMap::new());
        types.take(&environment::tests_directory().join("../agent/src"));
        types
    }

    /// The structure of this name, if it is one.
    pub(crate) fn get(&self, name: &str) -> Option<&Structure> {
        let found = self.0.get(name)?;
        assert_eq!(found.len(), 1, "two structures are called {name}");
        found.first()
    }

    fn take(&mut self, directory: &Path) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                self.take(&path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let file = syn::parse_file(&fs::read_to_string(&path).unwrap()).unwrap();
                for item in file.items {
                    self.take_item(item);
                }
            }
        }
    }

    fn take_item(&mut self, item: Item) {
        let Item::Struct(item) = item else { return };
        let Fields::Named(fields) = &item.fields else { return };
        if !is_read_by_serde(&item.attrs) {
            return;
        }
        let fields = fields
            .named
            .iter()
            .map(|field| {
                let (wrapper, inner) = parts(&field.ty);
                Field {
                    name: field.ident.as_ref().unwrap().to_string(),
                    text: text(&field.attrs),
                    inner,
                    wrapper,
                }
            })
            .collect();
        let structure = Structure {
            text: text(&item.attrs),
            fields,
        };
        self.0.entry(item.ident.to_string()).or_default().push(structure);
    }
}

fn is_read_by_serde(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::List(list) if list.path.is_ident("derive") => {
            let mut is_read = false;
            let _ = list.parse_nested_meta(|meta| {
                is_read |= meta
                    .path
                    .segments
                    .last()
                    .is_some_and(|last| last.ident == "Deserialize");
                Ok(())
            });
            is_read
        }
        _ => false,
    })
}

fn text(attributes: &[Attribute]) -> String {
    let lines = attributes.iter().filter_map(|attribute| match &attribute.meta {
        Meta::NameValue(pair) if pair.path.is_ident("doc") => match &pair.value {
            Expr::Lit(ExprLit {
                lit: Lit::Str(line), ..
            }) => Some(line.value().trim().to_owned()),
            _ => None,
        },
        _ => None,
    });
    lines.collect::<Vec<_>>().join(" ").trim().to_owned()
}

/// What a type is wrapped in, and its name.
fn parts(of: &Type) -> (Option<String>, String) {
    let Type::Path(path) = of else {
        return (None, String::new());
    };
    let last = path.path.segments.last().unwrap();
    let name = last.ident.to_string();
    match &last.arguments {
        PathArguments::AngleBracketed(arguments) => match arguments.args.last() {
            Some(GenericArgument::Type(inner)) => (Some(name), parts(inner).1),
            _ => (None, name),
        },
        _ => (None, name),
    }
}
