//! A trace id as text: 32 hex digits, in files and on command lines.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::TraceId;

/// The text is not 32 hex digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a trace id is 32 hex digits")]
pub struct NotATraceId;

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for TraceId {
    type Err = NotATraceId;

    fn from_str(text: &str) -> Result<Self, NotATraceId> {
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(NotATraceId);
        }
        let id = u128::from_str_radix(text, 16).map_err(|_| NotATraceId)?;
        Ok(Self(id.to_be_bytes()))
    }
}

impl Serialize for TraceId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TraceId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Visitor)
    }
}

/// Also takes the sixteen numbers that earlier versions wrote.
struct Visitor;

impl<'de> de::Visitor<'de> for Visitor {
    type Value = TraceId;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("32 hex digits")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<TraceId, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, sequence: A) -> Result<TraceId, A::Error> {
        <[u8; 16]>::deserialize(de::value::SeqAccessDeserializer::new(sequence)).map(TraceId)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: TraceId = TraceId([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255]);

    #[test]
    fn an_id_is_hex_in_json_and_comes_back() {
        let json = serde_json::to_string(&ID).unwrap();
        assert_eq!(json, "\"000102030405060708090a0b0c0d0eff\"");
        assert_eq!(serde_json::from_str::<TraceId>(&json).unwrap(), ID);
    }

    #[test]
    fn sixteen_numbers_are_still_read() {
        let numbers = serde_json::to_string(&ID.0).unwrap();
        assert_eq!(serde_json::from_str::<TraceId>(&numbers).unwrap(), ID);
        assert!(serde_json::from_str::<TraceId>("[1,2]").is_err());
    }

    #[test]
    fn other_text_is_refused() {
        for text in [
            "",
            "0001",
            "+0102030405060708090a0b0c0d0eff1",
            "zz0102030405060708090a0b0c0d0eff",
        ] {
            assert_eq!(text.parse::<TraceId>(), Err(NotATraceId), "{text}");
        }
    }
}
