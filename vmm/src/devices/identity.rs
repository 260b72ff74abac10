//! The identity device of `salp_protocol::identity`: who this VM is, a generation that grows whenever it
//! becomes another one, a seed of its own, and what whoever forked it has to tell it.
//!
//! The page is what the guest reads, byte for byte, and the device's only state. A cut saves the
//! generation and what the guest has set; the rest is made anew for the clone, and after a reset. The seed
//! comes from the host's kernel straight into the page of the process whose VM it is, is in no message or
//! snapshot, and is wiped with the page.
//!
//! # Known holes
//! A pending interrupt is all that a guest gets ahead of its first instruction: code that runs with
//! interrupts off goes on until it lets them in.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use salp_protocol::identity::{DATA_BYTES, INTERRUPT_ENABLE, MAGIC, NAME_BYTES, SEED_BYTES, register};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::gate::HeldGate;
use super::{InterruptLine, lock};
use crate::words::{PAGE_BYTES, index, wide};

/// What a VM is told of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its name, 1 to 128 bytes without NUL.
    pub name: String,
    /// Which clone of its fork it is.
    pub index: u32,
    /// Whatever else: keys without `=` and NUL, values without NUL, 3,072 bytes at most with a `=` and a
    /// NUL for each.
    pub data: BTreeMap<String, String>,
}

/// Why a VM cannot be told something, or is not made somebody.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The name.
    #[error("a vm's name has 1 to {NAME_BYTES} bytes and no NUL: {0:?} has {len}", len = .0.len())]
    Name(String),
    /// A key or its value.
    #[error("a key has neither '=' nor NUL and is not empty, a value has no NUL: {key:?}")]
    Pair {
        /// The key.
        key: String,
    },
    /// All of it.
    #[error(
        "a vm's data take {len_bytes} bytes, {DATA_BYTES} at most, a '=' and a NUL for each pair included"
    )]
    Data {
        /// Their length.
        len_bytes: usize,
    },
    /// The host has no random bytes.
    #[error("the host gives no seed: {0}")]
    Seed(#[from] rustix::io::Errno),
}

impl Identity {
    /// Whether the device can show it.
    ///
    /// # Errors
    /// What is too long, or has bytes that mean something else.
    pub fn check(&self) -> Result<(), IdentityError> {
        if !(1..=NAME_BYTES).contains(&self.name.len()) || self.name.contains('\0') {
            return Err(IdentityError::Name(self.name.clone()));
        }
        for (key, value) in &self.data {
            if key.is_empty() || key.contains(['=', '\0']) || value.contains('\0') {
                return Err(IdentityError::Pair { key: key.clone() });
            }
        }
        let len_bytes = self.block().len();
        if len_bytes > DATA_BYTES { Err(IdentityError::Data { len_bytes }) } else { Ok(()) }
    }

    /// The data as the guest reads them.
    fn block(&self) -> Vec<u8> {
        self.data.iter().flat_map(|(key, value)| format!("{key}={value}\0").into_bytes()).collect()
    }
}

/// What a cut saves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityState {
    /// Whose clone it was, and how often it was reset.
    pub generation: u64,
    /// The interrupt, as the guest has set it.
    pub interrupt: u64,
}

/// How the device reaches the processor.
#[derive(Clone)]
pub struct IdentityInterrupt {
    /// The line.
    pub line: Arc<dyn InterruptLine>,
    /// The pin raised on it; without one it is the vector that the guest has chosen.
    pub pin: Option<u8>,
}

/// Who is told the generation with which a guest has come to terms. Called on the vCPU's thread; must not
/// wait.
pub type ReadyBell = Box<dyn Fn(u64) + Send + Sync>;

/// See the module.
pub struct IdentityDevice {
    page: Mutex<Page>,
    interrupt: IdentityInterrupt,
    bell: ReadyBell,
}

/// What [`register::READY`] reads before the guest has said anything.
const NOT_READY: u64 = u64::MAX;
/// What of [`register::INTERRUPT`] means something.
const INTERRUPT_BITS: u64 = INTERRUPT_ENABLE | 0xff;

/// The registers.
struct Page(Zeroizing<Vec<u8>>);

impl Page {
    fn put(&mut self, offset: u64, bytes: &[u8]) {
        let at = index(offset);
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn put_word(&mut self, offset: u64, value: u64) {
        self.put(offset, &value.to_le_bytes());
    }

    fn word(&self, offset: u64) -> u64 {
        let at = index(offset);
        u64::from_le_bytes(self.0[at..at + 8].try_into().expect("8 bytes"))
    }

    fn seed(&mut self) -> Result<(), IdentityError> {
        let at = index(register::SEED);
        let mut empty = &mut self.0[at..at + SEED_BYTES];
        while !empty.is_empty() {
            let filled = rustix::rand::getrandom(&mut *empty, rustix::rand::GetRandomFlags::empty())?;
            empty = &mut empty[filled..];
        }
        Ok(())
    }
}

impl IdentityDevice {
    /// The device of a VM that is `identity` in `state`'s generation, with a new seed.
    ///
    /// # Errors
    /// The device cannot show it, or the host has no seed.
    pub fn new(
        identity: &Identity,
        state: IdentityState,
        interrupt: IdentityInterrupt,
        bell: ReadyBell,
    ) -> Result<Self, IdentityError> {
        identity.check()?;
        let mut page = Page(Zeroizing::new(vec![0; PAGE_BYTES]));
        let block = identity.block();
        page.put_word(register::MAGIC, MAGIC);
        page.put_word(register::GENERATION, state.generation);
        page.put_word(register::INDEX, identity.index.into());
        page.put_word(register::NAME_LENGTH, wide(identity.name.len()));
        page.put_word(register::DATA_LENGTH, wide(block.len()));
        page.put_word(register::INTERRUPT, state.interrupt & INTERRUPT_BITS);
        page.put_word(register::INTERRUPT_PIN, interrupt.pin.unwrap_or(0).into());
        page.put_word(register::READY, NOT_READY);
        page.put(register::NAME, identity.name.as_bytes());
        page.put(register::DATA, &block);
        page.seed()?;
        Ok(Self { page: Mutex::new(page), interrupt, bell })
    }

    /// A guest's load at `offset` of the page. One that is not all in the page reads all ones.
    pub fn mmio_read(&self, offset: u64, into: &mut [u8]) {
        let page = lock(&self.page);
        let range = usize::try_from(offset).ok().and_then(|at| Some(at..at.checked_add(into.len())?));
        match range.and_then(|range| page.0.get(range)) {
            Some(bytes) => into.copy_from_slice(bytes),
            None => into.fill(0xff),
        }
    }

    /// A guest's store of `from` at `offset` of the page.
    pub fn mmio_write(&self, offset: u64, from: &[u8]) {
        let value = match (<[u8; 8]>::try_from(from), <[u8; 4]>::try_from(from)) {
            (Ok(value), _) => u64::from_le_bytes(value),
            (_, Ok(value)) => u32::from_le_bytes(value).into(),
            _ => return,
        };
        let mut page = lock(&self.page);
        match offset {
            register::INTERRUPT => page.put_word(register::INTERRUPT, value & INTERRUPT_BITS),
            register::READY if value == page.word(register::GENERATION) => {
                page.put_word(register::READY, value);
                drop(page);
                (self.bell)(value);
            }
            _ => {}
        }
    }

    /// What a cut saves. The gate is held and the vCPUs are stopped.
    #[must_use]
    pub fn save(&self, _held: &HeldGate) -> IdentityState {
        let page = lock(&self.page);
        IdentityState {
            generation: page.word(register::GENERATION),
            interrupt: page.word(register::INTERRUPT),
        }
    }

    /// Raises the interrupt, if the guest wants it: its vCPUs, which are stopped and have their state, find
    /// it pending.
    pub fn announce(&self) {
        let interrupt = lock(&self.page).word(register::INTERRUPT);
        if interrupt & INTERRUPT_ENABLE != 0 {
            let [vector, ..] = interrupt.to_le_bytes();
            self.interrupt.line.raise(self.interrupt.pin.unwrap_or(vector));
        }
    }
}

impl fmt::Debug for IdentityDevice {
    /// Without the page: it has the seed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdentityDevice").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::devices::gate::CompletionGate;
    use crate::devices::testing::CountingLine;

    fn device(state: IdentityState) -> (IdentityDevice, Arc<CountingLine>, Arc<AtomicU64>) {
        let data = [("k", "v"), ("empty", "")].map(|(key, value)| (key.to_owned(), value.to_owned()));
        let identity = Identity { name: "a-1".to_owned(), index: 7, data: data.into() };
        let (line, told) = (CountingLine::new(), Arc::new(AtomicU64::new(0)));
        let for_bell = Arc::clone(&told);
        let bell = Box::new(move |generation| {
            for_bell.fetch_add(generation, Ordering::Relaxed);
        });
        let wire = IdentityInterrupt { line: Arc::<CountingLine>::clone(&line), pin: None };
        (IdentityDevice::new(&identity, state, wire, bell).expect("it can be shown"), line, told)
    }

    fn word(device: &IdentityDevice, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        device.mmio_read(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn bytes(device: &IdentityDevice, offset: u64, count: u64) -> Vec<u8> {
        let byte = |at| {
            let mut byte = [0];
            device.mmio_read(offset + at, &mut byte);
            byte[0]
        };
        (0..count).map(byte).collect()
    }

    #[test]
    fn a_guest_reads_who_it_is() {
        let (device, ..) = device(IdentityState { generation: 3, interrupt: u64::MAX });
        assert_eq!(word(&device, register::MAGIC).to_le_bytes(), *b"salp-id1");
        assert_eq!((word(&device, register::GENERATION), word(&device, register::INDEX)), (3, 7));
        assert_eq!(bytes(&device, register::NAME, word(&device, register::NAME_LENGTH)), b"a-1");
        assert_eq!(bytes(&device, register::DATA, word(&device, register::DATA_LENGTH)), b"empty=\0k=v\0");
        assert_eq!(word(&device, register::INTERRUPT), 0x1ff);
        assert_ne!(bytes(&device, register::SEED, 32), [0; 32]);
        let saved = device.save(&CompletionGate::new().hold());
        assert_eq!(saved, IdentityState { generation: 3, interrupt: 0x1ff });
    }

    #[test]
    fn hostile_accesses_reach_nothing_else() {
        let (device, line, told) = device(IdentityState::default());
        let before = bytes(&device, 0, 4096);
        for offset in (0..4096).chain([4096, u64::MAX - 3, u64::MAX]) {
            for length in [1, 2, 3, 4, 7, 8, 16] {
                if ![register::INTERRUPT, register::READY].contains(&offset) {
                    device.mmio_write(offset, &[0xff; 16][..length]);
                }
                let mut into = [0; 16];
                device.mmio_read(offset, &mut into[..length]);
                let at = index(offset);
                let expected = before.get(at..at.saturating_add(length)).unwrap_or(&[0xff; 16][..length]);
                assert_eq!(&into[..length], expected, "{length} bytes at {offset:#x}");
            }
        }
        // Sizes that the two registers do not know, and a generation that is not this one.
        for (offset, length) in [(register::INTERRUPT, 2), (register::READY, 1), (register::READY, 16)] {
            device.mmio_write(offset, &[0; 16][..length]);
        }
        device.mmio_write(register::READY, &1_u64.to_le_bytes());
        assert_eq!(bytes(&device, 0, 4096), before);
        device.announce();
        assert_eq!((line.raised(0xff), line.raised(0), told.load(Ordering::Relaxed)), (0, 0, 0));
    }

    #[test]
    fn the_guest_says_that_it_is_ready_and_wants_interrupts() {
        let (device, line, told) = device(IdentityState { generation: 5, interrupt: 0 });
        device.mmio_write(register::INTERRUPT, &(INTERRUPT_ENABLE | 0x41).to_le_bytes());
        device.announce();
        assert_eq!(line.raised(0x41), 1);
        assert_eq!(word(&device, register::READY), u64::MAX);
        device.mmio_write(register::READY, &5_u32.to_le_bytes());
        assert_eq!((word(&device, register::READY), told.load(Ordering::Relaxed)), (5, 5));
    }

    #[test]
    fn two_devices_have_two_seeds() {
        let state = IdentityState::default();
        let [one, other] = [device(state).0, device(state).0].map(|it| bytes(&it, register::SEED, 32));
        assert_ne!(one, other);
    }

    #[test]
    fn what_cannot_be_shown_is_refused() {
        let named = |name: &str| Identity { name: name.to_owned(), ..Identity::default() };
        named(&"n".repeat(NAME_BYTES)).check().expect("the longest name");
        for name in [String::new(), "a\0".to_owned(), "n".repeat(NAME_BYTES + 1)] {
            assert!(matches!(named(&name).check(), Err(IdentityError::Name(_))), "{name:?}");
        }
        let with = |key: &str, value: &str| Identity {
            data: [(key.to_owned(), value.to_owned())].into(),
            ..named("n")
        };
        for (key, value) in [("", "v"), ("a=b", "v"), ("a\0", "v"), ("a", "\0")] {
            assert!(matches!(with(key, value).check(), Err(IdentityError::Pair { .. })), "{key:?}");
        }
        with("k", &"v".repeat(DATA_BYTES - 3)).check().expect("all the room there is");
        let error = with("k", &"v".repeat(DATA_BYTES - 2)).check().expect_err("a byte more");
        assert!(error.to_string().contains("take 3073 bytes, 3072 at most"), "{error}");
    }
}
