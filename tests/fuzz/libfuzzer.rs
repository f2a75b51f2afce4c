//! Runs a target under libFuzzer: `UPPERDECK_FUZZ_TARGET=TARGET fuzz [libFuzzer's own arguments]`, or `list` for a list
//! of them. The target is in a variable because libFuzzer starts itself again with arguments of its own.

#![allow(
    unsafe_code,
    reason = "libFuzzer is a C library: it takes a pointer to its arguments and gives one to the input"
)]

use std::ffi::{CString, c_char, c_int};
use std::process::ExitCode;
use std::sync::OnceLock;

use crate::Target;

unsafe extern "C" {
    fn LLVMFuzzerRunDriver(
        argc: *mut c_int,
        argv: *mut *mut *mut c_char,
        callback: extern "C" fn(*const u8, usize) -> c_int,
    ) -> c_int;
}

static TARGET: OnceLock<&'static Target> = OnceLock::new();

extern "C" fn callback(data: *const u8, size: usize) -> c_int {
    let input = if size == 0 {
        &[][..]
    } else {
        // SAFETY: libFuzzer passes `size` bytes that stay valid until this function returns.
        unsafe { std::slice::from_raw_parts(data, size) }
    };
    if let Some(target) = TARGET.get() {
        target.try_input(input);
    }
    0
}

/// Runs libFuzzer on the target named by the variable; returns `None` if it is not set.
pub fn main(targets: &'static [Target]) -> Option<ExitCode> {
    let name = std::env::var("UPPERDECK_FUZZ_TARGET").ok()?;
    let mut words = std::env::args();
    let program = words.next()?;
    let Some(target) = targets.iter().find(|target| target.name == name) else {
        for target in targets {
            println!("{}", target.name);
        }
        return Some(if name == "list" {
            ExitCode::SUCCESS
        } else {
            ExitCode::from(2)
        });
    };
    let _ = TARGET.set(target);
    // A panic is a failure, even where it would be caught.
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        usual(panic);
        std::process::abort();
    }));
    let longest = format!("-max_len={}", target.longest);
    let words: Vec<CString> = std::iter::once(program)
        .chain([longest])
        .chain(words)
        .filter_map(|word| CString::new(word).ok())
        .collect();
    let mut pointers: Vec<*mut c_char> =
        words.iter().map(|word| word.as_ptr().cast_mut()).collect();
    let mut argc = c_int::try_from(pointers.len()).ok()?;
    pointers.push(std::ptr::null_mut());
    let mut argv = pointers.as_mut_ptr();
    // SAFETY: argc and argv are as for C's `main`, and outlive the call.
    let status = unsafe { LLVMFuzzerRunDriver(&raw mut argc, &raw mut argv, callback) };
    Some(ExitCode::from(u8::try_from(status).unwrap_or(1)))
}
