//! What an image is started by: programs, their interpreters, and the user.

use serde::{Deserialize, Serialize};

use super::MAX_NAME;
use crate::common::escape;

/// A program by which a session is started, looked for in the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "service", derive(utoipa::ToSchema))]
pub struct Program {
    /// Its name or path, as the command has it.
    pub name: String,
    /// Where it is in the image; absent if it is not there, or cannot be executed.
    pub path: Option<String>,
    /// Whether it may be in a directory that is mounted over the image instead, e.g. a volume.
    pub mounted: bool,
    /// Whether it is the first of the image's own command (entrypoint and arguments), and the session was started by
    /// another.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub image_only: bool,
    /// The interpreter that it needs, if it is a script: the first that is missing or mounted, or else the last of those
    /// that start each other (`env` and the program that it starts, an interpreter that is a script itself). Absent for
    /// other programs, and where it cannot be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interpreter: Option<Interpreter>,
}

/// The interpreter of a script, looked for in the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "service", derive(utoipa::ToSchema))]
pub struct Interpreter {
    /// Its name or path, as the script has it.
    pub name: String,
    /// Where it is in the image; absent if it is not there, or cannot be executed.
    pub path: Option<String>,
    /// Whether it may be in a directory that is mounted over the image instead.
    pub mounted: bool,
}

/// The user by which an image is started, looked for in its `/etc/passwd`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "service", derive(utoipa::ToSchema))]
pub struct StartUser {
    /// Name or number, as the image's config has it, without a group.
    pub name: String,
    /// Whether it is a name that `/etc/passwd` does not have. A number needs no entry.
    pub missing: bool,
    /// Whether `/etc/passwd` is mounted over the image, so that it is not known what it has.
    pub mounted: bool,
    /// Home directory of a name that is there.
    pub home: Option<String>,
    /// Shell of a name that is there.
    pub shell: Option<String>,
}

fn short(text: &str) -> String {
    escape::limited(text, MAX_NAME)
}

impl Program {
    /// Escapes and shortens its texts, which came from elsewhere.
    pub(super) fn shorten(&mut self) {
        self.name = short(&self.name);
        self.path = self.path.as_deref().map(short);
        if let Some(interpreter) = &mut self.interpreter {
            interpreter.name = short(&interpreter.name);
            interpreter.path = interpreter.path.as_deref().map(short);
        }
    }
}

impl StartUser {
    /// Escapes and shortens its texts, which came from elsewhere.
    pub(super) fn shorten(&mut self) {
        self.name = short(&self.name);
        self.home = self.home.as_deref().map(short);
        self.shell = self.shell.as_deref().map(short);
    }
}

#[cfg(test)]
mod tests {
    use super::super::Packages;

    #[test]
    fn records_of_earlier_versions_are_read_and_new_texts_are_bounded() -> serde_json::Result<()> {
        let rest = r#""packages":[],"more":0,"unread":[],"unread_more":0,"notes":[]"#;
        let old = format!(
            r#"{{{rest},"programs":[{{"name":"tini","path":"/usr/bin/tini","mounted":false}}]}}"#
        );
        let read: Packages = serde_json::from_str(&old)?;
        assert_eq!(read.programs[0].interpreter, None);
        assert_eq!((read.programs[0].image_only, &read.user), (false, &None));
        assert_eq!(serde_json::to_string(&read)?, old);

        let long = "x\\n".repeat(5000);
        let hostile = format!(
            r#"{{{rest},"programs":[{{"name":"a","path":null,"mounted":false,"interpreter":{{"name":"{long}",
            "path":"{long}","mounted":false}}}}],"user":{{"name":"{long}","missing":false,"mounted":false,
            "home":"{long}","shell":"{long}"}}}}"#
        );
        let read = serde_json::from_str::<Packages>(&hostile)?.sanitised(10, 1000);
        let text = serde_json::to_string(&read)?;
        assert!(text.len() < 10_000, "{} bytes", text.len());
        assert!(read.user.is_some_and(|user| !user.name.contains('\n')));
        Ok(())
    }
}
