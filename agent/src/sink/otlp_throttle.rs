//! A collector that says when to come back: `Retry-After` of HTTP, `RetryInfo` of gRPC. Nothing is sent to it before.
//!
//! The library waits as well, but not for longer than its own time for a request, nor for more than half a minute; then it
//! gives the request up, and knows nothing of it for the next one.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http::StatusCode;
use http::header::{HeaderMap, RETRY_AFTER};
use tokio::time::Instant;

/// Longest wait that a collector can ask for.
pub(crate) const MAX_WAIT: Duration = Duration::from_mins(10);
/// Longest wait for which the library does not come back too early (its `MAX_THROTTLE_DURATION`).
pub(crate) const LIBRARY_WAIT: Duration = Duration::from_secs(30);
/// Bytes looked at of what a collector sends as the details of a status.
const MAX_DETAILS_BYTES: usize = 64 << 10;

/// Until when a collector wants to be left alone.
#[derive(Debug, Default)]
pub(crate) struct Throttle(Mutex<Option<Instant>>);

impl Throttle {
    /// It has asked for a wait from now on. A shorter one does not end one that was asked for before.
    pub(crate) fn wait_for(&self, wait: Duration) {
        let until = Instant::now() + wait.min(MAX_WAIT);
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *known = Some(known.map_or(until, |known| known.max(until)));
    }

    /// When it can be sent something again, if that is later than now.
    pub(crate) fn until(&self) -> Option<Instant> {
        let known = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.filter(|until| *until > Instant::now())
    }

    /// Takes note of an answer over HTTP.
    pub(crate) fn note_answer(&self, status: StatusCode, headers: &HeaderMap) {
        if !matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            return;
        }
        let value = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok());
        if let Some(wait) = value.and_then(|value| retry_after(value, jiff::Timestamp::now())) {
            self.wait_for(wait);
        }
    }

    /// Takes note of a status over gRPC, whose code is given by its name in Rust.
    pub(crate) fn note_status(&self, code: &str, details: &[u8]) {
        if !matches!(code, "ResourceExhausted" | "Unavailable") {
            return;
        }
        if let Some(wait) = retry_info(details) {
            self.wait_for(wait);
        }
    }
}

/// What `Retry-After` says: seconds, or a date.
fn retry_after(value: &str, now: jiff::Timestamp) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let date = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(value).ok()?;
    // The clock of the collector may be behind.
    Duration::try_from(date.duration_since(now)).ok()
}

/// The delay in the `google.rpc.RetryInfo` among the details of a `google.rpc.Status`.
fn retry_info(status: &[u8]) -> Option<Duration> {
    const DETAILS: u64 = 3;
    const TYPE_URL: u64 = 1;
    const VALUE: u64 = 2;
    const RETRY_DELAY: u64 = 1;
    let status = status.get(..status.len().min(MAX_DETAILS_BYTES))?;
    let bytes_of = |message, number| {
        Fields(message).find_map(move |(found, field)| match field {
            Field::Bytes(bytes) if found == number => Some(bytes),
            _ => None,
        })
    };
    let details = Fields(status).filter_map(|(number, field)| match field {
        Field::Bytes(bytes) if number == DETAILS => Some(bytes),
        _ => None,
    });
    for any in details {
        let is_retry_info = bytes_of(any, TYPE_URL).is_some_and(|url| url.ends_with(b"/google.rpc.RetryInfo"));
        if !is_retry_info {
            continue;
        }
        let delay = bytes_of(bytes_of(any, VALUE)?, RETRY_DELAY)?;
        let (mut seconds, mut nanoseconds) = (0, 0);
        for (number, field) in Fields(delay) {
            match (number, field) {
                (1, Field::Number(value)) => seconds = i64::try_from(value).ok()?,
                (2, Field::Number(value)) => nanoseconds = u32::try_from(value).ok()?,
                _ => {}
            }
        }
        let seconds = u64::try_from(seconds).ok()?;
        return Duration::from_secs(seconds).checked_add(Duration::from_nanos(nanoseconds.into()));
    }
    None
}

enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Other,
}

/// The fields of a protobuf message, up to the first that is malformed.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let (first, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(first & 0x7f) << shift;
            if first & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, count: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(count).ok()?)?;
        self.0 = rest;
        Some(taken)
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = (u64, Field<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let key = self.varint()?;
        let field = match key & 7 {
            0 => Field::Number(self.varint()?),
            1 => self.take(8).map(|_| Field::Other)?,
            2 => {
                let count = self.varint()?;
                Field::Bytes(self.take(count)?)
            }
            5 => self.take(4).map(|_| Field::Other)?,
            _ => return None,
        };
        Some((key >> 3, field))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_and_dates_are_understood_and_nonsense_is_not() {
        let now: jiff::Timestamp = "2026-11-23T05:00:00Z".parse().unwrap();
        let wait = |text| retry_after(text, now);
        assert_eq!(wait(" 120 "), Some(Duration::from_mins(2)));
        assert_eq!(wait("Mon, 23 Nov 2026 05:01:30 GMT"), Some(Duration::from_secs(90)));
        for nonsense in [
            "",
            "-1",
            "soon",
            "Mon, 23 Nov 2026 04:59:00 GMT",
            "18446744073709551616",
        ] {
            assert_eq!(wait(nonsense), None, "{nonsense}");
        }
    }

    fn message(number: u8, content: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, u8::try_from(content.len()).unwrap()], content].concat()
    }

    fn status(delay: &[u8]) -> Vec<u8> {
        let other = message(3, &message(1, b"type.googleapis.com/google.rpc.DebugInfo"));
        let info = message(2, &message(1, delay));
        let any = [message(1, b"type.googleapis.com/google.rpc.RetryInfo"), info].concat();
        [vec![8, 14], message(2, b"later"), other, message(3, &any)].concat()
    }

    #[test]
    fn the_delay_is_found_among_other_details_and_cut_short_ones_are_no_delay() {
        let whole = status(&[8, 7, 16, 0x80, 0xca, 0xb5, 0xee, 0x01]);
        assert_eq!(retry_info(&whole), Some(Duration::new(7, 500_000_000)));
        // -1 second.
        let negative = status(&[8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]);
        assert_eq!(retry_info(&negative), None);
        for length in 0..whole.len() - 10 {
            assert_eq!(retry_info(&whole[..length]), None);
        }
    }

    #[test]
    fn a_wait_is_bounded_and_only_ever_extended() {
        let throttle = Throttle::default();
        assert_eq!(throttle.until(), None);
        throttle.wait_for(Duration::MAX);
        let first = throttle.until().unwrap();
        assert!(first <= Instant::now() + MAX_WAIT);
        throttle.wait_for(Duration::from_secs(1));
        assert_eq!(throttle.until(), Some(first));
    }
}
