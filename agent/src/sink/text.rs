//! Bounds for text that traced processes chose.

use std::borrow::Cow;

/// At most `max_bytes` of `text`, cut between characters; a cut ends in `…`.
pub(crate) fn bounded(text: &str, max_bytes: usize) -> Cow<'_, str> {
    const MARK: &str = "…";
    if text.len() <= max_bytes {
        return Cow::Borrowed(text);
    }
    let end = text.floor_char_boundary(max_bytes.saturating_sub(MARK.len()));
    Cow::Owned(format!("{}{MARK}", &text[..end]))
}

/// The same on one line: control characters (a newline would forge a line of a stack) become U+FFFD.
pub(crate) fn bounded_line(text: &str, max_bytes: usize) -> Cow<'_, str> {
    let text = bounded(text, max_bytes);
    if text.contains(char::is_control) {
        Cow::Owned(text.replace(char::is_control, "\u{fffd}"))
    } else {
        text
    }
}

/// The same for a terminal: what would move the cursor, change colours or turn writing round becomes U+FFFD.
pub(crate) fn printable(text: &str) -> String {
    let reorders = |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{2028}' | '\u{2029}');
    text.replace(|c: char| c.is_control() || reorders(c), "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_never_splits_a_character() {
        for max_bytes in 3..12 {
            let cut = bounded("ééééééé", max_bytes);
            assert!(cut.len() <= max_bytes, "{cut} is longer than {max_bytes}");
            assert!(cut.ends_with('…'));
        }
    }

    #[test]
    fn text_within_the_bound_is_left_alone() {
        assert!(matches!(bounded_line("plain", 5), Cow::Borrowed("plain")));
    }

    #[test]
    fn control_characters_do_not_survive_in_a_line() {
        assert_eq!(bounded_line("a\nb\u{1b}[1m", 64), "a\u{fffd}b\u{fffd}[1m");
    }
}
