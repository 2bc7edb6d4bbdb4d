//! Mermaid's `sequenceDiagram`.
//!
//! Text is escaped with Mermaid's entity codes (`#35;`), so that names of functions can neither end a statement nor become HTML,
//! formulas or directives. One statement a line; identifiers of lifelines are ours.

use std::fmt::Write;

use super::model::{Arrow, Bar, ParticipantId, ParticipantKind, Sequence, Step};

/// Faint enough for text on it to be readable on light and on dark pages.
const GROUP_COLOUR: &str = "rgba(64, 128, 224, 0.07)";
const FAILED_COLOUR: &str = "rgba(224, 48, 48, 0.12)";
const SUSPENDED_COLOUR: &str = "rgba(255, 176, 0, 0.18)";

/// Writes a sequence as Mermaid text, ending in a newline.
pub fn render(sequence: &Sequence) -> String {
    let mut out = String::from("sequenceDiagram\n");
    let ids = ids(sequence);
    write_lines(&mut out, sequence, &ids).expect("writing to a String cannot fail");
    out
}

fn write_lines(out: &mut String, sequence: &Sequence, ids: &[String]) -> std::fmt::Result {
    writeln!(out, "    title {}", escaped(&sequence.title))?;
    writeln!(out, "    autonumber")?;
    for (id, participant) in sequence.participants.iter().enumerate() {
        for group in sequence.groups.iter().filter(|group| group.first == id) {
            // Mermaid takes all up to the last bracket for the colour.
            writeln!(
                out,
                "    box {GROUP_COLOUR} {}",
                escaped(&group.title).replace(')', "#41;")
            )?;
        }
        writeln!(
            out,
            "    participant {} as {}",
            ids[id],
            escaped_lines(&participant.lines)
        )?;
        if sequence.groups.iter().any(|group| group.last == id) {
            writeln!(out, "    end")?;
        }
    }

    let mut depth = 1;
    for step in &sequence.steps {
        if matches!(step, Step::LoopEnd) {
            depth -= 1;
        }
        let indent = "    ".repeat(depth);
        match step {
            Step::Message {
                from,
                to,
                arrow,
                bar,
                lines,
            } => {
                let is_failed = *arrow == Arrow::Failed;
                let arrow = match arrow {
                    Arrow::Call => "->>",
                    Arrow::Return => "-->>",
                    Arrow::Failed => "-x",
                };
                let bar = match bar {
                    Bar::Keep => "",
                    Bar::Begin => "+",
                    Bar::End => "-",
                };
                let message = format!("{}{arrow}{bar}{}: {}", ids[*from], ids[*to], escaped_lines(lines));
                if is_failed {
                    writeln!(out, "{indent}rect {FAILED_COLOUR}\n{indent}    {message}\n{indent}end")?;
                } else {
                    writeln!(out, "{indent}{message}")?;
                }
            }
            Step::Note { first, last, lines } => {
                writeln!(
                    out,
                    "{indent}Note over {}: {}",
                    span(ids, *first, *last),
                    escaped_lines(lines)
                )?;
            }
            Step::EndBar { at } => writeln!(out, "{indent}deactivate {}", ids[*at])?,
            Step::LoopBegin { label } => {
                writeln!(out, "{indent}loop {}", escaped(label))?;
                depth += 1;
            }
            Step::LoopEnd => writeln!(out, "{indent}end")?,
            Step::Suspended { first, last, lines } => {
                writeln!(out, "{indent}rect {SUSPENDED_COLOUR}")?;
                writeln!(
                    out,
                    "{indent}    Note over {}: {}",
                    span(ids, *first, *last),
                    escaped_lines(lines)
                )?;
                writeln!(out, "{indent}end")?;
            }
        }
    }
    let last = sequence.participants.len() - 1;
    writeln!(
        out,
        "    Note over {}: {}",
        span(ids, 0, last),
        escaped_lines(&sequence.closing)
    )
}

/// Short names for the lifelines; none is a word of Mermaid's.
fn ids(sequence: &Sequence) -> Vec<String> {
    let mut counts = [0; 4];
    (sequence.participants.iter())
        .map(|participant| {
            let (letter, count) = match participant.kind {
                ParticipantKind::Host => ('H', &mut counts[0]),
                ParticipantKind::Guest => ('G', &mut counts[1]),
                ParticipantKind::Interface => ('I', &mut counts[2]),
                ParticipantKind::Kernel => ('K', &mut counts[3]),
            };
            *count += 1;
            format!("{letter}{count}")
        })
        .collect()
}

fn span(ids: &[String], first: ParticipantId, last: ParticipantId) -> String {
    if first == last {
        ids[first].clone()
    } else {
        format!("{},{}", ids[first], ids[last])
    }
}

fn escaped_lines(lines: &[String]) -> String {
    lines.iter().map(|line| escaped(line)).collect::<Vec<_>>().join("<br/>")
}

/// Text that Mermaid shows as it is.
///
/// Entity codes survive Mermaid's lexer as placeholders and come back as HTML entities after its sanitiser has run.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut previous = None;
    for (index, character) in text.char_indices() {
        let here = &text[index..];
        let next = here.chars().nth(1);
        let is_special = match character {
            '#' | ';' | '<' | '>' | '&' | '"' | '\'' | '`' | '\\' | '$' | '{' | '}' => true,
            // `%%` begins a comment or a directive.
            '%' => previous == Some('%') || matches!(next, Some('%' | '{')),
            _ => is_placeholder_or_break(character),
        };
        // The preprocessor cuts a `;` off lines with these, wherever they are.
        let is_cut = here.starts_with("style") || here.starts_with("classDef");
        // A prefix of a label that sets its wrapping, with or without `no`, a colon, blanks before it.
        let is_prefix = starts_with(here, "wrap:");
        // Ends a block in the lexers of older versions, wherever it stands alone.
        let is_end = !previous.is_some_and(is_word) && starts_with(here, "end") && !here[3..].starts_with(is_word);
        if is_special || is_cut || is_prefix || is_end {
            out.push('#');
            out.push_str(&u32::from(character).to_string());
            out.push(';');
        } else {
            out.push(character);
        }
        previous = Some(character);
    }
    out
}

/// Mermaid's own placeholders for entity codes; and what could end a statement, although the model has none of it.
fn is_placeholder_or_break(character: char) -> bool {
    matches!(character, '\u{fb02}' | '\u{b6}' | '\u{2028}' | '\u{2029}') || character.is_control()
}

fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

fn starts_with(text: &str, word: &str) -> bool {
    text.get(..word.len())
        .is_some_and(|start| start.eq_ignore_ascii_case(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syntax_becomes_entity_codes() {
        assert_eq!(escaped("a;b#c<br/>"), "a#59;b#35;c#60;br/#62;");
        assert_eq!(escaped("%%{init}%% 7 %"), "#37;#37;#123;init#125;#37;#37; 7 %");
        assert_eq!(
            escaped("$$x$$ `y` \"z\" \\n"),
            "#36;#36;x#36;#36; #96;y#96; #34;z#34; #92;n"
        );
    }

    #[test]
    fn words_of_mermaid_are_broken_up() {
        assert_eq!(
            escaped("end, End of ended endpoint"),
            "#101;nd, #69;nd of ended endpoint"
        );
        assert_eq!(escaped("  :noWRAP: x"), "  :no#87;RAP: x");
        assert_eq!(escaped("set_style:#1;"), "set_#115;tyle:#35;1#59;");
    }

    #[test]
    fn ordinary_names_stay_readable() {
        let name = "wasi:http/types@0.3.0 [method]fields.get (é, 🦀) +0x1c4";
        assert_eq!(escaped(name), name);
    }

    #[test]
    fn line_breaks_never_reach_the_output() {
        assert_eq!(escaped("a\nb\u{2028}c"), "a#10;b#8232;c");
    }
}
