//! One request: what its descriptor alleges, checked once, and its progress.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use salp_protocol::dma::{BUFFER_SLOTS, Descriptor, MAX_TRANSFER_BYTES, flag, operation, status};

use crate::devices::backing::{ReadPlan, WritePlan};
use crate::devices::memory::{Buffer, Span};
use crate::words::{Gpa, index, wide};

/// Bytes in a descriptor.
pub(super) const DESCRIPTOR_BYTES: usize = size_of::<Descriptor>();
/// Where `result` is in a descriptor.
pub(super) const RESULT_OFFSET: u64 = std::mem::offset_of!(Descriptor, result) as u64;
/// Where `status` is in a descriptor.
pub(super) const STATUS_OFFSET: u64 = std::mem::offset_of!(Descriptor, status) as u64;

const KNOWN_FLAGS: u16 = flag::INTERRUPT | flag::REGISTERED | flag::KERNEL;
/// The largest step of the engine's own threads, so that a cut finds a slow transfer part-done.
const MAX_CHUNK_BYTES: usize = 64 << 10;
const MIN_CHUNK_BYTES: usize = 4096;

/// Reads the fields of a descriptor from its 64 bytes.
pub(super) fn decode(bytes: &[u8; DESCRIPTOR_BYTES]) -> Descriptor {
    fn field<const N: usize>(bytes: &[u8; DESCRIPTOR_BYTES], at: usize) -> [u8; N] {
        let mut field = [0; N];
        field.copy_from_slice(&bytes[at..at + N]);
        field
    }
    use std::mem::offset_of;
    Descriptor {
        operation: u16::from_le_bytes(field(bytes, offset_of!(Descriptor, operation))),
        flags: u16::from_le_bytes(field(bytes, offset_of!(Descriptor, flags))),
        length: u32::from_le_bytes(field(bytes, offset_of!(Descriptor, length))),
        source: u64::from_le_bytes(field(bytes, offset_of!(Descriptor, source))),
        destination: u64::from_le_bytes(field(bytes, offset_of!(Descriptor, destination))),
        slot: u32::from_le_bytes(field(bytes, offset_of!(Descriptor, slot))),
        reserved: u32::from_le_bytes(field(bytes, offset_of!(Descriptor, reserved))),
        cookie: u64::from_le_bytes(field(bytes, offset_of!(Descriptor, cookie))),
        result: 0,
        status: status::PENDING,
        padding: [
            u64::from_le_bytes(field(bytes, offset_of!(Descriptor, padding))),
            u64::from_le_bytes(field(bytes, offset_of!(Descriptor, padding) + 8)),
        ],
    }
}

/// What a descriptor that makes sense asks for. Addresses are not checked yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Read { offset: u64, to: Gpa },
    Write { from: Gpa, offset: u64 },
    Copy { from: Gpa, to: Gpa },
}

/// Checks all of a descriptor that needs neither memory nor backing.
///
/// A copy whose ranges overlap is refused: done in part before a cut, it could not be done again.
pub(super) fn check(descriptor: &Descriptor) -> Result<Order, u32> {
    let flags = descriptor.flags;
    let sane = flags & !KNOWN_FLAGS == 0
        && (1..=MAX_TRANSFER_BYTES).contains(&descriptor.length)
        && descriptor.reserved == 0
        && descriptor.padding == [0; 2]
        && (flags & flag::REGISTERED == 0 || index(descriptor.slot.into()) < BUFFER_SLOTS);
    if !sane {
        return Err(status::INVALID);
    }
    let (source, destination) = (descriptor.source, descriptor.destination);
    let length = u64::from(descriptor.length);
    if source.checked_add(length).is_none() || destination.checked_add(length).is_none() {
        let known = (operation::READ..=operation::COPY).contains(&descriptor.operation);
        return Err(if known { status::OUT_OF_RANGE } else { status::INVALID });
    }
    match descriptor.operation {
        operation::READ => Ok(Order::Read { offset: source, to: Gpa(destination) }),
        operation::WRITE => Ok(Order::Write { from: Gpa(source), offset: destination }),
        operation::COPY => {
            let overlap = source < destination + length && destination < source + length;
            if overlap || flags & flag::KERNEL != 0 {
                return Err(status::INVALID);
            }
            Ok(Order::Copy { from: Gpa(source), to: Gpa(destination) })
        }
        _ => Err(status::INVALID),
    }
}

/// The two ends of a transfer, pinned and planned.
pub(super) enum Work {
    Read {
        plan: ReadPlan,
        to: Span,
    },
    Write {
        plan: WritePlan,
        from: Span,
    },
    Copy {
        from: Span,
        to: Span,
    },
    /// On a pipe, from it if `read`.
    Pipe {
        span: Span,
        read: bool,
    },
}

/// A request under way.
pub(super) struct Request {
    pub(super) number: u64,
    pub(super) flags: u16,
    pub(super) len_bytes: usize,
    pub(super) moved_bytes: usize,
    pub(super) began: Instant,
    /// How long it takes at least.
    pub(super) duration: Duration,
    pub(super) work: Work,
}

impl Request {
    /// The pinned memory that the host kernel moves data to or from, for READ and WRITE.
    pub(super) fn span(&self) -> &Span {
        match &self.work {
            Work::Read { to, .. } | Work::Copy { to, .. } => to,
            Work::Write { from, .. } => from,
            Work::Pipe { span, .. } => span,
        }
    }

    /// Whether the host kernel moves the data.
    pub(super) fn by_kernel(&self) -> bool {
        self.flags & flag::KERNEL != 0 || matches!(self.work, Work::Pipe { .. })
    }

    pub(super) fn buffer(&self) -> &Arc<Buffer> {
        &self.span().buffer
    }

    fn chunk_bytes(&self) -> usize {
        let sixteenth = (self.len_bytes / 16).next_multiple_of(MIN_CHUNK_BYTES);
        sixteenth.clamp(MIN_CHUNK_BYTES, MAX_CHUNK_BYTES)
    }

    /// When the next step is due: each chunk is moved at the end of its share of the duration, the
    /// last one at the end of it all. The kernel's transfers begin when the duration is over.
    pub(super) fn next_due(&self) -> Instant {
        if self.by_kernel() {
            return self.began + self.duration;
        }
        let chunk = self.chunk_bytes();
        let count = u128::from(wide(self.len_bytes.div_ceil(chunk)));
        let next = u128::from(wide(self.moved_bytes / chunk + 1)).min(count);
        let nanos = self.duration.as_nanos() * next / count.max(1);
        self.began + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Moves the chunks that are due at `now`.
    pub(super) fn step(&mut self, now: Instant) -> io::Result<()> {
        while self.moved_bytes < self.len_bytes && self.next_due() <= now {
            let from = self.moved_bytes;
            let to = (from + self.chunk_bytes()).min(self.len_bytes);
            match &self.work {
                Work::Read { plan, to: span } => plan.transfer(span, from, to)?,
                Work::Write { plan, from: span } => plan.transfer(span, from, to)?,
                Work::Copy { from: source, to: span } => span.copy_from(source, from, to - from),
                Work::Pipe { .. } => return Err(io::ErrorKind::Unsupported.into()),
            }
            self.moved_bytes = to;
        }
        Ok(())
    }

    /// Whether all bytes are moved.
    pub(super) fn is_moved(&self) -> bool {
        self.moved_bytes == self.len_bytes
    }
}

/// How long a transfer takes at least.
pub(super) fn duration(delay_us: u64, rate: u64, len_bytes: usize) -> Duration {
    let delay = Duration::from_micros(delay_us);
    if rate == 0 {
        return delay;
    }
    // At most 1 MiB at 1 byte a second: far inside u64 nanoseconds.
    let nanos = u128::from(wide(len_bytes)) * 1_000_000_000 / u128::from(rate);
    delay.max(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
}
