//! How long the host's scheduler lets somebody run before another may have the processor.
//!
//! In a fork many wake each other, and each works for some microseconds: source, keeper, clone, and who
//! resolves the clone's first faults. Beside them a publisher works for milliseconds. Where there are
//! fewer processors than that, whoever is woken waits for the end of the slice of whoever runs: 3 ms by
//! default, many times what a fork takes. With short slices it waits 0.1 ms, and nobody gets less than
//! before. Linux has slices of one's own since 6.12; older ones ignore the wish.

#![expect(unsafe_code, reason = "no crate in use has the calls")]

use std::io;

/// The shortest that the kernel gives, in nanoseconds.
const SLICE_NS: u64 = 100_000;

/// Wishes short slices for the calling thread and for all threads and processes that it starts from now
/// on. One of a real-time or idle policy stays as it is.
///
/// # Errors
/// The host refused.
pub fn shorten_slices() -> io::Result<()> {
    let mut attributes = own_attributes()?;
    let policy = i32::try_from(attributes.sched_policy).unwrap_or(-1);
    if ![libc::SCHED_OTHER, libc::SCHED_BATCH].contains(&policy) {
        return Ok(());
    }
    attributes.sched_runtime = SLICE_NS;
    // SAFETY: the kernel reads the structure, whose size is in it, during the call.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn own_attributes() -> io::Result<libc::sched_attr> {
    let size = u32::try_from(size_of::<libc::sched_attr>()).unwrap_or(0);
    let mut attributes = libc::sched_attr {
        size,
        sched_policy: 0,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: 0,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the kernel writes at most `size` bytes, which the structure has, during the call.
    let result = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    if result == 0 { Ok(attributes) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_started_afterwards_has_short_slices_too() {
        let slice_ns = || own_attributes().map(|attributes| attributes.sched_runtime).expect("it may ask");
        let before = slice_ns();
        if before == 0 {
            println!("SKIPPED: who_is_started_afterwards_has_short_slices_too: Linux before 6.12 has none");
            return;
        }
        let nice = own_attributes().expect("it may ask").sched_nice;
        // A thread of its own: that of the test goes on to other tests.
        let (own, child) = std::thread::scope(|scope| {
            let parent = scope.spawn(|| {
                shorten_slices().expect("anybody may");
                let child = std::thread::scope(|scope| scope.spawn(slice_ns).join().expect("it asks"));
                assert_eq!(own_attributes().expect("it may ask").sched_nice, nice, "nothing else changes");
                (slice_ns(), child)
            });
            parent.join().expect("it asks")
        });
        assert_eq!((own, child), (SLICE_NS, SLICE_NS), "before: {before}");
        assert_eq!(slice_ns(), before, "who has not wished has what he had");
    }
}
