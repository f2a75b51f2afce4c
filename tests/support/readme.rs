//! The command lines of the documentation, as a reader copies them.
#![allow(dead_code, reason = "each test program uses its part")]

/// Returns the command lines of the code blocks below the heading `## {section}`, without trailing comments. Lines that only
/// are a comment, and the output of a command, are left out.
pub fn commands(document: &str, section: &str) -> Vec<String> {
    let heading = format!("## {section}");
    let body = document
        .lines()
        .skip_while(|line| *line != heading)
        .skip(1)
        .take_while(|line| !line.starts_with("## "));
    let mut commands = Vec::new();
    let mut inside = false;
    for line in body {
        if line.starts_with("```") {
            inside = !inside;
        } else if inside && !line.starts_with([' ', '#']) && !line.is_empty() {
            let command = line.split("  #").next().unwrap_or_default();
            commands.push(command.trim_end().to_owned());
        }
    }
    commands
}
