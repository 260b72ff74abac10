//! [`Channel`]: whole messages, with descriptors, between two processes.
//!
//! # Protocol
//! One message is one datagram of an `AF_UNIX` `SOCK_SEQPACKET` socket pair. Its first byte says how
//! it travels: [`INLINE`], the message in postcard follows; [`CARRIED`], its length follows (8 bytes,
//! little-endian) and the message is in a sealed memfd, the first of the datagram's descriptors.
//! Messages above [`INLINE_LIMIT_BYTES`] are carried, so the socket's buffer is no limit.
//!
//! The kernel keeps datagrams whole, so any number of threads may send and receive on one channel
//! without a lock; a descriptor always arrives with its message. Everything is close-on-exec.
//!
//! # Holes
//! A sender blocks while the peer's buffer is full, unless [`Channel::set_send_timeout`] was called.

use std::any::type_name;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, RecvMsg, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg,
    socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::IpcError;
use crate::failure;
use crate::words::{index, wide};

/// Longer messages travel in a memfd. A datagram of this size needs no large kernel allocation.
pub const INLINE_LIMIT_BYTES: usize = 16 << 10;
/// The longest message that a receiver accepts.
pub const MESSAGE_LIMIT_BYTES: usize = 256 << 20;
/// The most descriptors in one message: the kernel's 253 (`SCM_MAX_FD`) less the one that may carry it.
pub const DESCRIPTOR_LIMIT: usize = KERNEL_DESCRIPTOR_LIMIT - 1;

const KERNEL_DESCRIPTOR_LIMIT: usize = 253;
const CONTROL_BYTES: usize = rustix::cmsg_space!(ScmRights(KERNEL_DESCRIPTOR_LIMIT));

/// First byte of a datagram: the message follows.
const INLINE: u8 = 1;
/// First byte of a datagram: the message is in the first descriptor.
const CARRIED: u8 = 2;

/// What no one may do to a carrier any more, so that it cannot change while it is read.
const CARRIER_SEALS: SealFlags = SealFlags::WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW);

/// How long a patient sender tries, and how long it waits in between: memory that is short comes back
/// without a sign.
const PATIENCE: Duration = Duration::from_millis(500);
const PAUSE: Duration = Duration::from_millis(2);

/// One end of a two-way stream of messages.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

/// A datagram as it came: how it travels, its bytes, its descriptors.
struct Datagram {
    kind: u8,
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Channel {
    /// Two connected ends.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn pair() -> Result<(Self, Self), IpcError> {
        let (here, there) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(|error| IpcError::host("create a socket pair", error))?;
        Ok((Self { socket: here }, Self { socket: there }))
    }

    /// An end made by [`pair`](Self::pair) in another process and handed to this one.
    ///
    /// # Errors
    /// The descriptor is not a sequential-packet socket.
    pub fn from_fd(socket: OwnedFd) -> Result<Self, IpcError> {
        let kind = sockopt::socket_type(&socket)
            .map_err(|error| IpcError::host("ask a descriptor for its socket type", error))?;
        if kind != SocketType::SEQPACKET {
            return Err(IpcError::Malformed { reason: "not a sequential-packet socket" });
        }
        Ok(Self { socket })
    }

    /// This end's descriptor, to hand it on.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.socket
    }

    /// Makes [`send`](Self::send) fail with [`IpcError::TimedOut`] where the peer leaves its buffer
    /// full for so long; `None` (as created): it waits for ever.
    ///
    /// # Errors
    /// The duration is zero or too long for the host.
    pub fn set_send_timeout(&self, timeout: Option<Duration>) -> Result<(), IpcError> {
        sockopt::set_socket_timeout(&self.socket, Timeout::Send, timeout)
            .map_err(|error| IpcError::host("set a channel's send timeout", error))
    }

    /// Sends `message`, and duplicates of `descriptors` with it. Many threads may send at once.
    ///
    /// # Errors
    /// [`IpcError::Closed`] where the peer is gone; [`IpcError::TooMuch`] above [`DESCRIPTOR_LIMIT`]
    /// or [`MESSAGE_LIMIT_BYTES`]. Nothing was sent then.
    pub fn send<T: Serialize>(&self, message: &T, descriptors: &[BorrowedFd<'_>]) -> Result<(), IpcError> {
        if descriptors.len() > DESCRIPTOR_LIMIT {
            let count = descriptors.len();
            return Err(IpcError::TooMuch { what: "descriptors", count, limit: DESCRIPTOR_LIMIT });
        }
        let bytes = postcard::to_stdvec(message).map_err(|source| IpcError::Encoding {
            kind: type_name::<T>(),
            len_bytes: 0,
            source,
        })?;
        if bytes.len() <= INLINE_LIMIT_BYTES {
            return self.transmit(INLINE, &bytes, descriptors);
        }
        if bytes.len() > MESSAGE_LIMIT_BYTES {
            return Err(IpcError::TooMuch { what: "bytes", count: bytes.len(), limit: MESSAGE_LIMIT_BYTES });
        }
        failure::point("channel.carrier")?;
        let carrier =
            fill_carrier(&bytes).map_err(|error| IpcError::host("put a message in a memfd", error))?;
        let mut with_carrier = Vec::with_capacity(descriptors.len() + 1);
        with_carrier.push(carrier.as_fd());
        with_carrier.extend_from_slice(descriptors);
        self.transmit(CARRIED, &wide(bytes.len()).to_le_bytes(), &with_carrier)
    }

    /// As [`send`](Self::send), and again for half a second where the host refuses: for what is lost if it
    /// is not sent now.
    ///
    /// # Errors
    /// As there.
    pub fn send_patiently<T: Serialize>(
        &self,
        message: &T,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), IpcError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.send(message, descriptors) {
                Err(IpcError::Host { .. }) if Instant::now() < deadline => std::thread::sleep(PAUSE),
                result => return result,
            }
        }
    }

    /// Waits for the next message and its descriptors; `None` once the peer is gone and all that it
    /// sent has been received.
    ///
    /// # Errors
    /// The message is not a `T`, or the host has no memory left for it; the message is lost then, the
    /// channel goes on. Where the host has no descriptors left, the message comes without any: who
    /// expects some looks whether they are there.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>, IpcError> {
        self.receive_until(None)
    }

    /// As [`receive`](Self::receive), but waits for at most `limit`.
    ///
    /// # Errors
    /// As there, and [`IpcError::TimedOut`].
    pub fn receive_within<T: DeserializeOwned>(
        &self,
        limit: Duration,
    ) -> Result<Option<(T, Vec<OwnedFd>)>, IpcError> {
        self.receive_until(Some((Instant::now(), limit)))
    }

    fn receive_until<T: DeserializeOwned>(
        &self,
        limit: Option<(Instant, Duration)>,
    ) -> Result<Option<(T, Vec<OwnedFd>)>, IpcError> {
        let Some(datagram) = self.next_datagram(limit)? else {
            return Ok(None);
        };
        let (bytes, descriptors) = datagram.into_message()?;
        let encoding = |source| IpcError::Encoding { kind: type_name::<T>(), len_bytes: bytes.len(), source };
        let (message, rest) = postcard::take_from_bytes(&bytes).map_err(encoding)?;
        if !rest.is_empty() {
            return Err(IpcError::Malformed { reason: "bytes are left over after the message" });
        }
        Ok(Some((message, descriptors)))
    }

    fn transmit(&self, kind: u8, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), IpcError> {
        let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            let limit = KERNEL_DESCRIPTOR_LIMIT;
            return Err(IpcError::TooMuch { what: "descriptors", count: descriptors.len(), limit });
        }
        let kind = [kind];
        let parts = [IoSlice::new(&kind), IoSlice::new(bytes)];
        failure::point("channel.send")?;
        loop {
            match sendmsg(&self.socket, &parts, &mut control, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(IpcError::Closed),
                Err(Errno::AGAIN) => {
                    // no failure point: it is for the error's text
                    let limit = sockopt::socket_timeout(&self.socket, Timeout::Send);
                    let waited = limit.ok().flatten().unwrap_or_default();
                    return Err(IpcError::TimedOut { action: "send a message", waited });
                }
                Err(error) => return Err(IpcError::host("send a message", error)),
            }
        }
    }

    fn next_datagram(&self, limit: Option<(Instant, Duration)>) -> Result<Option<Datagram>, IpcError> {
        let mut kind = [0];
        let mut bytes = vec![0; INLINE_LIMIT_BYTES];
        loop {
            self.await_input(limit)?;
            let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut kind), IoSliceMut::new(&mut bytes)];
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            // no failure point: what it can be short of is descriptors, see below
            let RecvMsg { bytes: length, flags, .. } =
                match recvmsg(&self.socket, &mut parts, &mut control, flags) {
                    Ok(received) => received,
                    // Another thread was faster; or the peer closed without reading all that it was
                    // sent, which the socket reports once, before what the peer itself had sent.
                    Err(Errno::AGAIN | Errno::INTR | Errno::CONNRESET) => continue,
                    Err(error) => return Err(IpcError::host("receive a message", error)),
                };
            let descriptors = control.drain().filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                _ => None,
            });
            let mut descriptors: Vec<OwnedFd> = descriptors.flatten().collect();
            let is_lost = !descriptors.is_empty() && failure::point("channel.descriptors").is_err();
            if flags.contains(ReturnFlags::CTRUNC) || is_lost {
                tracing::error!("this process has no descriptors left for those of a message");
                // Some are worse than none, but for the one that the message itself is in.
                descriptors.truncate(usize::from(kind[0] == CARRIED));
            }
            if flags.contains(ReturnFlags::TRUNC) {
                return Err(IpcError::Malformed { reason: "datagram longer than any that salp sends" });
            }
            // Every datagram has its first byte: none at all means the end.
            let Some(payload) = length.checked_sub(kind.len()) else {
                return Ok(None);
            };
            bytes.truncate(payload);
            return Ok(Some(Datagram { kind: kind[0], bytes, descriptors }));
        }
    }

    fn await_input(&self, limit: Option<(Instant, Duration)>) -> Result<(), IpcError> {
        loop {
            let left = limit.map(|(start, limit)| limit.saturating_sub(start.elapsed()));
            let left = left.and_then(|time| Timespec::try_from(time).ok());
            let mut polled = [PollFd::new(&self.socket, PollFlags::IN)];
            match (poll(&mut polled, left.as_ref()), limit) {
                (Ok(0), Some((_, waited))) => {
                    return Err(IpcError::TimedOut { action: "receive a message", waited });
                }
                (Ok(0) | Err(Errno::INTR), _) => {}
                (Ok(_), _) => return Ok(()),
                (Err(error), _) => return Err(IpcError::host("wait for a message", error)),
            }
        }
    }
}

impl AsFd for Channel {
    /// To poll: readable when a message or the end is there.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Datagram {
    /// The message's bytes, fetched from the carrier where there is one, and the sender's descriptors.
    fn into_message(mut self) -> Result<(Vec<u8>, Vec<OwnedFd>), IpcError> {
        match self.kind {
            INLINE => Ok((self.bytes, self.descriptors)),
            CARRIED => {
                let Ok(len_bytes) = <[u8; 8]>::try_from(self.bytes.as_slice()) else {
                    return Err(IpcError::Malformed { reason: "length of a carried message is not 8 bytes" });
                };
                if self.descriptors.is_empty() {
                    return Err(IpcError::Malformed { reason: "carried message without its memfd" });
                }
                let carrier = self.descriptors.remove(0);
                let bytes = read_carrier(carrier, index(u64::from_le_bytes(len_bytes)))?;
                Ok((bytes, self.descriptors))
            }
            _ => Err(IpcError::Malformed { reason: "unknown kind of datagram" }),
        }
    }
}

/// A sealed memfd that holds `bytes`.
fn fill_carrier(bytes: &[u8]) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // no failure point: channel.carrier stands for all three
    let mut carrier = File::from(rustix::fs::memfd_create("salp-message", flags)?);
    carrier.write_all(bytes)?;
    rustix::fs::fcntl_add_seals(&carrier, CARRIER_SEALS)?;
    Ok(carrier)
}

fn read_carrier(carrier: OwnedFd, len_bytes: usize) -> Result<Vec<u8>, IpcError> {
    if len_bytes > MESSAGE_LIMIT_BYTES {
        return Err(IpcError::TooMuch { what: "bytes", count: len_bytes, limit: MESSAGE_LIMIT_BYTES });
    }
    // no failure point: all that it asks for is in memory
    let seals = rustix::fs::fcntl_get_seals(&carrier)
        .map_err(|error| IpcError::host("read the seals of a carried message", error))?;
    if !seals.contains(CARRIER_SEALS) {
        return Err(IpcError::Malformed { reason: "memfd of a carried message is not sealed" });
    }
    let mut bytes = vec![0; len_bytes];
    // no failure point: it is in memory
    // At offset 0: the file position came along with the descriptor and stands at the end.
    File::from(carrier)
        .read_exact_at(&mut bytes, 0)
        .map_err(|error| IpcError::host("read a carried message", error))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests;
