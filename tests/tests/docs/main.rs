//! Documentation that is made of the code is current.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use wasmscope::metrics::reference;
use wasmscope_tests::environment;

mod configuration;
mod types;

/// Compares a page of `docs/` with what it should be; writes it where `cargo xtask docs` asks for that.
fn assert_current(name: &str, page: &str) {
    let path = environment::tests_directory().join("../docs").join(name);
    if std::env::var_os("WASMSCOPE_UPDATE").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, page).unwrap();
    }
    assert!(
        fs::read_to_string(&path).unwrap_or_default() == page,
        "docs/{name} is not current: cargo xtask docs"
    );
}

#[test]
fn the_metrics_reference_is_that_of_the_code() {
    assert_current("metrics.md", &reference::markdown());
}

/// What stands between backticks, and the lines of blocks of code; a comment at the end of such a line is not part of it.
fn code(page: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (number, part) in page.split("```").enumerate() {
        if number % 2 == 1 {
            found.extend(
                part.lines()
                    .map(|line| line.split(" #").next().unwrap_or_default().to_owned()),
            );
        } else {
            found.extend(part.split('`').skip(1).step_by(2).map(str::to_owned));
        }
    }
    found
}

#[test]
fn flags_in_the_pages_are_flags_of_the_program() {
    let help = |words: &[&str]| {
        let output = Command::new(environment::agent())
            .args(words)
            .arg("--help")
            .output()
            .unwrap();
        assert!(output.status.success(), "wasmscope {words:?} is no command");
        String::from_utf8(output.stdout).unwrap()
    };
    let flags = |text: &str| -> BTreeSet<String> {
        let words = text.split(|letter: char| !(letter.is_ascii_alphanumeric() || letter == '-'));
        words
            .filter(|word| word.len() > 2 && word.starts_with("--"))
            .map(str::to_owned)
            .collect()
    };
    let root = environment::tests_directory().join("..");
    let pages = fs::read_dir(root.join("docs"))
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut seen = 0;
    for page in pages.chain([root.join("README.md")]) {
        for command in code(&fs::read_to_string(&page).unwrap()) {
            let Some((_, rest)) = command.split_once("wasmscope ").filter(|(before, _)| {
                let before = before.trim().trim_start_matches("$ ").trim();
                matches!(before, "" | "$" | "sudo") || before.ends_with("--")
            }) else {
                continue;
            };
            let subcommand = rest.split_whitespace().next().unwrap();
            if !subcommand.bytes().all(|letter| letter.is_ascii_lowercase()) {
                continue;
            }
            // What follows two dashes alone is another program's.
            let own = rest.split(" -- ").next().unwrap();
            let known = flags(&help(&[subcommand]));
            let unknown: Vec<_> = flags(own).difference(&known).cloned().collect();
            assert!(unknown.is_empty(), "{}: `{command}`: {unknown:?}", page.display());
            seen += 1;
        }
    }
    assert!(seen > 12, "{seen} commands");
}
