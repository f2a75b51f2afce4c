//! Output of results: JSON for programs, tables for people.

use super::args::Format;
use super::write_stdout;

/// Prints a result as JSON, or as the table that `table` returns.
pub(super) fn print<T: serde::Serialize + ?Sized>(
    format: Format,
    result: &T,
    table: impl FnOnce(&T) -> String,
) -> anyhow::Result<()> {
    let text = match format {
        Format::Table => table(result),
        Format::Json => serde_json::to_string_pretty(result)? + "\n",
    };
    Ok(write_stdout(text.as_bytes())?)
}
