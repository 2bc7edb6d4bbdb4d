//! Points in time and durations as people write them.

use jiff::Timestamp;

/// Nanoseconds since the Unix epoch as RFC 3339 in UTC, to the microsecond.
pub fn rfc3339(unix_ns: u64) -> String {
    Timestamp::from_nanosecond(i128::from(unix_ns)).map_or_else(|_| unix_ns.to_string(), |time| format!("{time:.6}"))
}

/// Nanoseconds since the Unix epoch of RFC 3339, of seconds since the epoch, or of a time so long before `now_unix_ns` (`15m`).
pub fn instant(text: &str, now_unix_ns: u64) -> Result<u64, String> {
    let text = text.trim();
    if let Some(ns) = seconds(text) {
        return Ok(ns);
    }
    if let Ok(ago_ns) = duration(text) {
        return Ok(now_unix_ns.saturating_sub(ago_ns));
    }
    let time: Timestamp = text.parse().map_err(|_| {
        format!("{text:?} is no time: RFC 3339 (2026-01-31T12:00:00Z), seconds since the epoch, or how long ago (15m)")
    })?;
    u64::try_from(time.as_nanosecond()).map_err(|_| format!("{text:?} is before 1970"))
}

/// Nanoseconds of `250us`, `1.5ms`, `10s`, `15m`, `2h`, `1d`.
pub fn duration(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, f64); 8] = [
        ("ns", 1.0),
        ("us", 1e3),
        ("µs", 1e3),
        ("ms", 1e6),
        ("s", 1e9),
        ("m", 60e9),
        ("h", 3600e9),
        ("d", 86_400e9),
    ];
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim();
    let scale = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, scale)| scale);
    match (number.parse::<f64>(), scale) {
        (Ok(number), Some(scale)) if number.is_finite() => Ok((number * scale) as u64),
        _ => Err(format!("{text:?} is no duration such as 250us, 1.5ms, 10s, 15m, 2h")),
    }
}

fn seconds(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        return None;
    }
    let seconds: f64 = text.parse().ok()?;
    Some((seconds * 1e9) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_700_000_000_000_000_000;

    #[test]
    fn a_time_can_be_written_in_three_ways() {
        assert_eq!(instant("2023-11-14T22:13:20Z", 0), Ok(NOW));
        assert_eq!(instant("2023-11-14T23:13:20+01:00", 0), Ok(NOW));
        assert_eq!(instant("1700000000", 0), Ok(NOW));
        assert_eq!(instant("15m", NOW), Ok(NOW - 900_000_000_000));
        for bad in ["", "yesterday", "15x", "1e9", "2023-11-14", "1700000000..5"] {
            assert!(instant(bad, NOW).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_duration_needs_its_unit() {
        assert_eq!(duration("1.5ms"), Ok(1_500_000));
        assert_eq!(duration("2h"), Ok(7_200_000_000_000));
        for bad in ["", "5", "ms", "-1s", "1 fortnight"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_time_is_written_in_utc() {
        assert_eq!(rfc3339(NOW + 1_500), "2023-11-14T22:13:20.000001Z");
    }
}
