//! The `upperdeck` program: everything is in the library, this file only hands over and sets the exit code.

fn main() -> std::process::ExitCode {
    upperdeck::cli::main()
}
