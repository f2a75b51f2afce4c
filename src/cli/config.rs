//! Settings of the long-running verbs: flags, then the environment (`UPPERDECK_FLAG`), then a TOML file, then defaults.
//!
//! Keys in the file are the flags' names with `_` for `-`. A key at the top level applies to every verb that has the
//! flag; one in `[manager]`, `[agent]` or `[up]` applies to that verb and takes precedence. The flags known to clap are
//! the only list of keys; any other key is an error that names it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory, FromArgMatches};
use toml::{Table, Value};

use super::args::Cli;
use super::exit::Usage;
use crate::node::confine;

/// The verbs that a file can configure.
const VERBS: [&str; 3] = ["manager", "agent", "up"];
/// The verb that uses the settings of the verb it checks.
const DOCTOR: &str = "doctor";
/// Default file, which is read if `--config` is not given and the file exists.
const DEFAULT_FILE: &str = "/etc/upperdeck/upperdeck.toml";
/// Maximum size of a settings file, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// Flags that are not settings.
const NOT_CONFIGURABLE: [&str; 9] = [
    "config",
    "print-config",
    "help",
    "version",
    "verbose",
    "for",
    "format",
    "strict",
    "check-timeout",
];

/// An error in the command line or the settings file.
#[derive(Debug)]
pub(super) enum Error {
    /// An error of clap, or a request for help.
    Clap(clap::Error),
    /// An error in the settings file.
    File(Usage),
}

/// The result of parsing command line, environment and file.
pub(super) struct Parsed {
    /// The command line, supplemented by the file.
    pub(super) cli: Cli,
    /// The output of `--print-config`, if requested.
    pub(super) print: Option<String>,
    /// Open descriptors that a setting refers to: `--creds-fd 3`, `/dev/fd/5`.
    pub(super) descriptors: Vec<u32>,
}

/// The section of the file that holds a verb's settings: for `doctor`, that of the verb that it examines.
fn section<'a>(verb: &'a str, asked: &ArgMatches) -> &'a str {
    #[cfg(feature = "service")]
    if let Ok(Some(purpose)) = asked.try_get_one::<crate::service::doctor::Purpose>("purpose")
        && verb == DOCTOR
    {
        return purpose.name();
    }
    let _ = asked;
    verb
}

/// Returns the clap command, in which every setting of a configurable verb can also come from the environment.
pub(super) fn command() -> Command {
    let mut command = Cli::command();
    for verb in VERBS.into_iter().chain([DOCTOR]) {
        // Without the service there are none of them.
        if command.find_subcommand(verb).is_some() {
            command = command.mut_subcommand(verb, |verb| verb.mut_args(with_environment));
        }
    }
    command
}

fn with_environment(arg: Arg) -> Arg {
    match arg.get_long() {
        Some(long) if arg.get_env().is_none() && !NOT_CONFIGURABLE.contains(&long) => {
            let variable = format!("UPPERDECK_{}", long.to_uppercase().replace('-', "_"));
            arg.env(variable).hide_env_values(true)
        }
        _ => arg,
    }
}

/// Parses `args`, which start with the program's name.
pub(super) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Parsed, Error> {
    let args: Vec<OsString> = args.into_iter().collect();
    let mut command = command();
    command.build();
    let typed = matches(&command, &args)?;
    let configurable = |verb: &str| VERBS.contains(&verb) || verb == DOCTOR;
    let Some((verb, asked)) = typed.subcommand().filter(|(verb, _)| configurable(verb)) else {
        return Ok(Parsed {
            cli: cli(&typed)?,
            print: None,
            descriptors: descriptors(&typed),
        });
    };
    let Some((file, table)) = read(asked.get_one::<PathBuf>("config"))? else {
        return Ok(Parsed {
            print: asked
                .get_flag("print_config")
                .then(|| printed(&command, verb, asked, &[], None)),
            cli: cli(&typed)?,
            descriptors: descriptors(&typed),
        });
    };
    let section = section(verb, asked);
    let settings = settings(&command, section, &table).map_err(|reason| in_file(&file, &reason))?;
    let added: Vec<Setting> = settings
        .into_iter()
        .filter(|setting| {
            !matches!(
                asked.value_source(&setting.id),
                Some(ValueSource::CommandLine | ValueSource::EnvVariable)
            )
        })
        .collect();
    let with = |settings: &[Setting]| -> Vec<OsString> {
        let flags = settings.iter().flat_map(|setting| setting.flags.clone());
        args.iter()
            .cloned()
            .chain(flags.map(OsString::from))
            .collect()
    };
    let all = matches(&command, &with(&added)).map_err(|error| {
        // Finds the setting that clap rejects, because clap's message names a flag while the file has a key.
        let alone = added.iter().find_map(|setting| {
            let error = matches(&command, &with(std::slice::from_ref(setting))).err()?;
            Some((setting, error))
        });
        match alone {
            Some((setting, Error::Clap(error))) => {
                let text = error.to_string();
                let reason = text.lines().next().unwrap_or_default();
                let reason = reason.strip_prefix("error: ").unwrap_or(reason);
                in_file(&file, &format!("{}: {reason}", setting.key))
            }
            _ => error,
        }
    })?;
    let asked = all.subcommand().map_or(asked, |(_, asked)| asked);
    let ids: Vec<&str> = added.iter().map(|setting| setting.id.as_str()).collect();
    Ok(Parsed {
        print: asked
            .get_flag("print_config")
            .then(|| printed(&command, verb, asked, &ids, Some(&file))),
        cli: cli(&all)?,
        descriptors: descriptors(&all),
    })
}

/// Returns the open descriptors that values of this verb and its subcommands refer to.
fn descriptors(matches: &ArgMatches) -> Vec<u32> {
    let mut found = Vec::new();
    for id in matches.ids() {
        // Groups of flags have IDs, too, but no values.
        let Ok(Some(values)) = matches.try_get_raw(id.as_str()) else {
            continue;
        };
        for value in values.filter_map(|value| value.to_str()) {
            found.extend(if id.as_str().ends_with("_fd") {
                value.parse().ok()
            } else {
                confine::descriptor_from_path(value)
            });
        }
    }
    if let Some((_, below)) = matches.subcommand() {
        found.extend(descriptors(below));
    }
    found
}

fn matches(command: &Command, args: &[OsString]) -> Result<ArgMatches, Error> {
    command
        .clone()
        .try_get_matches_from(args)
        .map_err(Error::Clap)
}

fn cli(matches: &ArgMatches) -> Result<Cli, Error> {
    Cli::from_arg_matches(matches).map_err(Error::Clap)
}

fn in_file(file: &Path, reason: &str) -> Error {
    let file = super::text::path(file);
    Error::File(Usage(format!(
        "{file}: {}",
        crate::common::escape::text(reason)
    )))
}

/// Reads the file `named`, or the default file if it exists.
fn read(named: Option<&PathBuf>) -> Result<Option<(PathBuf, Table)>, Error> {
    let file = match named {
        Some(file) => file.clone(),
        None if Path::new(DEFAULT_FILE).exists() => DEFAULT_FILE.into(),
        None => return Ok(None),
    };
    let cannot = |reason: String| in_file(&file, &reason);
    let size = std::fs::metadata(&file).map_err(|error| cannot(error.to_string()))?;
    if size.len() > MAX_FILE {
        return Err(cannot(format!("larger than {MAX_FILE} bytes")));
    }
    let text = std::fs::read_to_string(&file).map_err(|error| cannot(error.to_string()))?;
    let table = text.parse::<Table>().map_err(|error| {
        let line = error.span().map_or(1, |span| {
            text[..span.start.min(text.len())].matches('\n').count() + 1
        });
        cannot(format!("line {line}: {}", error.message()))
    })?;
    Ok(Some((file, table)))
}

/// A setting of the file, translated for clap.
struct Setting {
    /// Key as written, for messages: `manager.listen`.
    key: String,
    /// clap's ID of the argument.
    id: String,
    /// The equivalent flags.
    flags: Vec<String>,
}

fn flag_of<'a>(command: &'a Command, verb: &str, key: &str) -> Option<&'a Arg> {
    let long = key.replace('_', "-");
    command
        .find_subcommand(verb)?
        .get_arguments()
        .find(|arg| arg.get_long() == Some(&long) && !NOT_CONFIGURABLE.contains(&long.as_str()))
}

/// Returns the settings for `verb` (`commit` has none). Fails with a text that names the invalid key, even if the key
/// is for another verb.
fn settings(command: &Command, verb: &str, table: &Table) -> Result<Vec<Setting>, String> {
    let mut found: Vec<Setting> = Vec::new();
    let mut own = Vec::new();
    for (key, value) in table {
        match value {
            Value::Table(inner) if VERBS.contains(&key.as_str()) => {
                for (inner_key, value) in inner {
                    let name = format!("{key}.{inner_key}");
                    let arg = flag_of(command, key, inner_key)
                        .ok_or_else(|| unknown(command, &[key], &name, inner_key))?;
                    let setting = setting(&name, arg, value)?;
                    if key == verb {
                        own.push(setting);
                    }
                }
            }
            Value::Table(_) => {
                return Err(format!(
                    "[{key}]: no such table; there are [manager], [agent] and [up]"
                ));
            }
            value => {
                if !VERBS
                    .iter()
                    .any(|verb| flag_of(command, verb, key).is_some())
                {
                    return Err(unknown(command, &VERBS, key, key));
                }
                if VERBS.contains(&verb)
                    && let Some(arg) = flag_of(command, verb, key)
                {
                    found.push(setting(key, arg, value)?);
                }
            }
        }
    }
    found.retain(|shared| !own.iter().any(|setting| setting.id == shared.id));
    found.extend(own);
    Ok(found)
}

/// Returns the message for an unknown key, with a similar known one.
fn unknown(command: &Command, verbs: &[&str], name: &str, key: &str) -> String {
    let known = verbs
        .iter()
        .filter_map(|verb| command.find_subcommand(verb))
        .flat_map(Command::get_arguments)
        .filter_map(Arg::get_long)
        .map(|long| long.replace('-', "_"));
    let near = known
        .map(|known| (strsim::levenshtein(&known, key), known))
        .min()
        .filter(|(distance, _)| *distance <= 3);
    match near {
        Some((_, near)) => format!("{name}: no such key; is {near} meant?"),
        None => format!("{name}: no such key"),
    }
}

fn setting(key: &str, arg: &Arg, value: &Value) -> Result<Setting, String> {
    let long = arg.get_long().unwrap_or_default();
    let takes_value = arg.get_action().takes_values();
    let scalar = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Integer(number) => Ok(number.to_string()),
        Value::Float(number) => Ok(number.to_string()),
        Value::Boolean(truth) => Ok(truth.to_string()),
        _ => Err(format!(
            "{key}: expected a string, a number or true or false"
        )),
    };
    let flags = match value {
        Value::Boolean(truth) if !takes_value => {
            if *truth {
                vec![format!("--{long}")]
            } else {
                Vec::new()
            }
        }
        _ if !takes_value => return Err(format!("{key}: expected true or false")),
        Value::Array(values) if matches!(arg.get_action(), ArgAction::Append) => values
            .iter()
            .map(|value| Ok(format!("--{long}={}", scalar(value)?)))
            .collect::<Result<_, String>>()?,
        Value::Array(_) => return Err(format!("{key}: expected one value")),
        value => vec![format!("--{long}={}", scalar(value)?)],
    };
    Ok(Setting {
        key: key.to_owned(),
        id: arg.get_id().to_string(),
        flags,
    })
}

/// Formats all settings of `verb` as a settings file, with the source of each.
fn printed(
    command: &Command,
    verb: &str,
    asked: &ArgMatches,
    from_file: &[&str],
    file: Option<&Path>,
) -> String {
    let mut out = format!("[{verb}]\n");
    let arguments = command
        .find_subcommand(verb)
        .into_iter()
        .flat_map(Command::get_arguments);
    for arg in arguments {
        let (Some(long), id) = (arg.get_long(), arg.get_id().as_str()) else {
            continue;
        };
        if NOT_CONFIGURABLE.contains(&long) {
            continue;
        }
        let key = long.replace('-', "_");
        let source = match asked.value_source(id) {
            _ if from_file.contains(&id) => file.map_or_else(String::new, super::text::path),
            Some(ValueSource::CommandLine) => "command line".to_owned(),
            Some(ValueSource::EnvVariable) => "environment".to_owned(),
            Some(_) => "default".to_owned(),
            None => "not set".to_owned(),
        };
        let values: Vec<String> = asked
            .get_raw(id)
            .into_iter()
            .flatten()
            .map(|value| without_password(&value.to_string_lossy()))
            .collect();
        let truth = |value: &str| Value::Boolean(value == "true");
        let value = match (arg.get_action(), values.as_slice()) {
            (_, []) => {
                out.push_str(&format!("# {key} =    # {source}\n"));
                continue;
            }
            (ArgAction::Append, values) => Value::Array(
                values
                    .iter()
                    .map(|value| Value::String(value.clone()))
                    .collect(),
            ),
            (ArgAction::SetTrue | ArgAction::SetFalse, [value, ..]) => truth(value),
            (_, [value, ..]) => match value.parse::<i64>() {
                Ok(number) => Value::Integer(number),
                Err(_) if value == "true" || value == "false" => truth(value),
                Err(_) => Value::String(value.clone()),
            },
        };
        out.push_str(&format!("{key} = {value}    # {source}\n"));
    }
    out
}

/// Masks the password in `scheme://user:password@host`.
fn without_password(value: &str) -> String {
    let hidden = value.split_once("://").and_then(|(scheme, rest)| {
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let (user, host) = authority.rsplit_once('@')?;
        let (user, _) = user.split_once(':')?;
        Some(format!("{scheme}://{user}:***@{host}{path}"))
    });
    hidden.unwrap_or_else(|| value.to_owned())
}
