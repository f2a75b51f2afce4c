//! Memory does not grow with what is saved: at most 64 MiB and 6 MiB a thread, whatever the size of the content.

use std::process::Command;

use nix::sys::resource::{UsageWho, getrusage};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const MIB: u64 = 1 << 20;

/// The only test of this program: the kernel's count is of all of a process's children.
#[test]
fn peak_memory_is_bounded() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let upper = dir.path().join("upper");
    for sub in 0..20 {
        let sub = upper.join(format!("d{sub:02}"));
        std::fs::create_dir_all(&sub)?;
        for n in 0..1000 {
            std::fs::write(sub.join(format!("file-{n:04}.py")), "import upperdeck\n")?;
        }
    }
    // Holes cost no disk here, and as many bytes of tar as anything else.
    for n in 0..3 {
        std::fs::File::create(upper.join(format!("large{n}")))?.set_len(1 << 30)?;
    }
    for (codec, jobs) in [("gzip", 2), ("zstd", 4), ("none", 2)] {
        let made = Command::new(env!("CARGO_BIN_EXE_upperdeck"))
            .args(["layer", "--userxattr", "--compression", codec, "--upper"])
            .arg(&upper)
            .args(["--jobs", &jobs.to_string(), "-o"])
            .arg(dir.path().join("layer"))
            .output()?;
        assert!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        let said: serde_json::Value = serde_json::from_slice(&made.stdout)?;
        assert!(said["tarSize"].as_u64() > Some(3 << 30), "{said}");
        let peak = u64::try_from(getrusage(UsageWho::RUSAGE_CHILDREN)?.max_rss())? * 1024;
        let bound = 64 * MIB + jobs * 6 * MIB;
        assert!(
            peak <= bound,
            "{codec} with {jobs} threads: {} MiB of {}",
            peak / MIB,
            bound / MIB
        );
    }
    Ok(())
}
