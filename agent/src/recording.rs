//! A portable file of decoded events: replay needs neither root nor the kernel it was made on.
//!
//! One JSON object a line: a header, then events in order, then the account of the capture. A recording that was cut off
//! (the agent was killed) lacks the last line and is read as far as it goes.

use std::io::{self, BufRead, Write};

use serde::{Deserialize, Serialize};

use crate::{
    clock::ClockAnchor,
    event::Event,
    span::{Capture, Loss},
};

/// Version of the format. Readers refuse others.
pub const VERSION: u32 = 1;
/// Longest line read, bytes; names have bounds, so events do.
const MAX_LINE_BYTES: u64 = 1 << 20;

/// The first line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// [`VERSION`] of the writer.
    pub wasmscope_recording: u32,
    /// Version of the agent that wrote it.
    pub agent_version: String,
    /// Where monotonic times are on the wall clock.
    pub clock: ClockAnchor,
    /// Kernel release it was made on.
    pub kernel_release: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", untagged)]
enum Line {
    Capture { capture: Capture },
    Event(Event),
}

/// Why a recording cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordingError {
    /// Reading failed.
    #[error("cannot read the recording")]
    Read(#[from] io::Error),
    /// The first line is not a header.
    #[error("not a wasmscope recording")]
    NotARecording,
    /// Written by another version.
    #[error("recording has format {found}, this agent reads {VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
    /// A line is not an event.
    #[error("line {line} of the recording is malformed")]
    Malformed {
        /// Its number, from 1.
        line: u64,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A line is longer than any event.
    #[error("line {line} of the recording is longer than {MAX_LINE_BYTES} bytes")]
    TooLong {
        /// Its number, from 1.
        line: u64,
    },
}

/// Writes a recording.
#[derive(Debug)]
pub struct Writer<W> {
    output: W,
}

impl<W: Write> Writer<W> {
    /// Begins one.
    pub fn new(mut output: W, clock: ClockAnchor, kernel_release: String) -> io::Result<Self> {
        let header = Header {
            wasmscope_recording: VERSION,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            clock,
            kernel_release,
        };
        line(&mut output, &header)?;
        Ok(Self { output })
    }

    /// Adds an event.
    pub fn event(&mut self, event: &Event) -> io::Result<()> {
        line(&mut self.output, event)
    }

    /// Adds the account of the capture and ends the recording.
    pub fn finish(mut self, capture: &Capture) -> io::Result<()> {
        line(
            &mut self.output,
            &Line::Capture {
                capture: capture.clone(),
            },
        )?;
        self.output.flush()
    }
}

fn line(output: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *output, value)?;
    output.write_all(b"\n")
}

/// Reads a recording; `each` is given every event in order. Without a last line, the account says so.
pub fn read(mut input: impl BufRead, mut each: impl FnMut(Event)) -> Result<(Header, Capture), RecordingError> {
    let mut buffer = Vec::new();
    let mut number = 1;
    if !next_line(&mut input, &mut buffer, number)? {
        return Err(RecordingError::NotARecording);
    }
    let header: Header = serde_json::from_slice(&buffer).map_err(|_| RecordingError::NotARecording)?;
    if header.wasmscope_recording != VERSION {
        return Err(RecordingError::Version {
            found: header.wasmscope_recording,
        });
    }
    let mut span: Option<(u64, u64)> = None;
    let mut count = 0;
    loop {
        number += 1;
        if !next_line(&mut input, &mut buffer, number)? {
            break;
        }
        match serde_json::from_slice(&buffer).map_err(|source| RecordingError::Malformed { line: number, source })? {
            Line::Capture { capture } => return Ok((header, capture)),
            Line::Event(event) => {
                if event.at_ns != 0 {
                    let (start, end) = span.unwrap_or((event.at_ns, event.at_ns));
                    span = Some((start.min(event.at_ns), end.max(event.at_ns)));
                }
                count += 1;
                each(event);
            }
        }
    }
    let (start_ns, end_ns) = span.unwrap_or_default();
    let capture = Capture {
        start_ns,
        end_ns,
        emitted_count: count,
        delivered_count: count,
        losses: vec![Loss {
            layer: "recording".to_owned(),
            reason: "cut_off".to_owned(),
            count: 1,
        }],
        kernel_release: header.kernel_release.clone(),
        replay_of: None,
        trace_count: 0,
    };
    Ok((header, capture))
}

fn next_line(input: &mut impl BufRead, buffer: &mut Vec<u8>, line: u64) -> Result<bool, RecordingError> {
    buffer.clear();
    let read = io::Read::take(&mut *input, MAX_LINE_BYTES).read_until(b'\n', buffer)?;
    if read as u64 == MAX_LINE_BYTES && buffer.last() != Some(&b'\n') {
        return Err(RecordingError::TooLong { line });
    }
    Ok(read > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::EventKind;

    fn event(at_ns: u64) -> Event {
        Event {
            at_ns,
            pid: 7,
            tid: 8,
            kind: EventKind::Unwind,
        }
    }

    fn recorded(events: &[Event], capture: Option<&Capture>) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, ClockAnchor::now(), "6.18".to_owned()).unwrap();
        for event in events {
            writer.event(event).unwrap();
        }
        if let Some(capture) = capture {
            writer.finish(capture).unwrap();
        }
        bytes
    }

    fn read_all(bytes: &[u8]) -> Result<(Vec<Event>, Capture), RecordingError> {
        let mut events = Vec::new();
        let (_, capture) = read(bytes, |event| events.push(event))?;
        Ok((events, capture))
    }

    #[test]
    fn what_was_written_is_read_back() {
        let capture = Capture {
            emitted_count: 2,
            delivered_count: 2,
            trace_count: 1,
            ..Capture::default()
        };
        let events = [event(1), event(2)];
        assert_eq!(
            read_all(&recorded(&events, Some(&capture))).unwrap(),
            (events.to_vec(), capture)
        );
    }

    #[test]
    fn a_recording_without_an_end_says_that_it_was_cut_off() {
        let (events, capture) = read_all(&recorded(&[event(5), event(9)], None)).unwrap();
        assert_eq!(events.len(), 2);
        assert_eq!((capture.start_ns, capture.end_ns), (5, 9));
        assert_eq!(capture.losses[0].reason, "cut_off");
    }

    #[test]
    fn what_is_not_a_recording_is_refused() {
        assert!(matches!(read_all(b""), Err(RecordingError::NotARecording)));
        assert!(matches!(
            read_all(b"sequenceDiagram\n"),
            Err(RecordingError::NotARecording)
        ));
        let mut bytes = recorded(&[event(1)], None);
        bytes.extend_from_slice(b"{\"at_ns\":}\n");
        assert!(matches!(
            read_all(&bytes),
            Err(RecordingError::Malformed { line: 3, .. })
        ));
    }

    #[test]
    fn another_version_is_refused_by_its_number() {
        let text = String::from_utf8(recorded(&[], None)).unwrap();
        let text = text.replace("\"wasmscope_recording\":1", "\"wasmscope_recording\":99");
        assert!(matches!(
            read_all(text.as_bytes()),
            Err(RecordingError::Version { found: 99 })
        ));
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut bytes = recorded(&[], None);
        bytes.extend(std::iter::repeat_n(b' ', MAX_LINE_BYTES as usize + 1));
        assert!(matches!(read_all(&bytes), Err(RecordingError::TooLong { line: 2 })));
    }
}
