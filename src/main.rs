//! The `upperdeck` program: everything is in the library, this file only hands over and sets the exit code.

#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    // This program started by itself, as something else than a command.
    if let Some(code) = upperdeck::node::freeze::watchdog_entry().or_else(upperdeck::demo::entry) {
        return code;
    }
    upperdeck::cli::main()
}
