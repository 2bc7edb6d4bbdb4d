//! Documentation that is made of the code is current.

use std::fs;

use wasmscope::metrics::reference;
use wasmscope_tests::environment;

#[test]
fn the_metrics_reference_is_that_of_the_code() {
    let path = environment::tests_directory().join("../docs/metrics.md");
    let page = reference::markdown();
    // `cargo xtask docs` sets it.
    if std::env::var_os("WASMSCOPE_UPDATE").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &page).unwrap();
    }
    assert!(
        fs::read_to_string(&path).unwrap_or_default() == page,
        "docs/metrics.md is not current: cargo xtask docs"
    );
}
