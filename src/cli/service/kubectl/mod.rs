//! `kubectl upperdeck`: saves of pods through the manager of a Kubernetes cluster.

mod complete;
mod connect;

use anyhow::Context as _;
use uuid::Uuid;

use super::client::Client;
use super::{images, job};
use crate::cli::args::service::{Kubectl, KubectlSave, KubectlVerb};
use crate::cli::exit::Usage;
use crate::cli::print::print;
use crate::service::job::SaveOptions;
use crate::service::manager::api::{Save, SaveRequest, Saves, Sessions, Which};
use connect::Connection;

/// Runs a verb.
pub(super) fn run(args: Kubectl, verbose: bool) -> anyhow::Result<()> {
    // An error in the command line does not need the cluster.
    let cluster = &args.cluster;
    match args.verb {
        KubectlVerb::Complete { words } => complete::run(&words),
        KubectlVerb::Save(save) => job::until_signal(async || {
            let (client, connection) = Connection::to_manager(cluster).await?;
            submit(&client, &connection.namespace, save, verbose).await
        }),
        KubectlVerb::Sessions(asked) => job::until_signal(async || {
            let (client, connection) = Connection::to_manager(cluster).await?;
            let namespace = (!asked.all_namespaces).then_some(("namespace", connection.namespace));
            let query: Vec<_> = namespace.into_iter().collect();
            let found: Sessions = client.get("sessions", &query).await?;
            print(asked.format, found.sessions.as_slice(), job::sessions_now)
        }),
        KubectlVerb::Ls(asked) => job::until_signal(async || {
            let (client, _) = Connection::to_manager(cluster).await?;
            let mut query = vec![("limit", asked.limit.to_string())];
            query.extend(asked.state.map(|state| ("state", state.name().to_owned())));
            query.extend(asked.after.map(|after| ("cursor", after)));
            let found: Saves = client.get("saves", &query).await?;
            print(asked.format, &found, job::saves_now)
        }),
        KubectlVerb::Status(asked) => job::until_signal(async || {
            let (client, _) = Connection::to_manager(cluster).await?;
            let save: Save = client.get(&format!("saves/{}", asked.id), &[]).await?;
            print(asked.format, &save, job::status_text)
        }),
        KubectlVerb::Watch(asked) => job::until_signal(async || {
            let (client, _) = Connection::to_manager(cluster).await?;
            job::watch(&client, &asked.id.to_string(), asked.progress, verbose).await
        }),
        KubectlVerb::Cancel(asked) => job::until_signal(async || {
            let (client, _) = Connection::to_manager(cluster).await?;
            job::cancel(&client, &asked.id.to_string()).await
        }),
        KubectlVerb::Images(asked) => job::until_signal(async || {
            let (client, _) = Connection::to_manager(cluster).await?;
            let mut query = vec![("limit", asked.page_size.to_string())];
            query.extend(asked.search.map(|search| ("search", search)));
            images::list(&client, query, asked.page, asked.page_size, asked.format).await
        }),
    }
}

/// Returns the name of a pod that is given as `kubectl` prints it.
fn pod_name(text: &str) -> Result<&str, Usage> {
    let name = text
        .strip_prefix("pod/")
        .or_else(|| text.strip_prefix("pods/"))
        .unwrap_or(text);
    if name.is_empty() || name.contains('/') {
        return Err(Usage(format!("{text:?}: expected the name of a pod")));
    }
    Ok(name)
}

async fn submit(
    client: &Client,
    namespace: &str,
    args: KubectlSave,
    verbose: bool,
) -> anyhow::Result<()> {
    let request = SaveRequest {
        session: Which::Pod {
            namespace: namespace.to_owned(),
            pod: pod_name(&args.pod)?.to_owned(),
            container: args.container,
        },
        image: job::image_name(args.image.as_deref()),
        message: args.message,
        options: SaveOptions::default(),
        replace: args.replace,
        notify: None,
    };
    let save = job::request(client, &Uuid::now_v7().to_string(), &request)
        .await
        .with_context(|| format!("cannot save {namespace}/{}", args.pod))?;
    if args.no_wait {
        return job::print_requested(args.format, &save);
    }
    job::watch(client, &save.id.to_string(), args.progress, verbose).await
}

#[cfg(test)]
mod tests {
    use super::pod_name;

    #[test]
    fn pods_as_kubectl_prints_them() {
        for (text, name) in [
            ("nb-0", Some("nb-0")),
            ("pod/nb-0", Some("nb-0")),
            ("pods/nb-0", Some("nb-0")),
            ("pod/", None),
            ("", None),
            ("deployment/nb", None),
        ] {
            assert_eq!(pod_name(text).ok(), name, "{text:?}");
        }
    }
}
