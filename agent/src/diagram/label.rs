//! Words and figures for people: names made harmless, times, sizes, counts, the spread of many durations.

/// A name from a traced process as one line of visible text: control, formatting and bidirectional-override characters are written
/// out, and the middle of a long name is cut (`…`). Not more than `max_chars` (at least 8) characters and a directional mark.
pub(super) fn visible(name: &str, max_chars: usize) -> String {
    let max_chars = max_chars.max(8);
    let mut shown = String::new();
    let is_long = name.chars().nth(max_chars).is_some();
    if is_long {
        // Both ends tell names apart: `core::…::write`. Only what can be shown is looked at.
        let tail_chars = max_chars / 3;
        let head: String = name.chars().take(max_chars - tail_chars - 1).collect();
        let mut tail: Vec<char> = name.chars().rev().take(tail_chars).collect();
        tail.reverse();
        shown.extend(head.chars().flat_map(Written::of));
        shown.push('…');
        shown.extend(tail.into_iter().flat_map(Written::of));
    } else {
        shown.extend(name.chars().flat_map(Written::of));
    }
    // Written-out characters can make it long again.
    if let Some((cut, _)) = shown.char_indices().nth(max_chars) {
        let last_kept = shown[..cut].char_indices().next_back().map_or(0, |(index, _)| index);
        shown.truncate(last_kept);
        shown.push('…');
    }
    if shown.chars().any(is_right_to_left) {
        // Keeps the figures after the name from being drawn before it.
        shown.push('\u{200e}');
    }
    if shown.chars().all(char::is_whitespace) {
        "(blank name)".into()
    } else {
        shown
    }
}

/// The characters that one character of a name is shown as.
enum Written {
    Plain(Option<char>),
    Escaped(std::char::EscapeUnicode),
}

impl Written {
    fn of(character: char) -> Self {
        match character {
            '\u{0}'..='\u{1f}' => Self::Plain(char::from_u32(0x2400 + character as u32)),
            '\u{7f}' => Self::Plain(Some('\u{2421}')),
            _ if is_invisible(character) => Self::Escaped(character.escape_unicode()),
            _ => Self::Plain(Some(character)),
        }
    }
}

impl Iterator for Written {
    type Item = char;

    fn next(&mut self) -> Option<char> {
        match self {
            Self::Plain(character) => character.take(),
            Self::Escaped(characters) => characters.next(),
        }
    }
}

/// Characters that draw nothing or change how others are drawn: C1 controls, Unicode's `Cf`, `Zl`, `Zp`, private use, tags, fillers.
fn is_invisible(character: char) -> bool {
    matches!(character,
        '\u{80}'..='\u{9f}' | '\u{ad}' | '\u{34f}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{8e2}'
        | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}'
        | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{e000}'..='\u{f8ff}' | '\u{fe00}'..='\u{fe0e}'
        | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{fffe}' | '\u{ffff}' | '\u{1bca0}'..='\u{1bca3}'
        | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{10ffff}')
}

fn is_right_to_left(character: char) -> bool {
    matches!(character, '\u{590}'..='\u{8ff}' | '\u{fb1d}'..='\u{fdff}' | '\u{fe70}'..='\u{fefc}' | '\u{10800}'..='\u{10fff}' | '\u{1e800}'..='\u{1efff}')
}

/// A duration with three significant digits: `0 ns`, `870 ns`, `1.94 ms`, `12.7 s`.
pub(crate) fn duration(ns: u64) -> String {
    significant(ns, 1000, &["ns", "µs", "ms", "s"])
}

/// A size; exact below 10,000 B.
pub(super) fn bytes(count: u64) -> String {
    if count < 10_000 {
        format!("{} B", grouped(count))
    } else {
        significant(count, 1024, &["B", "KiB", "MiB", "GiB", "TiB"])
    }
}

/// `value` in the largest unit that leaves at least 1, each `step` times the one before.
fn significant(value: u64, step: u64, units: &[&str]) -> String {
    let mut scale = 1;
    for (index, unit) in units.iter().enumerate() {
        let is_last = index + 1 == units.len();
        for (decimals, below) in [(2, 10), (1, 100), (0, step)] {
            let decimals = if scale == 1 { 0 } else { decimals };
            let factor = 10_u128.pow(decimals);
            // Rounded first, so that 999.6 µs is 1.00 ms.
            let rounded = (u128::from(value) * factor + u128::from(scale) / 2) / u128::from(scale);
            if rounded < u128::from(below) * factor || (is_last && decimals == 0) {
                let whole = grouped((rounded / factor) as u64);
                return match decimals {
                    0 => format!("{whole} {unit}"),
                    _ => format!("{whole}.{:0width$} {unit}", rounded % factor, width = decimals as usize),
                };
            }
        }
        scale *= step;
    }
    unreachable!("the last unit takes any value")
}

/// Digits in groups of three: `1,204`.
pub(super) fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 call`, `2 calls`.
pub(super) fn counted(count: u64, one: &str) -> String {
    format!("{} {one}{}", grouped(count), if count == 1 { "" } else { "s" })
}

/// Text in lines of at most `max_chars` characters, except for words that are longer.
pub(super) fn filled(text: &str, max_chars: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut chars = 0;
    for word in text.split(' ') {
        let more = word.chars().count();
        match lines.last_mut() {
            Some(line) if chars + 1 + more <= max_chars => {
                chars += 1 + more;
                line.push(' ');
                line.push_str(word);
            }
            _ => {
                chars = more;
                lines.push(word.to_owned());
            }
        }
    }
    lines
}

/// The spread of several durations, nanoseconds. Percentiles are durations that occurred (nearest rank).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Spread {
    pub(super) count: u64,
    pub(super) total: u64,
    pub(super) median: u64,
    pub(super) p99: u64,
    pub(super) max: u64,
}

impl Spread {
    pub(super) fn of(mut durations: Vec<u64>) -> Self {
        durations.sort_unstable();
        let rank = |percent: usize| {
            durations
                .get((durations.len() * percent).div_ceil(100).saturating_sub(1))
                .copied()
        };
        Self {
            count: durations.len() as u64,
            total: durations.iter().fold(0, |sum, duration| sum.saturating_add(*duration)),
            median: rank(50).unwrap_or(0),
            p99: rank(99).unwrap_or(0),
            max: durations.last().copied().unwrap_or(0),
        }
    }

    /// `p50 0.90 µs · p99 2.10 µs`; of fewer than 100 the 99th percentile is the longest, and called that.
    pub(super) fn text(&self) -> String {
        let (word, high) = if self.count < 100 {
            ("max", self.max)
        } else {
            ("p99", self.p99)
        };
        format!("p50 {} · {word} {}", duration(self.median), duration(high))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_three_significant_digits() {
        let shown: Vec<String> = [
            0,
            1,
            999,
            1_000,
            9_994,
            9_995,
            99_950,
            999_499,
            999_500,
            12_713_402,
            6_100_000_000,
            4_000_000_000_000,
        ]
        .map(duration)
        .into();
        assert_eq!(
            shown,
            [
                "0 ns", "1 ns", "999 ns", "1.00 µs", "9.99 µs", "10.0 µs", "100 µs", "999 µs", "1.00 ms", "12.7 ms",
                "6.10 s", "4,000 s"
            ]
        );
        assert_eq!(duration(u64::MAX), "18,446,744,074 s");
    }

    #[test]
    fn small_sizes_are_exact() {
        assert_eq!(
            [0, 4096, 9_999, 65_536, 5 << 30].map(bytes),
            ["0 B", "4,096 B", "9,999 B", "64.0 KiB", "5.00 GiB"]
        );
    }

    #[test]
    fn invisible_characters_are_written_out() {
        assert_eq!(visible("a\nb\u{1b}[31m\u{7f}", 64), "a␊b␛[31m␡");
        assert_eq!(visible("x\u{202e}y\u{200b}", 64), "x\\u{202e}y\\u{200b}");
        assert_eq!(visible("", 64), "(blank name)");
        assert_eq!(visible(" \u{a0}", 64), "(blank name)");
        assert_eq!(visible("héllo 🦀", 64), "héllo 🦀");
    }

    #[test]
    fn long_names_keep_both_ends() {
        assert_eq!(
            visible("core::ops::function::FnOnce::call_once", 16),
            "core::ops:…_once"
        );
        assert_eq!(visible(&"\u{202e}".repeat(10_000), 16).chars().count(), 16);
    }

    #[test]
    fn figures_after_a_right_to_left_name_stay_after_it() {
        assert!(visible("שלום", 64).ends_with('\u{200e}'));
    }

    #[test]
    fn lines_are_filled_with_whole_words() {
        assert_eq!(filled("one two three seventeen", 8), ["one two", "three", "seventeen"]);
        assert_eq!(filled("", 8), [""]);
    }

    #[test]
    fn percentiles_are_durations_that_occurred() {
        let spread = Spread::of((1..=200).rev().collect());
        assert_eq!(
            (spread.median, spread.p99, spread.max, spread.total),
            (100, 198, 200, 20_100)
        );
        assert_eq!(spread.text(), "p50 100 ns · p99 198 ns");
        assert_eq!(Spread::of(vec![5, 9, 7]).text(), "p50 7 ns · max 9 ns");
        assert_eq!(Spread::of(Vec::new()), Spread::default());
    }
}
