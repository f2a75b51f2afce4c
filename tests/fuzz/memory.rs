//! Counts allocations, to detect inputs for which a parser takes more memory than allowed, whatever the result.

#![allow(
    clippy::print_stderr,
    unsafe_code,
    reason = "an allocator is unsafe by its trait, and this one hands everything on to the system's; it says itself why it ends"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Maximum memory of one input at any time, in bytes.
const MOST: usize = 256 << 20;

static TAKEN: AtomicUsize = AtomicUsize::new(0);
static BOUND: AtomicUsize = AtomicUsize::new(usize::MAX);

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn take(bytes: usize) {
    let taken = TAKEN.fetch_add(bytes, Ordering::Relaxed) + bytes;
    if taken > BOUND.load(Ordering::Relaxed) {
        // The message itself may take memory; and an allocator must not unwind.
        BOUND.store(usize::MAX, Ordering::Relaxed);
        eprintln!("the input makes its parser take {taken} bytes of memory; {MOST} are allowed");
        std::process::abort();
    }
}

fn give(bytes: usize) {
    TAKEN.fetch_sub(bytes, Ordering::Relaxed);
}

// SAFETY: every call is forwarded to the system's allocator unchanged; the counters do not affect its guarantees.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: as guaranteed by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: as guaranteed by the caller.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        give(layout.size());
        // SAFETY: as guaranteed by the caller.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        take(size);
        give(layout.size());
        // SAFETY: as guaranteed by the caller.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// Runs `what`; aborts the process if it takes more than [`MOST`] bytes at any time.
pub fn bounded(what: impl FnOnce()) {
    BOUND.store(TAKEN.load(Ordering::Relaxed) + MOST, Ordering::Relaxed);
    what();
    BOUND.store(usize::MAX, Ordering::Relaxed);
}
