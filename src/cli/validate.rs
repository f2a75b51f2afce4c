//! `validate`: compares a layer, an image or a container with a specification, or writes one.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use tokio_util::sync::CancellationToken;

use super::args::Validate;
use super::exit::Usage;
use super::print::print;
use super::{output, packages, reading, signals, write_stdout};
use crate::common::cancel::Cancelled;
use crate::common::private_files::FileMode;
use crate::image::verify::specify;
use crate::image::verify::validate::{self, Expected, Report};
use crate::layer::{self, Compression, Plan};
use crate::node::container::{self, Roots};
use crate::save;
use crate::save::source::LayerReader;
use crate::store::destination::Target;

/// Maximum number of differences that are printed.
const NAMED_DIFFERENCES: usize = 20;
/// What precedes the name of a container.
const CONTAINER: &str = "container:";

/// What is compared or described.
enum Subject {
    Layer(PathBuf),
    Image(Target),
    Container(String),
}

impl Subject {
    fn parse(text: &str) -> anyhow::Result<Self> {
        if let Some(name) = text.strip_prefix(CONTAINER) {
            return Ok(Self::Container(name.to_owned()));
        }
        let transport = text.starts_with("oci:") || text.starts_with("oci-archive:");
        let local = text.starts_with(['.', '/']) || Path::new(text).exists();
        if transport || packages::is_image(text) && !local {
            return Ok(Self::Image(text.parse().map_err(save::Error::from)?));
        }
        Ok(Self::Layer(text.into()))
    }
}

/// Returns whether the verb reads a container.
pub(super) fn reads_container(args: &Validate) -> bool {
    args.subject.starts_with(CONTAINER)
}

pub(super) fn run(roots: &Roots, args: &Validate) -> anyhow::Result<()> {
    let subject = Subject::parse(&args.subject)?;
    let of_image = matches!(subject, Subject::Image(_));
    if args.tree && !of_image {
        return Err(Usage("--tree is for images, which have a whole tree".to_owned()).into());
    }
    let task = match (&args.against, &args.write) {
        (Some(spec), _) => Task::Compare {
            expected: Box::new(Expected::load(spec)?),
            of_image,
        },
        (None, file) => Task::Write {
            file: file.clone().filter(|file| file.as_os_str() != "-"),
            tree: args.tree,
            texts: args.texts,
        },
    };
    let report = match subject {
        Subject::Layer(path) => {
            let file = File::open(&path)
                .with_context(|| format!("cannot open {}", super::text::path(&path)))?;
            task.run(vec![Ok(Box::new(BufReader::new(file)))])?
        }
        Subject::Image(target) => image(args, &target, task)?,
        Subject::Container(name) => upper(roots, &name, task)?,
    };
    let Some(report) = report else {
        return Ok(());
    };
    print(args.format, &report, |report| format!("{report}\n"))?;
    anyhow::ensure!(report.is_valid(), "{:?} is not as expected", args.subject);
    Ok(())
}

/// What is done with the layers of a subject.
enum Task {
    Compare {
        expected: Box<Expected>,
        of_image: bool,
    },
    Write {
        /// Standard output if `None`.
        file: Option<PathBuf>,
        tree: bool,
        texts: u64,
    },
}

impl Task {
    /// Takes the layers, bottom first: of an image all, else the only one. Returns the result of a comparison.
    fn run(self, layers: Vec<LayerReader>) -> anyhow::Result<Option<Report>> {
        let (file, tree, texts) = match self {
            Self::Compare { expected, of_image } => {
                let report = if of_image {
                    validate::image(layers, &expected, NAMED_DIFFERENCES)
                } else {
                    validate::layer(top(layers)?, &expected, NAMED_DIFFERENCES)
                };
                return Ok(Some(report?));
            }
            Self::Write { file, tree, texts } => (file, tree, texts),
        };
        let specify = |out: &mut dyn Write| {
            if tree {
                specify::tree(layers, texts, out)?;
            } else {
                specify::layer(top(layers)?, texts, out)?;
            }
            Ok::<(), anyhow::Error>(())
        };
        match file {
            Some(file) => output::write(&file, FileMode::PRIVATE, |file| {
                let mut out = BufWriter::new(file);
                specify(&mut out)?;
                Ok(out.flush()?)
            })?,
            None => {
                let mut text = Vec::new();
                specify(&mut text)?;
                write_stdout(&text)?;
            }
        }
        Ok(None)
    }
}

fn top(layers: Vec<LayerReader>) -> anyhow::Result<Box<dyn Read + Send>> {
    let top = layers.into_iter().next_back();
    Ok(top.context("the image has no layer")??)
}

fn image(args: &Validate, target: &Target, task: Task) -> anyhow::Result<Option<Report>> {
    let name = args.subject.as_str();
    reading::run(&args.registry, Some(target), async |registries, cancel| {
        let image = reading::open(target.clone(), registries, name).await?;
        let layers = reading::layers(&image, name, cancel)?;
        reading::blocking(move || task.run(layers)).await
    })
}

/// Makes the layer that a save of the container would add, and passes it on while it is made.
fn upper(roots: &Roots, name: &str, task: Task) -> anyhow::Result<Option<Report>> {
    let cancel = CancellationToken::new();
    signals::cancel_on_signals(&cancel).context("cannot listen for SIGINT and SIGTERM")?;
    let container = container::find(roots, name).map_err(save::Error::from)?;
    let jobs = save::cores();
    let scan = save::Rules::default().scan(&container, &[], None, jobs, &cancel)?;
    let plan = Plan::new(Arc::new(scan), None);
    let options = layer::Options {
        compression: Compression::None,
        level: Compression::None.default_level(),
        jobs,
        cancel: &cancel,
    };
    let (pipe, mut writer) = io::pipe().context("cannot make a pipe")?;
    let complete = Arc::new(AtomicBool::new(false));
    let reader = MadeLayer {
        pipe,
        complete: Arc::clone(&complete),
    };
    let (made, done) = std::thread::scope(|scope| {
        let making = scope.spawn(move || {
            let sink = |bytes: bytes::Bytes| writer.write_all(&bytes);
            let made = layer::stream::write(&plan, options, sink, &|_| {});
            complete.store(made.is_ok(), Ordering::Release);
            made
        });
        let done = task.run(vec![Ok(Box::new(reader))]);
        (making.join(), done)
    });
    match made.map_err(|_| save::Error::Worker)? {
        // The reader's own error says why it takes no more.
        Err(layer::Error::Sink(_)) => {}
        Err(layer::Error::Cancelled) => return Err(Cancelled.into()),
        Err(error) => return Err(save::Error::from(error).into()),
        Ok(made) => {
            for file in &made.unstable {
                tracing::warn!(path = file.path, what = ?file.what, "changed while it was read");
            }
        }
    }
    done
}

/// A layer while it is made. Its end is an error unless it is complete.
struct MadeLayer {
    pipe: io::PipeReader,
    complete: Arc<AtomicBool>,
}

impl Read for MadeLayer {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = self.pipe.read(out)?;
        if read == 0 && !out.is_empty() && !self.complete.load(Ordering::Acquire) {
            return Err(io::Error::other("the layer could not be made"));
        }
        Ok(read)
    }
}
