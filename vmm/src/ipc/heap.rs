//! What a process keeps of the memory that it allocated once.
//!
//! The C library keeps what is freed for the next allocation. Of hundreds of idle VMs each would keep the
//! pages that it needed to come into being.

#![expect(unsafe_code, reason = "no crate in use has the call")]

/// Gives the pages of the heap in which nothing is back to the kernel, where the C library can do that.
pub fn give_back() {
    // SAFETY: it only touches what the allocator holds as free, under its locks.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(all(test, target_env = "gnu"))]
mod tests {
    use super::*;
    use crate::words::PAGE_BYTES;

    /// Below what the C library asks the kernel for one by one.
    const BLOCK_BYTES: usize = 16 * PAGE_BYTES;

    /// Whether the whole page after `address` is in memory.
    fn is_resident(address: usize) -> bool {
        let page = address.next_multiple_of(PAGE_BYTES);
        let mut state = 0u8;
        // SAFETY: the kernel writes one byte for the one page, whatever is there.
        let result =
            unsafe { libc::mincore(std::ptr::without_provenance_mut(page), PAGE_BYTES, &raw mut state) };
        result == 0 && state & 1 == 1
    }

    #[test]
    fn what_is_free_goes_and_what_is_used_stays() {
        let blocks: Vec<Vec<u8>> = (0..64).map(|number| vec![number; BLOCK_BYTES]).collect();
        let (kept, freed): (Vec<_>, Vec<_>) = blocks.into_iter().partition(|block| block[0] % 4 == 0);
        let addresses: Vec<usize> = freed.iter().map(|block| block.as_ptr().addr() + PAGE_BYTES).collect();
        assert!(addresses.iter().all(|address| is_resident(*address)));
        drop(freed);
        give_back();
        // Other tests may have got some of it meanwhile.
        let left = addresses.iter().filter(|address| is_resident(**address)).count();
        assert!(left < addresses.len() / 2, "{left} of {} blocks are still there", addresses.len());
        assert!(kept.iter().all(|block| block.iter().all(|byte| *byte == block[0])));
    }
}
