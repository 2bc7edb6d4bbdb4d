//! OTLP/JSON: the spans that [`otlp`](super::otlp) sends, as lines of a file.
//!
//! Each line is one `ExportTraceServiceRequest` in the protocol's JSON mapping (lowerCamelCase keys, hex ids, 64-bit integers as strings), the form
//! that the collector's `otlpjsonfile` receiver reads.

use std::io::{self, Write};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::transform::common::tonic::ResourceAttributesWithSchema;
use opentelemetry_proto::transform::trace::tonic::group_spans_by_resource_and_scope;
use opentelemetry_sdk::trace::SpanData;

use super::spans::Converter;
use crate::clock::ClockAnchor;
use crate::span::{Process, Trace};

/// Writes traces as lines of OTLP/JSON.
#[derive(Debug)]
pub struct OtlpJsonWriter<W> {
    output: W,
    converter: Converter,
}

impl<W: Write> OtlpJsonWriter<W> {
    /// Reads `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES` and `NODE_NAME`; `output` is best buffered.
    pub fn new(output: W, anchor: ClockAnchor) -> Self {
        Self {
            output,
            converter: Converter::from_env(anchor).on_node(&std::env::var("NODE_NAME").unwrap_or_default()),
        }
    }

    /// Appends one trace. Fails as the writer fails.
    pub fn write(&mut self, trace: &Trace) -> io::Result<()> {
        let request = request(&self.converter, &trace.process, self.converter.spans(trace).spans);
        serde_json::to_writer(&mut self.output, &request)?;
        self.output.write_all(b"\n")
    }

    /// Flushes and gives the output back.
    pub fn finish(mut self) -> io::Result<W> {
        self.output.flush()?;
        Ok(self.output)
    }
}

/// The request that would carry the spans of one process.
pub(crate) fn request(converter: &Converter, process: &Process, spans: Vec<SpanData>) -> ExportTraceServiceRequest {
    let resource = ResourceAttributesWithSchema::from(&converter.resource(process));
    ExportTraceServiceRequest {
        resource_spans: group_spans_by_resource_and_scope(spans, &resource),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::sink::testing::{host_call, invoke, trace};
    use crate::span::Outcome;

    fn written() -> String {
        let mut root = invoke("handle_request", 1_000, 5_000);
        root.outcome = Outcome::Trap {
            code: "unreachable".to_owned(),
        };
        root.children = vec![host_call("fd_read", 2_000, 3_000)];
        let anchor = ClockAnchor {
            monotonic_ns: 0,
            unix_ns: 1_700_000_000_000_000_000,
        };
        let mut writer = OtlpJsonWriter::new(Vec::new(), anchor);
        writer.write(&trace(root)).unwrap();
        String::from_utf8(writer.finish().unwrap()).unwrap()
    }

    /// The rules of the protocol's "JSON Protobuf Encoding", checked on raw JSON.
    #[test]
    fn the_line_follows_the_json_mapping() {
        let line = written();
        assert_eq!(line.matches('\n').count(), 1);
        let request: Value = serde_json::from_str(&line).unwrap();
        let spans = &request["resourceSpans"][0]["scopeSpans"][0]["spans"];
        assert_eq!(spans[0]["traceId"], json!("4b".repeat(16)));
        assert_eq!(spans[0]["spanId"].as_str().unwrap().len(), 16);
        assert_eq!(spans[1]["parentSpanId"], spans[0]["spanId"]);
        assert_eq!(spans[0]["name"], json!("policy.wasm handle_request"));
        assert_eq!(spans[0]["kind"], json!(1));
        assert_eq!(spans[0]["startTimeUnixNano"], json!("1700000000000001000"));
        assert_eq!(spans[0]["endTimeUnixNano"], json!("1700000000000005000"));
        assert_eq!(
            spans[0]["status"],
            json!({"code": 2, "message": "wasm trap: unreachable"})
        );
        let attributes = spans[0]["attributes"].as_array().unwrap();
        assert!(
            attributes.contains(&json!({"key": "thread.id", "value": {"intValue": "11"}})),
            "{attributes:?}"
        );
        assert!(attributes.contains(&json!({"key": "wasmscope.role", "value": {"stringValue": "invoke"}})));
    }

    #[test]
    fn no_key_is_snake_case_and_no_value_is_null() {
        fn check(value: &Value) {
            match value {
                Value::Object(map) => map.iter().for_each(|(key, value)| {
                    assert!(!key.contains('_'), "{key}");
                    assert!(!value.is_null(), "{key} is null");
                    check(value);
                }),
                Value::Array(values) => values.iter().for_each(check),
                _ => {}
            }
        }
        check(&serde_json::from_str(&written()).unwrap());
    }
}
