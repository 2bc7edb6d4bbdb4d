//! Attributes of what guests call the runtime for.

use opentelemetry::KeyValue;

use crate::span::Growth;

/// Sizes are in the unit of the instruction (pages, elements), those of memories in bytes as well.
pub(super) fn growth_attributes(prefix: &str, growth: &Growth) -> Vec<KeyValue> {
    let unit = if growth.page_bytes.is_some() {
        "pages"
    } else {
        "elements"
    };
    let bytes = |size: fn(&Growth) -> Option<u64>| growth.page_bytes.and_then(|_| size(growth));
    let sizes = [
        (format!("delta_{unit}"), Some(growth.delta)),
        (format!("old_{unit}"), growth.old),
        (format!("new_{unit}"), growth.new),
        (format!("maximum_{unit}"), growth.maximum),
        ("old_bytes".to_owned(), bytes(Growth::old_bytes)),
        ("new_bytes".to_owned(), bytes(Growth::new_bytes)),
        ("maximum_bytes".to_owned(), bytes(Growth::maximum_bytes)),
        ("index".to_owned(), Some(u64::from(growth.index))),
    ];
    let mut attributes: Vec<KeyValue> = sizes
        .into_iter()
        .filter_map(|(key, size)| {
            let size = i64::try_from(size?).unwrap_or(i64::MAX);
            Some(KeyValue::new(format!("{prefix}.{key}"), size))
        })
        .collect();
    let instance = i64::try_from(growth.instance).unwrap_or(i64::MAX);
    attributes.push(KeyValue::new("wasm.instance.number", instance));
    attributes.extend(wasm_offset("wasm.instruction.offset", growth.wasm_offset));
    attributes
}

/// Where in a wasm binary something happened.
pub(super) fn wasm_offset(key: &'static str, offset: Option<u32>) -> Option<KeyValue> {
    offset.map(|offset| KeyValue::new(key, i64::from(offset)))
}
