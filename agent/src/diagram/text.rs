//! A sequence for a terminal: lifelines as narrow columns, one line a step, its words to the right of them.
//!
//! ```text
//!       ├───▶┃    │    │   2 fd_read
//!       │    ┃◀╌╌╌┃    │   3 1.94 ms (self 70.0 µs)
//! ```
//! Words have the whole rest of the line, so that no name makes the picture wide; longer ones go on below.

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::model::{Arrow, Bar, ParticipantId, Sequence, Step};

/// Width unless the terminal says otherwise, columns.
pub const DEFAULT_WIDTH_COLUMNS: usize = 100;
/// Narrower than this is drawn as if it were this wide.
pub const MIN_WIDTH_COLUMNS: usize = 72;
/// Wider than this is drawn as if it were this wide.
pub const MAX_WIDTH_COLUMNS: usize = 400;

/// Loops that are shown inside each other by their brackets; deeper ones share the last.
const MAX_LOOP_BRACKETS: usize = 4;

/// Writes a sequence as lines of at most `width_columns`, ending in a newline.
pub fn render(sequence: &Sequence, width_columns: usize) -> String {
    let count = sequence.participants.len();
    let pitch = if count <= 6 { 6 } else { 4 };
    let mut canvas = Canvas {
        pitch,
        bars: vec![0; count],
        left: 2,
        width: width_columns.clamp(MIN_WIDTH_COLUMNS, MAX_WIDTH_COLUMNS),
        loops: 0,
        out: String::new(),
    };
    canvas.head(sequence);
    let mut number = 0_usize;
    for step in &sequence.steps {
        canvas.step(step, &mut number);
    }
    canvas.foot(sequence);
    canvas.out
}

struct Canvas {
    /// Columns from one lifeline to the next.
    pitch: usize,
    /// Bars that are open on each lifeline.
    bars: Vec<u32>,
    /// Columns before the first lifeline.
    left: usize,
    width: usize,
    /// Loops that are open.
    loops: usize,
    out: String,
}

impl Canvas {
    fn column(&self, participant: ParticipantId) -> usize {
        self.left + participant * self.pitch
    }

    /// Where words begin: right of the last lifeline.
    fn words_column(&self) -> usize {
        self.column(self.bars.len() - 1) + 3
    }

    /// The lifelines of one line.
    fn lifelines(&self) -> Vec<char> {
        let mut row = vec![' '; self.words_column()];
        for (participant, bars) in self.bars.iter().enumerate() {
            row[self.column(participant)] = if *bars > 0 { '┃' } else { '│' };
        }
        row
    }

    fn head(&mut self, sequence: &Sequence) {
        for line in wrapped(&sequence.title, self.width, 0) {
            self.line(&[], &line);
        }
        self.out.push('\n');
        let words_column = self.words_column();
        for (id, participant) in sequence.participants.iter().enumerate() {
            for group in sequence.groups.iter().filter(|group| group.first == id) {
                let mut row = vec![' '; words_column];
                (0..id).for_each(|before| row[self.column(before)] = '│');
                self.words(&row, &group.title, 0);
            }
            let is_grouped = sequence
                .groups
                .iter()
                .any(|group| (group.first..=group.last).contains(&id));
            let mut below = vec![' '; words_column];
            (0..=id).for_each(|before| below[self.column(before)] = '│');
            let mut row = below.clone();
            let here = self.column(id);
            row[here] = '┌';
            row[here + 1..words_column - 1].fill('─');
            let indent = if is_grouped { "  " } else { "" };
            let name = format!("{indent}{}", participant.lines.join(" · "));
            self.words_above(&row, &below, &name, indent.len() + 2);
        }
    }

    fn foot(&mut self, sequence: &Sequence) {
        let row = vec!['─'; self.width];
        self.line(&row, "");
        for text in &sequence.closing {
            for line in wrapped(text, self.width, 2) {
                self.line(&[], &line);
            }
        }
    }

    fn step(&mut self, step: &Step, number: &mut usize) {
        match step {
            Step::Message {
                from,
                to,
                arrow,
                bar,
                lines,
            } => {
                *number += 1;
                if *bar == Bar::Begin {
                    self.bars[*to] += 1;
                }
                let row = self.arrow(*from, *to, *arrow);
                let prefix = self.brackets();
                let numbered = format!("{prefix}{number:>3} {}", lines.join(" · "));
                self.words_with_brackets(&row, &numbered, 4);
                if *bar == Bar::End {
                    self.bars[*from] = self.bars[*from].saturating_sub(1);
                }
            }
            Step::Note { first, last, lines } => {
                for line in lines {
                    let row = self.covered(*first, *last, '·');
                    let text = format!("{}  · {line}", self.brackets());
                    self.words_with_brackets(&row, &text, 4);
                }
            }
            Step::Suspended { first, last, lines } => {
                let row = self.covered(*first, *last, '░');
                let text = format!("{}  ░ {}", self.brackets(), lines.join(" "));
                self.words_with_brackets(&row, &text, 4);
            }
            Step::EndBar { at } => self.bars[*at] = self.bars[*at].saturating_sub(1),
            Step::LoopBegin { label } => {
                let text = format!("{}╭ {label}", self.brackets());
                self.loops += 1;
                let row = self.lifelines();
                self.words_with_brackets(&row, &text, 0);
            }
            Step::LoopEnd => {
                self.loops = self.loops.saturating_sub(1);
                let text = format!("{}╰", self.brackets());
                let row = self.lifelines();
                self.words(&row, &text, 0);
            }
        }
    }

    fn brackets(&self) -> String {
        "│ ".repeat(self.loops.min(MAX_LOOP_BRACKETS))
    }

    /// An arrow between two lifelines, over those between them.
    fn arrow(&self, from: ParticipantId, to: ParticipantId, arrow: Arrow) -> Vec<char> {
        let mut row = self.lifelines();
        let (line, right, left) = match arrow {
            Arrow::Call => ('─', '▶', '◀'),
            Arrow::Return => ('╌', '▶', '◀'),
            Arrow::Failed => ('─', '×', '×'),
        };
        let (start, end) = (self.column(from), self.column(to));
        match start.cmp(&end) {
            std::cmp::Ordering::Less => {
                row[start + 1..end]
                    .iter_mut()
                    .filter(|cell| **cell == ' ')
                    .for_each(|cell| *cell = line);
                row[end - 1] = right;
            }
            std::cmp::Ordering::Greater => {
                row[end + 1..start]
                    .iter_mut()
                    .filter(|cell| **cell == ' ')
                    .for_each(|cell| *cell = line);
                row[end + 1] = left;
            }
            std::cmp::Ordering::Equal => row[start + 1] = left,
        }
        row
    }

    /// Lifelines with some of them covered.
    fn covered(&self, first: ParticipantId, last: ParticipantId, fill: char) -> Vec<char> {
        let mut row = self.lifelines();
        if fill == '·' {
            row[self.column(last) + 1..].fill(' ');
            row[self.column(first)..=self.column(last)]
                .iter_mut()
                .filter(|cell| **cell == ' ')
                .for_each(|cell| *cell = fill);
            for participant in last + 1..self.bars.len() {
                row[self.column(participant)] = if self.bars[participant] > 0 { '┃' } else { '│' };
            }
        } else {
            row[self.column(first) - 1..=self.column(last) + 1].fill(fill);
        }
        row
    }

    fn words_with_brackets(&mut self, row: &[char], text: &str, hang: usize) {
        let brackets = self.brackets().width();
        self.words(row, text, brackets + hang);
    }

    /// A line of lifelines and words; what does not fit goes on below, `hang` columns in.
    fn words(&mut self, row: &[char], text: &str, hang: usize) {
        let below = self.lifelines();
        self.words_above(row, &below, text, hang);
    }

    /// The same, with what is drawn beside the words that go on below.
    fn words_above(&mut self, row: &[char], below: &[char], text: &str, hang: usize) {
        let room = self.width - self.words_column();
        for (index, line) in wrapped(text, room, hang).into_iter().enumerate() {
            self.line(if index == 0 { row } else { below }, &line);
        }
    }

    fn line(&mut self, row: &[char], words: &str) {
        self.out.extend(row);
        self.out.push_str(words);
        self.out.truncate(self.out.trim_end_matches(' ').len());
        self.out.push('\n');
    }
}

/// Breaks text into lines of at most `room` columns, at spaces where there are any; all but the first begin `hang` columns in.
fn wrapped(text: &str, room: usize, hang: usize) -> Vec<String> {
    let hang = hang.min(room / 2);
    let mut lines = Vec::new();
    let mut line = String::new();
    let mut columns = 0;
    let mut last_space = None;
    for character in text.chars() {
        // The model has none; a terminal must not obey one even so.
        let character = if character.is_control() { '\u{fffd}' } else { character };
        let wide = character.width().unwrap_or(0);
        if columns + wide > room {
            let rest = match last_space {
                Some(space) => line.split_off(space),
                None => String::new(),
            };
            let rest = rest.trim_start();
            let next = format!("{:hang$}{rest}", "");
            lines.push(std::mem::replace(&mut line, next));
            columns = line.width();
            last_space = None;
        }
        if character == ' ' && columns > hang {
            last_space = Some(line.len());
        }
        line.push(character);
        columns += wide;
    }
    lines.push(line);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_break_at_spaces() {
        assert_eq!(wrapped("one two three four", 9, 2), ["one two", "  three", "  four"]);
        assert_eq!(wrapped("abcdefghij", 4, 0), ["abcd", "efgh", "ij"]);
        assert_eq!(wrapped("", 9, 2), [""]);
    }

    #[test]
    fn wide_characters_count_twice() {
        assert_eq!(wrapped("字字字字", 4, 0), ["字字", "字字"]);
    }

    #[test]
    fn control_characters_are_not_passed_on() {
        assert_eq!(wrapped("a\u{1b}[2Jb", 20, 0), ["a\u{fffd}[2Jb"]);
    }
}
