//! The command line: words `key=value`, separated by spaces.
//!
//! | key | of | meaning | default |
//! |---|---|---|---|
//! | `case` | all | the case's name | none |
//! | `cpus` | all | how many vCPUs work | all |
//! | `mib` | all but puppet | MiB that are written and checked | 8 |
//! | `rounds` | all but puppet | rounds to do, 0 for no end | 0 |
//! | `words` | touch | words written of each page, 1 to 512 | 512 |
//! | `every` | counter | counts between reports | 65536 |
//! | `rate` | churn | page writes a second of each vCPU, about; 0 for no limit | 0 |
//! | `rate` | dma | the engine's bytes per second, 0 for no limit | 0 |
//! | `companion_rate` | dma, fork | page writes a second of the vCPUs beyond the first | 10000 |
//! | `us` | idle, identity | microseconds of each sleep | 100000, identity: 1000 |
//! | `say` | idle | rounds between lines on the console, 0 for none | 0 |
//! | `who` | idle | 1: say on the console who this VM is, at first and whenever it has become another one | 0 |
//! | `wait` | idle | `sleep` (by call) or `hlt` (local APIC timer) | sleep |
//! | `nest` | fork | levels of clones that fork in their turn | 0 |
//! | `depth` | dma | transfers in flight, 1 to 128 | 4 |
//! | `bytes` | dma | longest transfer, 4096 to 1 MiB | 65536 |
//! | `delay_us` | dma | the engine's delay | 0 |
//! | `pins` | dma | pages in long-lived registered buffers, 65536 at most | 0 |
//! | `kernel` | dma | transfers by the host kernel: 0 none, 1 every other registered one, 2 all | 1 |
//! | `dirty` | dma | pages rewritten between reports, or `all` | 16 |
//! | `interrupt` | dma | 1: wait by interrupt | 0 |
//!
//! A key that is not here, or a value out of range, ends the VM with [`exit::USAGE`].
#![expect(unsafe_code, reason = "the command line lies where the loader put it")]

use core::fmt;

use salp_protocol::{exit, layout};

use crate::call;
use crate::serial::print;

const KEYS: [&str; 20] = [
    "case",
    "cpus",
    "mib",
    "rounds",
    "words",
    "say",
    "every",
    "rate",
    "companion_rate",
    "us",
    "who",
    "wait",
    "nest",
    "depth",
    "bytes",
    "delay_us",
    "pins",
    "kernel",
    "dirty",
    "interrupt",
];

/// The options of this run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    line: &'static str,
}

impl Options {
    /// Reads the loader's command line and refuses unknown keys.
    pub(crate) fn read() -> Self {
        // SAFETY: the loader keeps COMMAND_LINE_BYTES there, and nobody changes them.
        let bytes = unsafe {
            core::slice::from_raw_parts(
                core::ptr::with_exposed_provenance::<u8>(layout::COMMAND_LINE as usize),
                layout::COMMAND_LINE_BYTES,
            )
        };
        let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
        let Ok(line) = core::str::from_utf8(&bytes[..end]) else {
            usage(format_args!("the command line is not UTF-8"))
        };
        let options = Self { line };
        for (key, _) in options.pairs() {
            if !KEYS.contains(&key) {
                usage(format_args!("unknown option {key}"));
            }
        }
        options
    }

    fn pairs(self) -> impl Iterator<Item = (&'static str, &'static str)> {
        self.line.split_ascii_whitespace().map(|word| word.split_once('=').unwrap_or((word, "")))
    }

    /// The value of `key`; the last one counts.
    pub(crate) fn text(self, key: &str) -> Option<&'static str> {
        self.pairs().filter(|&(k, _)| k == key).last().map(|(_, value)| value)
    }

    /// The number at `key`, or `default`.
    pub(crate) fn number(self, key: &str, default: u64) -> u64 {
        self.text(key).map_or(default, |text| match text.parse() {
            Ok(number) => number,
            Err(_) => usage(format_args!("{key}={text} is not a number")),
        })
    }

    /// As [`number`](Self::number), refused outside `least..=most`.
    pub(crate) fn number_in(self, key: &str, default: u64, least: u64, most: u64) -> u64 {
        let number = self.number(key, default);
        if number < least || number > most {
            usage(format_args!("{key}={number} is not in {least} to {most}"));
        }
        number
    }
}

/// Ends the VM: it was asked for something that cannot be done.
pub(crate) fn usage(text: fmt::Arguments<'_>) -> ! {
    print(text);
    call::exit(exit::USAGE)
}
