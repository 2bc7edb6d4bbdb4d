//! Documentation that is made of the code is current.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;

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
