//! From a ring record's bytes to a typed record. Lengths are checked, nothing is assumed of the content.

use wasmscope_common::{
    ActivationSwap, CONTINUES, Calibrated, CodePublished, DOES_NOT_RETURN, Descriptor, HelperSyscall, HostCall,
    HostCallEnd, HttpRequest, ImportTable, MAX_FRAMES, MAX_GLANCE_BYTES, Mark, MarkEnd, ProcessEvent, RecordHeader,
    RecordKind, STACK_TRUNCATED, Syscall, Trap, Unwind,
};
use zerocopy::{FromBytes, FromZeros as _, Immutable, IntoBytes, KnownLayout};

use crate::http_request::{self, RequestHead, RequestProblem};

/// A record, as a program wrote it.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "described at RecordKind")]
pub enum Record {
    ActivationSwap(ActivationSwap),
    HostCall(HostCall),
    HostCallEnd(HostCallEnd),
    Syscall(Syscall),
    Trap(Trap),
    Unwind(Unwind),
    CodePublished(CodePublished),
    Exec(ProcessEvent),
    ThreadExit(ProcessEvent),
    Fork(ProcessEvent),
    Calibrated(Calibrated),
    ImportTable(Box<ImportTable>),
    Mark(Mark),
    MarkEnd(MarkEnd),
    HelperSyscall(HelperSyscall),
    HttpRequest(Box<SeenRequest>),
    RequestEnd(Descriptor),
    Multiplexes(Descriptor),
}

/// A request. Of its bytes, only the first few of one that is read in two parts, or the second of these, go further than here:
/// until both are there, nothing can be taken from them.
#[derive(Clone, Debug)]
pub struct SeenRequest {
    /// Who and when.
    pub header: RecordHeader,
    /// Descriptor that it was read from.
    pub descriptor: u32,
    /// What was taken from it.
    pub head: RequestHead,
    /// Bytes that say nothing by themselves: the first few of a request of which the rest comes next, or that rest. Empty for
    /// all other requests.
    pub piece: Vec<u8>,
    /// Bytes read.
    pub length: u64,
}

/// Why bytes are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Fewer bytes than the kind needs.
    #[error("a record of {length} bytes is too short")]
    TooShort {
        /// Bytes given.
        length: usize,
    },
    /// A kind that this agent does not know.
    #[error("unknown record kind {kind}")]
    UnknownKind {
        /// The number found.
        kind: u8,
    },
    /// More frames than there can be.
    #[error("a record claims {count} frames")]
    TooManyFrames {
        /// The number found.
        count: u16,
    },
}

/// Reads one record.
pub fn decode(bytes: &[u8]) -> Result<Record, DecodeError> {
    let too_short = DecodeError::TooShort { length: bytes.len() };
    let (header, _) = RecordHeader::read_from_prefix(bytes).map_err(|_| too_short)?;
    if usize::from(header.frame_count) > MAX_FRAMES {
        return Err(DecodeError::TooManyFrames {
            count: header.frame_count,
        });
    }
    let kind = RecordKind::from_u8(header.kind).ok_or(DecodeError::UnknownKind { kind: header.kind })?;
    Ok(match kind {
        RecordKind::ActivationSwap => Record::ActivationSwap(read(bytes, 0, 0)?),
        RecordKind::HostCall => Record::HostCall(read(bytes, header.frame_count, MAX_FRAMES)?),
        RecordKind::HostCallEnd => Record::HostCallEnd(read(bytes, 0, 0)?),
        RecordKind::Syscall => Record::Syscall(read(bytes, header.frame_count, MAX_FRAMES)?),
        RecordKind::Trap => Record::Trap(read(bytes, header.frame_count, MAX_FRAMES)?),
        RecordKind::Unwind => Record::Unwind(read(bytes, 0, 0)?),
        RecordKind::CodePublished => Record::CodePublished(read(bytes, 0, 0)?),
        RecordKind::Exec => Record::Exec(read(bytes, 0, 0)?),
        RecordKind::ThreadExit => Record::ThreadExit(read(bytes, 0, 0)?),
        RecordKind::Fork => Record::Fork(read(bytes, 0, 0)?),
        RecordKind::Calibrated => Record::Calibrated(read(bytes, 0, 0)?),
        RecordKind::ImportTable => Record::ImportTable(Box::new(read(bytes, 0, 0)?)),
        RecordKind::Mark => Record::Mark(read(bytes, header.frame_count, MAX_FRAMES)?),
        RecordKind::MarkEnd => Record::MarkEnd(read(bytes, 0, 0)?),
        RecordKind::HelperSyscall => Record::HelperSyscall(read(bytes, 0, 0)?),
        RecordKind::HttpRequest => Record::HttpRequest(Box::new(request(bytes)?)),
        RecordKind::RequestEnd => Record::RequestEnd(read(bytes, 0, 0)?),
        RecordKind::Multiplexes => Record::Multiplexes(read(bytes, 0, 0)?),
    })
}

/// Takes from a request what is wanted of it.
fn request(bytes: &[u8]) -> Result<SeenRequest, DecodeError> {
    let too_short = DecodeError::TooShort { length: bytes.len() };
    let head_at = std::mem::offset_of!(HttpRequest, head);
    let fixed = bytes.get(..head_at).ok_or(too_short)?;
    let mut record = HttpRequest::new_zeroed();
    record.as_mut_bytes()[..head_at].copy_from_slice(fixed);
    let head_length = usize::try_from(record.head_length).map_err(|_| too_short)?;
    let start = bytes[head_at..].get(..head_length).ok_or(too_short)?;
    let head = http_request::read(start, record.length);
    let is_glance = head.problem == Some(RequestProblem::HeadCut) && record.length <= MAX_GLANCE_BYTES;
    let is_piece = is_glance || record.header.flags & CONTINUES != 0;
    Ok(SeenRequest {
        header: record.header,
        descriptor: record.descriptor as u32,
        piece: if is_piece { start.to_vec() } else { Vec::new() },
        length: record.length,
        head,
    })
}

/// Reads a `T` whose last `max_frames` words may have been cut to `frame_count`; those cut are zero.
fn read<T: FromBytes + IntoBytes + Immutable + KnownLayout>(
    bytes: &[u8],
    frame_count: u16,
    max_frames: usize,
) -> Result<T, DecodeError> {
    let needed = size_of::<T>() - (max_frames - usize::from(frame_count)) * 8;
    let given = bytes
        .get(..needed)
        .ok_or(DecodeError::TooShort { length: bytes.len() })?;
    let mut value = T::new_zeroed();
    value.as_mut_bytes()[..needed].copy_from_slice(given);
    Ok(value)
}

impl Record {
    /// Who and when.
    pub fn header(&self) -> &RecordHeader {
        match self {
            Self::ActivationSwap(record) => &record.header,
            Self::HostCall(record) => &record.header,
            Self::HostCallEnd(record) => &record.header,
            Self::Syscall(record) => &record.header,
            Self::Trap(record) => &record.header,
            Self::Unwind(record) => &record.header,
            Self::CodePublished(record) => &record.header,
            Self::Exec(record) | Self::ThreadExit(record) | Self::Fork(record) => &record.header,
            Self::Calibrated(record) => &record.header,
            Self::ImportTable(record) => &record.header,
            Self::Mark(record) => &record.header,
            Self::MarkEnd(record) => &record.header,
            Self::HelperSyscall(record) => &record.header,
            Self::HttpRequest(record) => &record.header,
            Self::RequestEnd(record) | Self::Multiplexes(record) => &record.header,
        }
    }

    /// Guest addresses, innermost first.
    pub fn frames(&self) -> &[u64] {
        let all = match self {
            Self::HostCall(record) => &record.frames,
            Self::Syscall(record) => &record.frames,
            Self::Trap(record) => &record.frames,
            Self::Mark(record) => &record.frames,
            _ => return &[],
        };
        &all[..usize::from(self.header().frame_count)]
    }

    /// Whether the frames end before the entry frame.
    pub fn is_truncated(&self) -> bool {
        self.header().flags & STACK_TRUNCATED != 0
    }

    /// Whether it is of a syscall that does not return.
    pub fn does_not_return(&self) -> bool {
        self.header().flags & DOES_NOT_RETURN != 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::FromZeros as _;

    use super::*;

    fn syscall(frame_count: u16) -> Syscall {
        let mut record = Syscall::new_zeroed();
        record.header.kind = RecordKind::Syscall as u8;
        record.header.frame_count = frame_count;
        record.number = 257;
        record.frames = std::array::from_fn(|index| index as u64 + 1);
        record
    }

    #[test]
    fn a_record_cut_after_its_frames_is_read_back() {
        let record = syscall(3);
        let length = std::mem::offset_of!(Syscall, frames) + 3 * 8;
        let decoded = decode(&record.as_bytes()[..length]).unwrap();
        assert_eq!(decoded.frames(), [1, 2, 3]);
        let Record::Syscall(decoded) = decoded else {
            panic!("wrong kind")
        };
        assert_eq!(decoded.number, 257);
    }

    #[test]
    fn a_record_cut_before_its_frames_is_refused() {
        let length = std::mem::offset_of!(Syscall, frames) + 3 * 8 - 1;
        let error = decode(&syscall(3).as_bytes()[..length]).unwrap_err();
        assert_eq!(error, DecodeError::TooShort { length });
    }

    #[test]
    fn more_frames_than_fit_are_refused() {
        let error = decode(syscall(33).as_bytes()).unwrap_err();
        assert_eq!(error, DecodeError::TooManyFrames { count: 33 });
    }

    #[test]
    fn an_unknown_kind_is_refused() {
        let mut record = syscall(0);
        record.header.kind = 0;
        assert_eq!(
            decode(record.as_bytes()).unwrap_err(),
            DecodeError::UnknownKind { kind: 0 }
        );
        record.header.kind = 200;
        assert_eq!(
            decode(record.as_bytes()).unwrap_err(),
            DecodeError::UnknownKind { kind: 200 }
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_record_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            if let Ok(record) = decode(&bytes) {
                prop_assert!(record.frames().len() <= MAX_FRAMES);
            }
        }
    }
}
