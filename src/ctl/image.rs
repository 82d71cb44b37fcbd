//! `hearth image`.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::Error;
use super::call::{Agent, CallError, PROMPT};
use super::output::{Output, OutputError};
use super::progress::shown;
use super::table::{age, bytes, columns, or_dash, pairs};
use crate::api::types::{Image, ImageContainer, ImageImportRequest, ImageList};
use crate::cli::{ImageCommand, ImportArgs};

/// How long copying and hashing a kernel and an initrd may take: a GiB at slow-disk speed.
const IMPORT_LIMIT: Duration = Duration::from_secs(120);

/// How long unpacking a container may take.
const UNPACK_LIMIT: Duration = Duration::from_secs(1800);

/// Digits of a digest that a table shows.
const DIGEST_CHARS: usize = 12;

/// Why an image could not be imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The agent refused, or does not answer.
    #[error(transparent)]
    Call(#[from] CallError),
    /// A file is not there, or may not be read.
    #[error("read {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A path that JSON cannot carry.
    #[error("the path {path:?} is not UTF-8")]
    Path {
        /// The path.
        path: PathBuf,
    },
    /// Nobody takes the output.
    #[error(transparent)]
    Output(#[from] OutputError),
}

impl ImportError {
    pub(super) fn advice(&self) -> Option<String> {
        match self {
            Self::Call(error) => error.advice(),
            Self::File { .. } | Self::Path { .. } | Self::Output(_) => None,
        }
    }
}

#[derive(Serialize)]
struct Removed<'a> {
    removed: &'a str,
}

pub(super) async fn run(agent: &Agent, out: Output, command: ImageCommand) -> Result<(), Error> {
    match command {
        ImageCommand::Ls => {
            let list: ImageList = agent.get("/v1/images").await?;
            out.value(&list, |list| {
                columns(&["NAME", "DIGEST", "KERNEL", "INITRD", "AGE"], list.images.iter().map(row))
            })?;
        }
        ImageCommand::Show { image } => {
            let image: Image = agent.get(&format!("/v1/images/{}", image.as_str())).await?;
            out.value(&image, details)?;
        }
        ImageCommand::Import(args) => import(agent, out, args).await?,
        ImageCommand::Rm { image } => {
            agent.delete(&format!("/v1/images/{}", image.as_str()), PROMPT).await?;
            out.value(&Removed { removed: image.as_str() }, |done| format!("{} is removed", done.removed))?;
        }
    }
    Ok(())
}

fn row(image: &Image) -> Vec<String> {
    vec![
        image.name.clone(),
        image.digest.chars().take(DIGEST_CHARS).collect(),
        bytes(image.kernel_bytes),
        or_dash(image.initrd_bytes.map(bytes).as_deref()),
        age(image.created_at),
    ]
}

fn details(image: &Image) -> String {
    pairs([
        ("name", Some(image.name.clone())),
        ("digest", Some(image.digest.clone())),
        ("kernel", Some(bytes(image.kernel_bytes))),
        ("initrd", image.initrd_bytes.map(bytes)),
        ("command line", (!image.command_line.is_empty()).then(|| image.command_line.clone())),
        ("memory", Some(format!("{} MiB or more", image.memory_mib_min))),
        ("made of", image.container.as_ref().map(made_of)),
        ("left out", image.container.as_ref().and_then(left_out)),
        ("program", image.container.as_ref().and_then(program)),
        ("created", Some(format!("{:.0} ({} ago)", image.created_at, age(image.created_at)))),
    ])
}

fn made_of(container: &ImageContainer) -> String {
    let layers = if container.layers == 1 { "1 layer".to_owned() } else { format!("{} layers", container.layers) };
    format!("{}, {layers}; kernel and guest agent of {}", container.source, container.like)
}

fn left_out(container: &ImageContainer) -> Option<String> {
    let counted =
        [(container.devices_left_out, "device nodes"), (container.attributes_left_out, "extended attributes")];
    let counted = counted.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}"));
    let counted: Vec<String> = counted.collect();
    (!counted.is_empty()).then(|| counted.join(", "))
}

/// What to ask for, since nothing runs it: as its maker wrote it.
fn program(container: &ImageContainer) -> Option<String> {
    let program = container.program.as_ref().filter(|program| !program.arguments.is_empty())?;
    let user = if program.user.is_empty() { String::new() } else { format!(" as {}", program.user) };
    Some(format!("{:?} in {}{user}", program.arguments, program.directory))
}

async fn import(agent: &Agent, out: Output, args: ImportArgs) -> Result<(), ImportError> {
    let ImportArgs { name, kernel, initrd, rootfs, oci, like, max_size, command_line } = args;
    let limit = if kernel.is_some() { IMPORT_LIMIT } else { UNPACK_LIMIT };
    let request = ImageImportRequest {
        name,
        kernel_path: kernel.as_deref().map(found).transpose()?,
        initrd_path: initrd.as_deref().map(found).transpose()?,
        rootfs_path: rootfs.as_deref().map(found).transpose()?,
        oci_path: oci.as_ref().map(|oci| found(&oci.directory)).transpose()?,
        reference: oci.and_then(|oci| oci.name),
        like,
        unpacked_mib_max: max_size,
        command_line,
    };
    let call = agent.post("/v1/images", &request, limit);
    let image: Image = shown(&format!("import {}", request.name), call).await?;
    out.value(&image, details)?;
    Ok(())
}

/// The file as the agent finds it: its working directory is another one.
fn found(path: &Path) -> Result<String, ImportError> {
    let real = path.canonicalize().map_err(|source| ImportError::File { path: path.to_owned(), source })?;
    real.into_os_string().into_string().map_err(|path| ImportError::Path { path: path.into() })
}
