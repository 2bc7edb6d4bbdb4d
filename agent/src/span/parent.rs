//! The span of the application under which a trace hangs, as W3C Trace Context (<https://www.w3.org/TR/trace-context/>)
//! hands it on.

use serde::{Deserialize, Serialize};

use super::TraceId;

/// Longest `tracestate` kept, bytes; the recommendation says that at least this much should be handed on.
pub const MAX_TRACESTATE_BYTES: usize = 512;
/// Length of a `traceparent` of version 00, bytes.
const TRACEPARENT_BYTES: usize = 55;
/// Flags that version 00 defines: sampled, random trace id.
const KNOWN_FLAGS: u8 = 3;

/// Where a trace belongs.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Parent {
    /// The application's trace.
    pub trace_id: TraceId,
    /// The application's span, as 16 hexadecimal digits when written; never all zero.
    #[serde(with = "hexadecimal")]
    pub span_id: [u8; 8],
    /// Trace flags: 1 sampled, 2 random trace id.
    pub flags: u8,
    /// What tracing systems hand on beside, as received; untrusted, visible ASCII, at most [`MAX_TRACESTATE_BYTES`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracestate: Option<String>,
    /// How it is known.
    pub how: ParentSource,
    /// Method of the request, if it is known from one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
}

/// How a trace's parent is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ParentSource {
    /// Header of the HTTP request that the activation serves.
    Request,
    /// Environment of the process.
    Environment,
}

impl ParentSource {
    /// The word used in attributes.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Environment => "environment",
        }
    }
}

impl Parent {
    /// Reads a `traceparent` without white space around it. `None` for all that the recommendation calls invalid.
    pub fn parse(traceparent: &[u8], how: ParentSource) -> Option<Self> {
        let (head, rest) = traceparent.split_at_checked(TRACEPARENT_BYTES)?;
        if [head[2], head[35], head[52]] != [b'-'; 3] {
            return None;
        }
        let [version] = digits(&head[..2])?;
        // Later versions may say more, after another dash.
        let is_whole = rest.is_empty() || (version != 0 && rest[0] == b'-');
        if version == 0xff || !is_whole {
            return None;
        }
        let trace_id = digits(&head[3..35])?;
        let span_id = digits(&head[36..52])?;
        let [flags] = digits(&head[53..])?;
        if trace_id == [0; 16] || span_id == [0; 8] {
            return None;
        }
        Some(Self {
            trace_id: TraceId(trace_id),
            span_id,
            // Of a version that is not known, only that it is sampled can be told.
            flags: flags & if version == 0 { KNOWN_FLAGS } else { 1 },
            tracestate: None,
            how,
            method: None,
        })
    }

    /// The same with a `tracestate`, if that can be handed on.
    #[must_use]
    pub fn with_tracestate(mut self, tracestate: &[u8]) -> Self {
        let text = str::from_utf8(tracestate.trim_ascii()).ok();
        self.tracestate = text
            .filter(|text| {
                !text.is_empty()
                    && text.len() <= MAX_TRACESTATE_BYTES
                    && text.bytes().all(|byte| matches!(byte, b' '..=b'~'))
            })
            .map(str::to_owned);
        self
    }

    /// Whether the caller may have recorded its part of the trace.
    pub fn is_sampled(&self) -> bool {
        self.flags & 1 != 0
    }

    /// The application's span as it is written.
    pub fn span_id_text(&self) -> String {
        use std::fmt::Write as _;
        self.span_id.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    }
}

/// Lower-case hexadecimal digits as bytes.
fn digits<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    if text.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

mod hexadecimal {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
    pub(super) fn serialize<S: Serializer>(bytes: &[u8; 8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{:016x}", u64::from_be_bytes(*bytes)))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 8], D::Error> {
        let text = String::deserialize(deserializer)?;
        super::digits(text.as_bytes()).ok_or_else(|| D::Error::custom("no span id"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn parse(text: &str) -> Option<Parent> {
        Parent::parse(text.as_bytes(), ParentSource::Request)
    }

    #[test]
    fn the_example_of_the_recommendation_is_read_and_written_back() {
        let parent = parse(GOOD).unwrap();
        assert_eq!(parent.trace_id.to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(parent.span_id_text(), "00f067aa0ba902b7");
        assert!(parent.is_sampled());
        let json = serde_json::to_string(&parent).unwrap();
        assert_eq!(serde_json::from_str::<Parent>(&json).unwrap(), parent);
    }

    #[test]
    fn what_the_recommendation_calls_invalid_is_no_parent() {
        for invalid in [
            "",
            "00",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0g",
            "00_4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01x",
            "0-04bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(parse(invalid), None, "{invalid}");
        }
    }

    #[test]
    fn a_later_version_is_read_as_far_as_it_is_known() {
        for rest in ["", "-more", "-"] {
            let text = format!("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-ff{rest}");
            assert_eq!(parse(&text).unwrap().flags, 1, "{text}");
        }
    }

    #[test]
    fn a_tracestate_that_cannot_be_handed_on_is_left_out() {
        let with = |state: &[u8]| parse(GOOD).unwrap().with_tracestate(state).tracestate;
        assert_eq!(with(b" a=1,b=2 ").as_deref(), Some("a=1,b=2"));
        for bad in [&b""[..], b"a=\x00", b"a=\xff", "a=é".as_bytes(), &[b'a'; 513]] {
            assert_eq!(with(bad), None);
        }
    }

    proptest! {
        #[test]
        fn any_ids_are_read_back(trace in any::<[u8; 16]>(), span in any::<[u8; 8]>(), flags in any::<u8>()) {
            let text = format!("00-{:032x}-{:016x}-{flags:02x}", u128::from_be_bytes(trace), u64::from_be_bytes(span));
            let parent = parse(&text);
            prop_assert_eq!(parent.is_some(), trace != [0; 16] && span != [0; 8]);
            if let Some(parent) = parent {
                prop_assert_eq!((parent.trace_id.0, parent.span_id, parent.flags), (trace, span, flags & 3));
            }
        }

        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = Parent::parse(&bytes, ParentSource::Environment);
        }
    }
}
