//! A wall clock that jumps: readings of the clock are forced to be system calls, and the tracer answers them.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use libc::user_regs_struct as Registers;

/// System calls that read the wall clock.
pub const CALLS: [i64; 3] = [
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_time,
];

const FUNCTIONS: [(&[u8], i64); 3] = [
    (b"__vdso_clock_gettime", libc::SYS_clock_gettime),
    (b"__vdso_gettimeofday", libc::SYS_gettimeofday),
    (b"__vdso_time", libc::SYS_time),
];

fn memory(pid: i32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/proc/{pid}/mem"))
}

/// Replaces the functions of the process's vDSO, which read the clock without a system call, by the calls.
pub fn patch(pid: i32) -> Result<()> {
    let auxiliary = fs::read(format!("/proc/{pid}/auxv"))?;
    let words: Vec<u64> = auxiliary.chunks_exact(8).map(number).collect();
    let base = words
        .chunks_exact(2)
        .find(|pair| pair[0] == libc::AT_SYSINFO_EHDR)
        .context("no vDSO")?[1];
    let memory = memory(pid)?;
    let mut image = vec![0; 8192];
    memory.read_exact_at(&mut image, base)?;
    for (name, call) in FUNCTIONS {
        let at = symbol(&image, name).context("no such function in the vDSO")?;
        // mov eax, NUMBER; syscall; ret
        let number = (call as u32).to_le_bytes();
        let code = [&[0xb8], &number[..], &[0x0f, 0x05, 0xc3]].concat();
        memory.write_all_at(&code, base + at)?;
    }
    Ok(())
}

fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |sum, &byte| sum << 8 | u64::from(byte))
}

/// Returns the value of a dynamic symbol of an ELF image.
fn symbol(image: &[u8], name: &[u8]) -> Option<u64> {
    let at = |offset: u64, length: u64| {
        let part = image.get(offset as usize..(offset + length) as usize);
        part.map(number)
    };
    let (sections, size, count) = (at(0x28, 8)?, at(0x3a, 2)?, at(0x3c, 2)?);
    let header = |index: u64| sections + index * size;
    let symbols = (0..count)
        .map(header)
        .find(|&header| at(header + 4, 4) == Some(11))?;
    let strings = at(header(at(symbols + 0x28, 4)?) + 0x18, 8)?;
    let (from, length) = (at(symbols + 0x18, 8)?, at(symbols + 0x20, 8)?);
    (0..length / 24)
        .map(|index| from + index * 24)
        .find_map(|symbol| {
            let text = image.get((strings + at(symbol, 4)?) as usize..)?;
            let found = text.strip_prefix(name)?.first() == Some(&0);
            found.then(|| at(symbol + 8, 8))?
        })
}

/// Answers a call with the time shifted by `seconds`; returns `None` if it asks for another clock.
pub fn tell(pid: i32, registers: &Registers, seconds: i64) -> Result<Option<u64>> {
    let call = registers.orig_rax as i64;
    let coarse_or_not =
        [libc::CLOCK_REALTIME, libc::CLOCK_REALTIME_COARSE].map(|clock| clock as u64);
    if call == libc::SYS_clock_gettime && !coarse_or_not.contains(&registers.rdi) {
        return Ok(None);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let shifted = now.as_secs().wrapping_add_signed(seconds);
    let (to, fraction) = match call {
        libc::SYS_clock_gettime => (registers.rsi, now.subsec_nanos()),
        libc::SYS_gettimeofday => (registers.rdi, now.subsec_micros()),
        _ => {
            if registers.rdi != 0 {
                memory(pid)?.write_all_at(&shifted.to_le_bytes(), registers.rdi)?;
            }
            return Ok(Some(shifted));
        }
    };
    let bytes = [shifted.to_le_bytes(), u64::from(fraction).to_le_bytes()].concat();
    memory(pid)?.write_all_at(&bytes, to)?;
    Ok(Some(0))
}
