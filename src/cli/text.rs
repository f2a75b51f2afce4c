//! Text output: escapes data from containers and aligns columns.

use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::common::escape;

/// Formats a path.
pub(super) fn path(path: &Path) -> String {
    escape::path(path.as_os_str().as_bytes())
}

/// Formats a size such as `1.4 MB`, or a dash if it is unknown.
pub(super) fn bytes(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "-".to_owned(), crate::common::message::size)
}

/// Alignment of a column.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
}

/// Formats rows under a header, with two spaces between columns and no trailing space. If a line would not fit into the
/// terminal, each row becomes lines of name and value instead. Cells are escaped here.
pub(super) fn table(header: &[(&str, Align)], rows: &[Vec<String>]) -> String {
    table_within(terminal_width(), header, rows)
}

/// Returns the number of columns of the terminal that stdout is, if it is one.
fn terminal_width() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
    (size.ws_col > 0).then_some(size.ws_col.into())
}

fn table_within(width: Option<usize>, header: &[(&str, Align)], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|row| row.iter().map(|cell| escape::text(cell)).collect())
        .collect();
    let width_of = |column: usize| {
        let cells = rows
            .iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count());
        cells
            .max()
            .unwrap_or(0)
            .max(header[column].0.chars().count())
    };
    let widths: Vec<usize> = (0..header.len()).map(width_of).collect();
    let whole = widths.iter().map(|width| width + 2).sum::<usize>();
    if width.is_some_and(|width| whole > width + 2) && !rows.is_empty() {
        return records(header, &rows);
    }
    let mut out = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for ((cell, (_, align)), width) in cells.zip(header).zip(&widths) {
            let _ = match align {
                Align::Left => write!(text, "{cell:<width$}  "),
                Align::Right => write!(text, "{cell:>width$}  "),
            };
        }
        out.push_str(text.trim_end());
        out.push('\n');
    };
    line(&mut header.iter().map(|(name, _)| *name));
    for row in &rows {
        line(&mut row.iter().map(String::as_str));
    }
    out
}

/// Formats each row as a paragraph with a line for each cell that has something.
fn records(header: &[(&str, Align)], rows: &[Vec<String>]) -> String {
    let names = header.iter().map(|(name, _)| name.chars().count());
    let width = names.max().unwrap_or(0);
    let paragraphs = rows.iter().map(|row| {
        let cells = header.iter().zip(row);
        cells
            .filter(|(_, cell)| !matches!(cell.as_str(), "" | "-"))
            .fold(String::new(), |mut text, ((name, _), cell)| {
                let _ = writeln!(text, "{name:<width$}  {cell}");
                text
            })
    });
    paragraphs.collect::<Vec<_>>().join("\n")
}

/// Formats an RFC 3339 time without fractions of a second and the zone, which are only of use to programs.
pub(super) fn time(time: Option<&str>) -> String {
    match time {
        Some(time) => time
            .split(['.', 'Z'])
            .next()
            .unwrap_or_default()
            .replace('T', " "),
        None => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn nothing_steers_the_terminal() {
        assert_eq!(
            escape::text("a\x1b[2Jb\n\u{202e}c\u{9b}ü"),
            "a\\u{1b}[2Jb\\n\\u{202e}c\\u{9b}ü"
        );
        assert_eq!(
            path(Path::new(OsStr::from_bytes(b"a\\x\xff\x1bz"))),
            "a\\\\x\\xff\\u{1b}z"
        );
    }

    #[test]
    fn columns_line_up() {
        let rows = [
            vec!["a".to_owned(), "1".to_owned()],
            vec!["long\n".to_owned(), "22".to_owned()],
        ];
        let header = [("NAME", Align::Left), ("N", Align::Right)];
        assert_eq!(
            table(&header, &rows),
            "NAME     N\na        1\nlong\\n  22\n"
        );
        assert_eq!(table(&header, &[]), "NAME  N\n");
        assert_eq!(
            table(
                &[("A", Align::Left), ("B", Align::Left)],
                &[vec!["x".into(), String::new()]]
            ),
            "A  B\nx\n"
        );
    }

    #[test]
    fn a_narrow_terminal_gets_a_line_for_each_cell() {
        let rows = [
            vec!["3f2a9c51d0b7".to_owned(), "-".to_owned(), "9 s".to_owned()],
            vec!["77".to_owned(), "hub/\u{1b}lab".to_owned(), "-".to_owned()],
        ];
        let header = [
            ("ID", Align::Left),
            ("NAME", Align::Left),
            ("AGE", Align::Right),
        ];
        let wide = table_within(None, &header, &rows);
        let needed = wide.lines().map(|line| line.chars().count()).max();
        assert_eq!(table_within(needed, &header, &rows), wide);
        assert_eq!(
            table_within(needed.map(|needed| needed - 1), &header, &rows),
            "ID    3f2a9c51d0b7\nAGE   9 s\n\nID    77\nNAME  hub/\\u{1b}lab\n"
        );
        assert_eq!(table_within(Some(3), &header, &[]), "ID  NAME  AGE\n");
    }

    #[test]
    fn sizes() {
        assert_eq!(bytes(None), "-");
        assert_eq!(bytes(Some(1536)), "1.54 kB");
    }
}
