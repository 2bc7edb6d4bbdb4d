//! What is taken from the first bytes of an HTTP/1 request: the method, and under which span of the application it belongs.
//! Nothing else, path and secrets included, is in what comes out of here.

use serde::{Deserialize, Serialize};

use crate::span::{Parent, ParentSource};

/// Header fields looked at; servers refuse more.
const MAX_FIELDS: usize = 256;
/// The methods that are followed.
const METHODS: [&str; 7] = ["GET", "POST", "PUT", "HEAD", "DELETE", "PATCH", "OPTIONS"];

/// What a request says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestHead {
    /// Its method; `None` if it is not one that is followed.
    pub method: Option<&'static str>,
    /// The span that it names. `None` if it names none, or if [`RequestHead::problem`] is not.
    pub parent: Option<Parent>,
    /// Why no parent could be taken from it, although there may be one.
    pub problem: Option<RequestProblem>,
}

/// Why it is not known under which span a request belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequestProblem {
    /// Not all of the head came with the first read, or it is longer than what is looked at.
    HeadCut,
    /// No head of HTTP/1, or one that is read differently by different servers.
    Malformed,
    /// There is something behind it that is not known to be its body: perhaps another request.
    Pipelined,
    /// `traceparent` is there but invalid, or there twice.
    TraceparentInvalid,
    /// Records have been lost, so it is not known what came before and what comes after.
    RecordsLost,
}

impl RequestProblem {
    /// The reason that it is counted as.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::HeadCut => "request_head_cut",
            Self::Malformed => "request_malformed",
            Self::Pipelined => "request_pipelined",
            Self::TraceparentInvalid => "traceparent_invalid",
            Self::RecordsLost => "request_records_lost",
        }
    }
}

/// Reads the start of what came out of one read of `length` bytes.
pub fn read(start: &[u8], length: u64) -> RequestHead {
    let method = METHODS.into_iter().find(|method| {
        start
            .strip_prefix(method.as_bytes())
            .is_some_and(|rest| rest.first() == Some(&b' '))
    });
    let found = match method {
        Some(_) => head(start, length),
        None => Err(RequestProblem::Malformed),
    };
    RequestHead {
        method,
        parent: found.as_ref().ok().cloned().flatten().map(|parent| Parent {
            method: method.map(str::to_owned),
            ..parent
        }),
        problem: found.err(),
    }
}

fn head(start: &[u8], length: u64) -> Result<Option<Parent>, RequestProblem> {
    let end = start.windows(4).position(|window| window == b"\r\n\r\n");
    let Some(end) = end else {
        return Err(RequestProblem::HeadCut);
    };
    let mut lines = Lines(&start[..end]);
    let is_request_line = lines.next().is_some_and(|line| {
        let mut words = line.split(|byte| *byte == b' ');
        let (_, target, version) = (words.next(), words.next(), words.next());
        target.is_some_and(|target| !target.is_empty())
            && matches!(version, Some(b"HTTP/1.1" | b"HTTP/1.0"))
            && words.next().is_none()
    });
    if !is_request_line {
        return Err(RequestProblem::Malformed);
    }
    let mut traceparent: Option<&[u8]> = None;
    let mut tracestate: Vec<u8> = Vec::new();
    let mut body_bytes: Option<u64> = None;
    let mut is_invalid = false;
    let mut is_chunked = false;
    for (index, line) in lines.enumerate() {
        // A line that goes on from the one before begins with white space, which is no name.
        let (name, value) = field(line).ok_or(RequestProblem::Malformed)?;
        if index >= MAX_FIELDS {
            return Err(RequestProblem::HeadCut);
        }
        let is = |known: &str| name.eq_ignore_ascii_case(known.as_bytes());
        if is("traceparent") {
            is_invalid |= traceparent.is_some();
            traceparent = Some(value);
        } else if is("tracestate") {
            if !tracestate.is_empty() {
                tracestate.push(b',');
            }
            tracestate.extend_from_slice(value);
        } else if is("content-length") {
            let bytes = decimal(value).ok_or(RequestProblem::Malformed)?;
            if body_bytes.is_some_and(|known| known != bytes) {
                return Err(RequestProblem::Malformed);
            }
            body_bytes = Some(bytes);
        } else if is("transfer-encoding") {
            is_chunked = true;
        }
    }
    let behind = length.saturating_sub(end as u64 + 4);
    if behind > 0 && (is_chunked || behind > body_bytes.unwrap_or(0)) {
        return Err(RequestProblem::Pipelined);
    }
    let Some(traceparent) = traceparent else {
        return Ok(None);
    };
    let parent = Parent::parse(traceparent, ParentSource::Request).filter(|_| !is_invalid);
    let parent = parent.ok_or(RequestProblem::TraceparentInvalid)?;
    Ok(Some(parent.with_tracestate(&tracestate)))
}

/// Lines that end in CR LF, or with the head.
struct Lines<'a>(&'a [u8]);

impl<'a> Iterator for Lines<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        if self.0.is_empty() {
            return None;
        }
        let end = self.0.windows(2).position(|window| window == b"\r\n");
        let (line, rest) = match end {
            Some(end) => (&self.0[..end], &self.0[end + 2..]),
            None => (self.0, &self.0[self.0.len()..]),
        };
        self.0 = rest;
        Some(line)
    }
}

/// Name and value. A bare CR or LF, or white space in or behind the name, makes it none.
fn field(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let colon = line.iter().position(|byte| *byte == b':')?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    let is_token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    let is_plain = |byte: &u8| !matches!(byte, b'\r' | b'\n' | 0);
    (!name.is_empty() && name.iter().all(is_token) && value.iter().all(is_plain)).then(|| (name, value.trim_ascii()))
}

fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    str::from_utf8(text).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn seen(text: &str) -> RequestHead {
        read(text.as_bytes(), text.len() as u64)
    }

    #[test]
    fn names_of_fields_are_read_in_any_case_and_values_without_space() {
        for name in ["traceparent", "TraceParent", "TRACEPARENT"] {
            let request = seen(&format!(
                "GET /secret?token=x HTTP/1.1\r\nHost: a\r\n{name}:\t {PARENT} \r\nTraceState: a=1\r\ntracestate: b=2\r\n\r\n"
            ));
            let parent = request.parent.unwrap();
            assert_eq!(parent.span_id_text(), "00f067aa0ba902b7");
            assert_eq!(parent.tracestate.as_deref(), Some("a=1,b=2"));
            assert_eq!((request.method, parent.method.as_deref()), (Some("GET"), Some("GET")));
        }
    }

    #[test]
    fn a_request_without_traceparent_has_no_parent_and_no_problem() {
        let request = seen("POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\nab");
        assert_eq!((request.parent, request.problem), (None, None));
    }

    #[test]
    fn what_cannot_be_trusted_says_why() {
        use RequestProblem::{HeadCut, Malformed, Pipelined, TraceparentInvalid};
        let field = format!("traceparent: {PARENT}\r\n");
        for (text, problem) in [
            (format!("GET / HTTP/1.1\r\n{field}{field}\r\n"), TraceparentInvalid),
            (
                "GET / HTTP/1.1\r\ntraceparent: 00-\r\n\r\n".to_owned(),
                TraceparentInvalid,
            ),
            (format!("GET / HTTP/1.1\r\n{field}"), HeadCut),
            (
                format!("GET / HTTP/1.1\r\n{field}\r\nGET / HTTP/1.1\r\n\r\n"),
                Pipelined,
            ),
            (
                format!("POST / HTTP/1.1\r\ncontent-length: 1\r\n{field}\r\nab"),
                Pipelined,
            ),
            (
                format!("POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n{field}\r\n0\r\n\r\n"),
                Pipelined,
            ),
            (format!("GET / HTTP/1.1\r\n {field}\r\n"), Malformed),
            (format!("GET / HTTP/1.1\r\nx: y\r\n {field}\r\n"), Malformed),
            (format!("GET / HTTP/1.1\r\nx : y\r\n{field}\r\n"), Malformed),
            (format!("GET / HTTP/1.1\r\nx: y\n{field}\r\n"), Malformed),
            (format!("GET / HTTP/2.0\r\n{field}\r\n"), Malformed),
            (format!("GET  HTTP/1.1\r\n{field}\r\n"), Malformed),
            (
                format!("PUT / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n{field}\r\n"),
                Malformed,
            ),
            (
                format!("PUT / HTTP/1.1\r\ncontent-length: +1\r\n{field}\r\n"),
                Malformed,
            ),
            (format!("FETCH / HTTP/1.1\r\n{field}\r\n"), Malformed),
        ] {
            let request = seen(&text);
            assert_eq!((request.parent, request.problem), (None, Some(problem)), "{text}");
        }
    }

    #[test]
    fn a_body_that_is_still_to_come_is_no_problem() {
        let text = format!("POST / HTTP/1.1\r\ncontent-length: 100\r\ntraceparent: {PARENT}\r\n\r\nab");
        assert!(seen(&text).parent.is_some());
    }

    #[test]
    fn more_fields_than_servers_take_are_not_searched() {
        let text = format!(
            "GET / HTTP/1.1\r\n{}traceparent: {PARENT}\r\n\r\n",
            "a: b\r\n".repeat(MAX_FIELDS)
        );
        assert_eq!(seen(&text).problem, Some(RequestProblem::HeadCut));
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..600), length in any::<u64>()) {
            let _ = read(&bytes, length);
        }

        #[test]
        fn any_fields_are_survived(fields in "[ -~\r\n\t]{0,300}", cut in 0usize..400) {
            let text = format!("GET / HTTP/1.1\r\n{fields}\r\ntraceparent: {PARENT}\r\n\r\n");
            let bytes = &text.as_bytes()[..text.len().min(cut)];
            let request = read(bytes, bytes.len() as u64);
            prop_assert!(request.parent.is_none() || request.problem.is_none());
        }
    }
}
