//! Completions for `kubectl upperdeck`. kubectl starts the plugin as `kubectl_complete-upperdeck` with the words of the
//! command line, the last of which is to be completed, and reads candidates, one a line, and a last line with `:` and what
//! the shell is to do (cobra's `__complete`).

use std::ffi::OsString;
use std::time::Duration;

use clap::{Arg, Command, FromArgMatches as _};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::{Api, ListParams};

use super::Connection;
use crate::cli::args::service::Cluster;
use crate::cli::{config, write_stdout};
use crate::service::manager::api::Saves;

/// Time within which the cluster has to answer, as a person waits for it.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Maximum number of names that are asked for.
const MOST: u32 = 500;
/// The shell is not to add names of files, or it is to do what it does by itself.
const NO_FILES: &str = ":4\n";
const FILES: &str = ":0\n";

/// What a word of the command line can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    /// The given candidates are all.
    Given,
    Pods,
    Containers,
    Namespaces,
    Saves,
    Files,
}

/// What is known without the cluster: candidates, what else is wanted, and the words before.
struct Place {
    candidates: Vec<String>,
    wanted: Wanted,
    verb: String,
    positions: Vec<String>,
}

/// Prints the candidates for the last of `words`.
pub(super) fn run(words: &[OsString]) -> anyhow::Result<()> {
    let words: Vec<String> = words
        .iter()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let (partial, before) = words
        .split_last()
        .map_or(("", [].as_slice()), |(last, rest)| (last.as_str(), rest));
    let mut place = place(before, partial);
    if !matches!(place.wanted, Wanted::Given | Wanted::Files) {
        let runtime = tokio::runtime::Runtime::new()?;
        let asked = async {
            // A completion that the cluster does not help with is left out: a shell has no place for an error.
            tokio::time::timeout(TIMEOUT, names(&place, before))
                .await
                .ok()?
                .ok()
        };
        place.candidates = runtime.block_on(asked).unwrap_or_default();
    }
    let mut out = String::new();
    for candidate in place
        .candidates
        .iter()
        .filter(|candidate| candidate.starts_with(partial))
    {
        out.push_str(candidate);
        out.push('\n');
    }
    out.push_str(if place.wanted == Wanted::Files {
        FILES
    } else {
        NO_FILES
    });
    Ok(write_stdout(out.as_bytes())?)
}

fn command() -> Option<Command> {
    let mut whole = config::command();
    whole.build();
    whole.find_subcommand("kubectl").cloned()
}

/// Finds out which word is completed.
fn place(before: &[String], partial: &str) -> Place {
    let mut place = Place {
        candidates: Vec::new(),
        wanted: Wanted::Given,
        verb: String::new(),
        positions: Vec::new(),
    };
    let Some(mut command) = command() else {
        return place;
    };
    let mut words = before.iter();
    let mut value_of: Option<Arg> = None;
    while let Some(word) = words.next() {
        value_of = None;
        if let Some(arg) = flag(&command, word) {
            if arg.get_action().takes_values() && !word.contains('=') && words.as_slice().is_empty()
            {
                value_of = Some(arg.clone());
            } else if takes_a_word(arg) && !word.contains('=') {
                words.next();
            }
        } else if !word.starts_with('-') {
            match command
                .find_subcommand(word)
                .filter(|_| place.verb.is_empty())
                .cloned()
            {
                Some(verb) => {
                    place.verb.clone_from(word);
                    command = verb;
                }
                None => place.positions.push(word.clone()),
            }
        }
    }
    match value_of.filter(takes_a_word) {
        Some(arg) => values(&mut place, &arg),
        None if partial.starts_with('-') => place.candidates = flags(&command),
        None if place.verb.is_empty() => {
            let verbs = command.get_subcommands().filter(|verb| !verb.is_hide_set());
            place.candidates = verbs
                .map(|verb| verb.get_name().to_owned())
                .filter(|name| name != "help")
                .collect();
        }
        None => {
            place.wanted = match (place.verb.as_str(), place.positions.len()) {
                ("save", 0) => Wanted::Pods,
                ("watch" | "cancel" | "status", 0) => Wanted::Saves,
                _ => Wanted::Given,
            }
        }
    }
    place
}

fn takes_a_word(arg: &Arg) -> bool {
    arg.get_action().takes_values() && !arg.is_require_equals_set()
}

fn flag<'c>(command: &'c Command, word: &str) -> Option<&'c Arg> {
    let long = word
        .strip_prefix("--")
        .map(|word| word.split('=').next().unwrap_or(word));
    let mut short = word.strip_prefix('-').unwrap_or_default().chars();
    let short = short.next().filter(|c| *c != '-' && short.next().is_none());
    command.get_arguments().find(|arg| {
        (long.is_some() && arg.get_long() == long) || (short.is_some() && arg.get_short() == short)
    })
}

fn flags(command: &Command) -> Vec<String> {
    let shown = command.get_arguments().filter(|arg| !arg.is_hide_set());
    shown
        .filter_map(Arg::get_long)
        .map(|long| format!("--{long}"))
        .collect()
}

/// Completes the value of a flag.
fn values(place: &mut Place, arg: &Arg) {
    place.wanted = match arg.get_long().unwrap_or_default() {
        "namespace" => Wanted::Namespaces,
        "container" => Wanted::Containers,
        "kubeconfig" | "token-file" => Wanted::Files,
        _ => {
            let possible = arg.get_possible_values();
            place.candidates = possible
                .iter()
                .map(|value| value.get_name().to_owned())
                .collect();
            Wanted::Given
        }
    };
}

/// The flags of the cluster among the words, which are completed to a command line.
fn cluster(place: &Place, before: &[String]) -> Option<Cluster> {
    let mut words = ["upperdeck", "kubectl"].map(str::to_owned).to_vec();
    words.extend_from_slice(before);
    if matches!(place.wanted, Wanted::Namespaces | Wanted::Containers) {
        // The flag whose value is completed.
        words.pop();
    }
    match place.verb.as_str() {
        "" => words.push("ls".to_owned()),
        "save" if place.positions.is_empty() => words.push("pod".to_owned()),
        "watch" | "cancel" | "status" if place.positions.is_empty() => {
            words.push(uuid::Uuid::nil().to_string());
        }
        _ => {}
    }
    let found = config::command().try_get_matches_from(words).ok()?;
    let (_, kubectl) = found.subcommand()?;
    Cluster::from_arg_matches(kubectl).ok()
}

/// Asks the cluster for names.
async fn names(place: &Place, before: &[String]) -> anyhow::Result<Vec<String>> {
    let cluster =
        cluster(place, before).ok_or_else(|| anyhow::anyhow!("the flags are not complete"))?;
    let few = ListParams::default().limit(MOST);
    if place.wanted == Wanted::Saves {
        let (client, _) = Connection::to_manager(&cluster).await?;
        let mut query = vec![("limit", MOST.to_string())];
        if place.verb != "status" {
            query.push(("state", "open".to_owned()));
        }
        let found: Saves = client.get("saves", &query).await?;
        return Ok(found.saves.iter().map(|save| save.id.to_string()).collect());
    }
    let connection = Connection::new(&cluster).await?;
    if place.wanted == Wanted::Namespaces {
        let all: Api<Namespace> = Api::all(connection.kube);
        let found = all.list_metadata(&few).await?;
        return Ok(found
            .items
            .into_iter()
            .filter_map(|one| one.metadata.name)
            .collect());
    }
    let pods: Api<Pod> = Api::namespaced(connection.kube, &connection.namespace);
    if place.wanted == Wanted::Pods {
        let running = few.fields("status.phase=Running");
        let found = pods.list_metadata(&running).await?;
        return Ok(found
            .items
            .into_iter()
            .filter_map(|one| one.metadata.name)
            .collect());
    }
    let pod = place
        .positions
        .first()
        .ok_or_else(|| anyhow::anyhow!("no pod"))?;
    let spec = pods
        .get(super::pod_name(pod)?)
        .await?
        .spec
        .unwrap_or_default();
    Ok(spec
        .containers
        .into_iter()
        .map(|container| container.name)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(words: &[&str], partial: &str) -> (Wanted, Vec<String>) {
        let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
        let place = place(&words, partial);
        (place.wanted, place.candidates)
    }

    #[test]
    fn the_flags_before_a_word_that_is_missing_are_known() {
        for words in [
            ["-n", "team", "save"].as_slice(),
            &["save", "-n", "team"],
            &["save", "nb", "-n", "team", "-c"],
            &["cancel", "-n", "team"],
            &["-n", "team", "--namespace"],
        ] {
            let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
            let found = cluster(&place(&words, ""), &words);
            let namespace = found.and_then(|cluster| cluster.namespace);
            assert_eq!(namespace.as_deref(), Some("team"), "{words:?}");
        }
    }

    #[test]
    fn words_are_completed_by_their_place() {
        let (wanted, verbs) = at(&[], "");
        assert_eq!(wanted, Wanted::Given);
        assert_eq!(
            verbs,
            [
                "save", "sessions", "ls", "status", "watch", "cancel", "images"
            ]
        );
        for (words, wanted) in [
            (["save"].as_slice(), Wanted::Pods),
            (&["-n", "team", "save"], Wanted::Pods),
            (&["save", "-m", "text"], Wanted::Pods),
            (&["save", "nb"], Wanted::Given),
            (&["save", "nb", "-c"], Wanted::Containers),
            (&["save", "--namespace"], Wanted::Namespaces),
            (&["--kubeconfig"], Wanted::Files),
            (&["watch"], Wanted::Saves),
            (&["cancel", "x"], Wanted::Given),
        ] {
            assert_eq!(at(words, "").0, wanted, "{words:?}");
        }
        assert_eq!(at(&["ls", "-o"], "").1, ["table", "json"]);
        let (_, flags) = at(&["save"], "--");
        assert!(
            flags.contains(&"--container".to_owned()) && flags.contains(&"--context".to_owned()),
            "{flags:?}"
        );
    }
}
