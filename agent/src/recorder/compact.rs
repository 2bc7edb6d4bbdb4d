//! A kept trace as few bytes: its spans one by one, parents first, as JSON, deflated. Nesting costs neither stack nor a limit.
//!
//! JSON makes a field that the model gains a field here too, and deflating takes back what repeated words cost.

use std::io::{self, BufReader, Write};
use std::sync::Arc;

use flate2::{Compression, read::ZlibDecoder, write::ZlibEncoder};
use serde::{Deserialize, Serialize};

use crate::span::{Loss, Parent, Pause, Process, Span, Starts, Trace, TraceId};

/// Bytes of JSON that are looked at for each byte that may be kept. Traces deflate to about a twentieth.
const MAX_RATIO: usize = 32;

/// Bytes that are deflated at a time.
const CHUNK_BYTES: usize = 16 << 10;

/// The trace is larger than it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooLarge;

/// What a trace has besides its spans and its process.
#[derive(Serialize, Deserialize)]
struct Head {
    id: TraceId,
    losses: Vec<Loss>,
    event_count: u64,
    starts: Starts,
    parent: Option<Parent>,
    pauses: Vec<Pause>,
}

/// The trace without its process in at most `max_bytes`. Stops early when it is too large.
pub(super) fn encode(trace: &Trace, max_bytes: usize) -> Result<Arc<[u8]>, TooLarge> {
    let bounded = Bounded {
        output: Vec::new(),
        max_bytes,
    };
    let mut output = Bounded {
        output: Deflated {
            encoder: ZlibEncoder::new(bounded, Compression::fast()),
            written: 0,
        },
        max_bytes: max_bytes.saturating_mul(MAX_RATIO),
    };
    write(trace, &mut output).map_err(|_| TooLarge)?;
    let bytes = output.output.encoder.finish().map_err(|_| TooLarge)?.output;
    Ok(bytes.into())
}

fn write(trace: &Trace, output: &mut impl Write) -> io::Result<()> {
    // A field that the model gains has to be named here.
    let Trace {
        id,
        process: _,
        root,
        losses,
        event_count,
        starts,
        parent,
        pauses,
    } = trace;
    let head = Head {
        id: *id,
        losses: losses.clone(),
        event_count: *event_count,
        starts: starts.clone(),
        parent: parent.clone(),
        pauses: pauses.clone(),
    };
    // Deflating the few bytes that the serialiser writes at a time would take twenty times as long.
    let mut line = serde_json::to_vec(&head)?;
    for span in root.walk() {
        serde_json::to_writer(&mut line, &(span.children.len(), alone(span)))?;
        if line.len() >= CHUNK_BYTES {
            output.write_all(&line)?;
            line.clear();
        }
    }
    output.write_all(&line)
}

/// The span without its children.
fn alone(span: &Span) -> Span {
    Span {
        children: Vec::new(),
        kind: span.kind.clone(),
        outcome: span.outcome.clone(),
        stack: span.stack.clone(),
        suspends: span.suspends.clone(),
        ..*span
    }
}

/// What [`encode`] made of a trace of `process`.
pub(super) fn decode(bytes: &[u8], process: Arc<Process>) -> io::Result<Trace> {
    // Not all at once: the text of a trace is many times its compact form.
    let mut input = serde_json::Deserializer::from_reader(BufReader::new(ZlibDecoder::new(bytes)));
    let head = Head::deserialize(&mut input)?;
    let mut open: Vec<(Span, usize)> = Vec::new();
    let root = 'spans: loop {
        let (children, span) = <(usize, Span)>::deserialize(&mut input)?;
        open.push((span, children));
        while open
            .last()
            .is_some_and(|(span, children)| span.children.len() == *children)
        {
            let (span, _) = open.pop().expect("there is a last");
            match open.last_mut() {
                Some((parent, _)) => parent.children.push(span),
                None => break 'spans span,
            }
        }
    };
    Ok(Trace {
        id: head.id,
        process,
        root,
        losses: head.losses,
        event_count: head.event_count,
        starts: head.starts,
        parent: head.parent,
        pauses: head.pauses,
    })
}

/// Refuses what is more than `max_bytes` in all.
pub(super) struct Bounded<W> {
    pub(super) output: W,
    pub(super) max_bytes: usize,
}

/// Something that knows how much was written to it.
pub(super) trait Written: Write {
    fn written_bytes(&self) -> usize;
}

struct Deflated<W: Write> {
    encoder: ZlibEncoder<W>,
    written: usize,
}

impl<W: Write> Write for Deflated<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.encoder.write(bytes)?;
        self.written += count;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.encoder.flush()
    }
}

impl<W: Write> Written for Deflated<W> {
    fn written_bytes(&self) -> usize {
        self.written
    }
}

impl Written for Vec<u8> {
    fn written_bytes(&self) -> usize {
        self.len()
    }
}

impl<W: Written> Write for Bounded<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.output.written_bytes() + bytes.len() > self.max_bytes {
            return Err(io::Error::other("too large"));
        }
        self.output.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::testing::{host_call, invoke, syscall, trace};

    #[test]
    fn what_was_kept_comes_back() {
        let mut call = host_call("fd_read", 2, 9);
        call.children = vec![syscall("read", 3, 4), syscall("read", 5, 6)];
        let mut root = invoke("run", 1, 20);
        root.children = vec![call, host_call("fd_write", 10, 11)];
        let trace = trace(root);
        let bytes = encode(&trace, 1 << 20).unwrap();
        assert_eq!(decode(&bytes, trace.process.clone()).unwrap(), trace);
    }

    #[test]
    fn deep_nesting_neither_overflows_nor_is_cut() {
        let mut root = invoke("leaf", 0, 1);
        for _ in 0..3_000 {
            let mut outer = invoke("run", 0, 1);
            outer.children = vec![root];
            root = outer;
        }
        let trace = trace(root);
        let bytes = encode(&trace, 1 << 20).unwrap();
        let back = decode(&bytes, trace.process.clone()).unwrap();
        assert_eq!(back.root.walk().count(), 3_001);
    }

    #[test]
    fn what_is_too_large_is_refused() {
        let mut root = invoke("run", 0, 1_000_000);
        root.children = (0..2_000).map(|i| syscall("read", i, i + 1)).collect();
        assert_eq!(encode(&trace(root), 1_000), Err(TooLarge));
    }
}
