//! Flags of `kubectl upperdeck`, which saves pods through the manager of a Kubernetes cluster.

#![allow(
    rustdoc::broken_intra_doc_links,
    rustdoc::invalid_html_tags,
    reason = "the comments are what --help prints: brackets there mean that a part may be left out"
)]

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueHint};

use super::job::state;
use crate::cli::args::shared::{Format, METADATA, REPORT};
use crate::cli::progress::Mode;
use crate::service::job;
use crate::service::manager::api::Replace;

const CLUSTER: &str = "Cluster";
const IDENTITY: &str = "Who asks";

pub(super) const KUBECTL_HELP: &str = "\
Examples:
  kubectl upperdeck save notebook-0
  kubectl upperdeck save notebook-0 -c main lab:monday -m 'with pandas'
  kubectl upperdeck ls --state running
  kubectl upperdeck -n team --service-account alice images

Link the program as kubectl-upperdeck into a directory of PATH, and as kubectl_complete-upperdeck for completions.

Requests go to the manager's Service through the API server (which needs 'get', 'create' and 'delete' on services/proxy
there), or to --server. The API server removes a request's own credentials, and the manager asks it who the caller is by a
token in another header: one for a service account, made for this purpose, for the manager alone and for an hour.
  the kubeconfig is of a service account   a token for the same account
  --service-account NAME                   a token for that account of the namespace; needs 'create' on
                                           serviceaccounts/token
  --token-file FILE                        that token
  --send-token                             the kubeconfig's own token. The manager can use it for anything that you
                                           can; it has to accept the API server's audience.
The exit code is that of the save, as of 'commit'.";

#[derive(Debug, Args)]
pub(in crate::cli) struct Kubectl {
    #[command(flatten)]
    pub(in crate::cli) cluster: Cluster,
    #[command(subcommand)]
    pub(in crate::cli) verb: KubectlVerb,
}

/// How the manager is reached, and as whom.
#[derive(Clone, Debug, Args)]
pub(in crate::cli) struct Cluster {
    /// Namespace of the pods [default: that of the context]
    #[arg(short, long, global = true, value_name = "NAME", help_heading = CLUSTER)]
    pub(in crate::cli) namespace: Option<String>,
    /// Context of the kubeconfig [default: the current one]
    #[arg(long, global = true, value_name = "NAME", help_heading = CLUSTER)]
    pub(in crate::cli) context: Option<String>,
    /// The kubeconfig [default: KUBECONFIG, then ~/.kube/config, then the service account of this pod]
    #[arg(long = "kubeconfig", global = true, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = CLUSTER)]
    pub(in crate::cli) file: Option<PathBuf>,
    /// Service of the manager
    #[arg(long, global = true, value_name = "NAMESPACE/SERVICE[:PORT]", default_value = "upperdeck/upperdeck:http", env = "UPPERDECK_MANAGER", hide_env_values = true, help_heading = CLUSTER)]
    pub(in crate::cli) manager: String,
    /// URL of the manager, to reach it without the API server
    #[arg(long, global = true, value_name = "URL", env = "UPPERDECK_SERVER", hide_env_values = true, value_hint = ValueHint::Url, help_heading = CLUSTER)]
    pub(in crate::cli) server: Option<String>,
    /// Service account to ask as, of the same namespace
    #[arg(long, global = true, value_name = "NAME", env = "UPPERDECK_SERVICE_ACCOUNT", hide_env_values = true, help_heading = IDENTITY)]
    pub(in crate::cli) service_account: Option<String>,
    /// Audience of its token
    #[arg(long, global = true, value_name = "AUDIENCE", default_value = crate::service::kubernetes::AUDIENCE, help_heading = IDENTITY)]
    pub(in crate::cli) audience: String,
    /// File with the token in its first line (/dev/fd/N for a descriptor)
    #[arg(long, global = true, value_name = "FILE", env = "UPPERDECK_TOKEN_FILE", hide_env_values = true, value_hint = ValueHint::FilePath, conflicts_with = "service_account", help_heading = IDENTITY)]
    pub(in crate::cli) token_file: Option<PathBuf>,
    /// Send the kubeconfig's own token to the manager
    #[arg(long, global = true, conflicts_with_all = ["service_account", "token_file"], help_heading = IDENTITY)]
    pub(in crate::cli) send_token: bool,
}

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum KubectlVerb {
    /// Save a pod, follow it to its end and print the image's reference
    Save(KubectlSave),
    /// List the pods that you may save
    Sessions(KubectlSessions),
    /// List your saves, newest first
    Ls(KubectlLs),
    /// Show the state of a save
    Status(KubectlStatus),
    /// Follow a save to its end and print the image's reference
    Watch(KubectlWatch),
    /// Cancel a save; its tag is not written
    Cancel(KubectlCancel),
    /// List your images
    Images(KubectlImages),
    /// Print what can follow on the command line, as kubectl asks a plugin
    #[command(name = "__complete", hide = true)]
    Complete {
        /// The words up to the one that is completed
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<OsString>,
    },
}

#[derive(Debug, Args)]
pub(in crate::cli) struct KubectlSave {
    /// Name of the pod
    pub(in crate::cli) pod: String,
    /// NAME[:TAG] or :TAG [default: suggested by the manager]
    pub(in crate::cli) image: Option<String>,
    /// Container, if the pod has several
    #[arg(short, long, value_name = "NAME")]
    pub(in crate::cli) container: Option<String>,
    /// Whether an image that has this name and tag may be replaced: never, own (if an earlier save of the same pod made
    /// it), any, or the digest of the only image that may be; without a value: any
    #[arg(long, value_name = "WHAT", num_args = 0..=1, require_equals = true, default_missing_value = "any", default_value = "never")]
    pub(in crate::cli) replace: Replace,
    /// Description of the image
    #[arg(short, long, value_name = "TEXT", help_heading = METADATA)]
    pub(in crate::cli) message: Option<String>,
    /// Only request the save and print its ID
    #[arg(long, help_heading = REPORT)]
    pub(in crate::cli) no_wait: bool,
    /// How to show progress
    #[arg(long, value_enum, default_value_t = Mode::Auto, value_name = "HOW", help_heading = REPORT)]
    pub(in crate::cli) progress: Mode,
    /// Output format, with --no-wait
    #[arg(short = 'o', long, value_enum, default_value_t = Format::Table, requires = "no_wait", help_heading = REPORT)]
    pub(in crate::cli) format: Format,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct KubectlSessions {
    /// In all namespaces
    #[arg(short = 'A', long)]
    pub(in crate::cli) all_namespaces: bool,
    /// Output format
    #[arg(short = 'o', long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct KubectlLs {
    /// Only saves in this state
    #[arg(long, value_name = "STATE", value_parser = state)]
    pub(in crate::cli) state: Option<job::State>,
    /// Maximum number of entries
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=500))]
    pub(in crate::cli) limit: u32,
    /// Continue after an earlier page, with the cursor that it ended with
    #[arg(long, value_name = "WHERE")]
    pub(in crate::cli) after: Option<String>,
    /// Output format
    #[arg(short = 'o', long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct KubectlStatus {
    /// ID of the save
    pub(in crate::cli) id: uuid::Uuid,
    /// Output format
    #[arg(short = 'o', long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct KubectlWatch {
    /// ID of the save
    pub(in crate::cli) id: uuid::Uuid,
    /// How to show progress
    #[arg(long, value_enum, default_value_t = Mode::Auto, value_name = "HOW")]
    pub(in crate::cli) progress: Mode,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct KubectlCancel {
    /// ID of the save
    pub(in crate::cli) id: uuid::Uuid,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct KubectlImages {
    /// Only images whose name, tag, message or session contains this
    #[arg(long, value_name = "TEXT")]
    pub(in crate::cli) search: Option<String>,
    /// Page of the list
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(in crate::cli) page: u32,
    /// Images on a page
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=500))]
    pub(in crate::cli) page_size: u32,
    /// Output format
    #[arg(short = 'o', long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
}
