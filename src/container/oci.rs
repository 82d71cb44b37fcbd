//! An OCI layout (image-spec 1.1, `image-layout.md`, `manifest.md`, `config.md`): documents and layers as files named by
//! their digests. All that is read from one is compared with the digest and the size it was named by.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

use super::fault::{ContainerError, shown};
use crate::sys::file;

/// Longest document.
const DOCUMENT_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Most layers of an image. Overlays have at most 128.
const LAYERS_MAX: usize = 512;

/// Indexes within indexes that are followed.
const NESTED_MAX: u32 = 3;

/// Names of an index's images (image-spec, `annotations.md`).
const NAME: &str = "org.opencontainers.image.ref.name";

const INDEXES: [&str; 2] =
    ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];
const MANIFESTS: [&str; 2] =
    ["application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"];
/// What begins the type of a layer; what it is packed by follows.
const LAYERS: [&str; 4] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
];

/// What an image's maker wants to be run.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Program {
    /// Entry point, and what is added to it.
    pub arguments: Vec<String>,
    /// `NAME=value` words.
    pub environment: Vec<String>,
    /// Where it runs.
    pub directory: String,
    /// As whom: a name or number, perhaps with a group behind a colon.
    pub user: String,
}

/// An image that was found.
#[derive(Debug)]
pub(super) struct Image {
    /// Its manifest's digest.
    pub(super) manifest: Digest,
    /// Its layers, lowest first.
    pub(super) layers: Vec<Blob>,
    /// What is to be run.
    pub(super) program: Option<Program>,
}

/// A SHA-256 digest in hexadecimal, as it names files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Digest(String);

impl Digest {
    fn parse(text: &str) -> Option<Self> {
        let hex = text.strip_prefix("sha256:")?;
        let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        (hex.len() == 64 && hex.bytes().all(is_hex)).then(|| Self(hex.to_owned()))
    }

    fn of(hasher: Sha256) -> Self {
        Self(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The first digits.
    pub(super) fn short(&self) -> &str {
        self.0.get(..12).unwrap_or(&self.0)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "sha256:{}", self.0)
    }
}

/// A file of a layout, as a document names it.
#[derive(Debug, Clone)]
pub(super) struct Blob {
    /// What it has to have.
    pub(super) digest: Digest,
    bytes: u64,
}

/// A file of a layout that is read, and what came of it so far.
#[derive(Debug)]
pub(super) struct Stored {
    blob: Blob,
    path: PathBuf,
    file: File,
    hasher: Sha256,
}

#[derive(Debug, Deserialize)]
struct Layout {
    #[serde(rename = "imageLayoutVersion")]
    version: String,
}

#[derive(Debug, Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Debug, Clone, Deserialize)]
struct Descriptor {
    #[serde(rename = "mediaType", default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    platform: Option<Platform>,
}

#[derive(Debug, Clone, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Debug, Deserialize)]
struct Configuration {
    #[serde(flatten)]
    platform: Platform,
    #[serde(default)]
    config: Option<Run>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Run {
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
    user: Option<String>,
}

fn malformed(document: &str, reason: impl fmt::Display) -> ContainerError {
    ContainerError::Layout { document: document.to_owned(), reason: reason.to_string() }
}

impl Platform {
    fn check(&self, document: &str) -> Result<(), ContainerError> {
        if self.is_ours() {
            return Ok(());
        }
        let reason = format!("it is for {}/{}, and guests are linux/amd64", printable(&self.os), self.architecture);
        Err(malformed(document, printable(&reason)))
    }

    fn is_ours(&self) -> bool {
        self.os == "linux" && self.architecture == "amd64"
    }
}

fn printable(text: &str) -> String {
    shown(text.as_bytes())
}

impl Image {
    /// Finds an image in the layout `layout`.
    pub(super) fn find(layout: &Path, reference: Option<&str>) -> Result<Self, ContainerError> {
        let said: Layout = parse("oci-layout", &read(&layout.join("oci-layout"))?)?;
        if !said.version.starts_with("1.") {
            return Err(malformed("oci-layout", format!("version {}, and 1 is read", printable(&said.version))));
        }
        let index: Index = parse("index.json", &read(&layout.join("index.json"))?)?;
        let mut chosen = named(index.manifests, reference)?;
        for _ in 0..NESTED_MAX {
            if !INDEXES.contains(&chosen.media_type.as_str()) {
                return Self::of_manifest(layout, &chosen);
            }
            let index: Index = document("index", layout, &chosen)?;
            chosen = for_this_platform(index.manifests)?;
        }
        Err(malformed("index", format!("more than {NESTED_MAX} indexes within each other")))
    }

    fn of_manifest(layout: &Path, chosen: &Descriptor) -> Result<Self, ContainerError> {
        if !MANIFESTS.contains(&chosen.media_type.as_str()) {
            return Err(malformed("index", format!("{} is not an image", printable(&chosen.media_type))));
        }
        let manifest: Manifest = document("manifest", layout, chosen)?;
        if manifest.layers.len() > LAYERS_MAX {
            return Err(malformed("manifest", format!("more than {LAYERS_MAX} layers")));
        }
        let configuration: Configuration = document("config", layout, &manifest.config)?;
        configuration.platform.check("config")?;
        let layers: Result<_, _> =
            manifest.layers.iter().enumerate().map(|(at, layer)| layer_blob(at, layer)).collect();
        Ok(Self {
            manifest: chosen.blob("manifest")?.digest,
            layers: layers?,
            program: configuration.config.map(program),
        })
    }
}

fn program(run: Run) -> Program {
    let Run { env, entrypoint, cmd, working_dir, user } = run;
    let arguments = [entrypoint.unwrap_or_default(), cmd.unwrap_or_default()].concat();
    let directory = working_dir.filter(|directory| !directory.is_empty());
    Program {
        arguments,
        environment: env.unwrap_or_default(),
        directory: directory.unwrap_or_else(|| "/".to_owned()),
        user: user.unwrap_or_default(),
    }
}

fn layer_blob(at: usize, layer: &Descriptor) -> Result<Blob, ContainerError> {
    let name = format!("layer {}", at + 1);
    let packer = LAYERS.iter().find_map(|begins| layer.media_type.strip_prefix(begins));
    match packer {
        Some("" | "+gzip" | ".gzip") => layer.blob(&name),
        Some(packer) => {
            let packer = printable(packer.trim_start_matches(['+', '.']));
            Err(ContainerError::Packed { layer: name, packer })
        }
        None => Err(malformed(&name, format!("{} is not a layer", printable(&layer.media_type)))),
    }
}

/// The one of an index that is meant.
fn named(manifests: Vec<Descriptor>, reference: Option<&str>) -> Result<Descriptor, ContainerError> {
    let name = |descriptor: &Descriptor| {
        let name = descriptor.annotations.as_ref().and_then(|annotations| annotations.get(NAME));
        name.map(|name| printable(name))
    };
    let names: Vec<String> = manifests.iter().filter_map(name).collect();
    let Some(reference) = reference else {
        let mut all = manifests;
        return match (all.pop(), all.len()) {
            (Some(only), 0) => Ok(only),
            (Some(last), _) => {
                all.push(last);
                for_this_platform(all).map_err(|_| ContainerError::Reference {
                    reason: "the layout has several images, and none is named: say DIR:NAME".to_owned(),
                    names,
                })
            }
            (None, _) => Err(malformed("index.json", "there is no image")),
        };
    };
    let is_meant = |descriptor: &Descriptor| {
        descriptor.digest == reference
            || descriptor
                .annotations
                .as_ref()
                .and_then(|annotations| annotations.get(NAME))
                .is_some_and(|n| n == reference)
    };
    let meant: Vec<Descriptor> = manifests.into_iter().filter(is_meant).collect();
    let none = || ContainerError::Reference {
        reason: format!("the layout has no image {:?} for linux/amd64, or several", printable(reference)),
        names: names.clone(),
    };
    match meant.as_slice() {
        [only] => Ok(only.clone()),
        _ => for_this_platform(meant).map_err(|_| none()),
    }
}

fn for_this_platform(manifests: Vec<Descriptor>) -> Result<Descriptor, ContainerError> {
    let ours = |descriptor: &Descriptor| descriptor.platform.as_ref().is_some_and(Platform::is_ours);
    let mut ours: Vec<Descriptor> = manifests.into_iter().filter(ours).collect();
    match (ours.pop(), ours.len()) {
        (Some(only), 0) => Ok(only),
        (Some(_), _) => Err(malformed("index", "it has several images for linux/amd64")),
        (None, _) => Err(malformed("index", "it has no image for linux/amd64")),
    }
}

impl Descriptor {
    fn blob(&self, document: &str) -> Result<Blob, ContainerError> {
        let digest = Digest::parse(&self.digest).ok_or_else(|| {
            malformed(document, format!("the digest {:?} is not sha256 and 64 digits", printable(&self.digest)))
        })?;
        Ok(Blob { digest, bytes: self.size })
    }
}

impl Blob {
    /// Opens it to be read.
    pub(super) fn open(&self, layout: &Path) -> Result<Stored, ContainerError> {
        let path = layout.join("blobs").join("sha256").join(&self.digest.0);
        let file = open(&path)?;
        let there = file.metadata().map_err(|source| ContainerError::Read { path: path.clone(), source })?.len();
        if there != self.bytes {
            let reason = format!("it has {there} bytes, and should have {}", self.bytes);
            return Err(malformed(&self.digest.to_string(), reason));
        }
        Ok(Stored { blob: self.clone(), path, file, hasher: Sha256::new() })
    }
}

impl Read for Stored {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.hasher.update(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }
}

impl Stored {
    /// Reads what is left, and says whether it has the digest it was named by.
    pub(super) fn check(mut self) -> Result<(), ContainerError> {
        let most = self.blob.bytes;
        io::copy(&mut self.by_ref().take(most), &mut io::sink())
            .map_err(|source| ContainerError::Read { path: self.path.clone(), source })?;
        let Self { blob, hasher, .. } = self;
        let found = Digest::of(hasher);
        if found == blob.digest {
            return Ok(());
        }
        Err(malformed(&blob.digest.to_string(), format!("it is not what it was: its digest is {found}")))
    }
}

fn document<T: DeserializeOwned>(name: &str, layout: &Path, descriptor: &Descriptor) -> Result<T, ContainerError> {
    let blob = descriptor.blob(name)?;
    if blob.bytes > DOCUMENT_BYTES_MAX {
        return Err(malformed(name, format!("it is longer than {DOCUMENT_BYTES_MAX} bytes")));
    }
    let mut stored = blob.open(layout)?;
    let mut text = Vec::new();
    let path = stored.path.clone();
    stored
        .by_ref()
        .take(DOCUMENT_BYTES_MAX)
        .read_to_end(&mut text)
        .map_err(|source| ContainerError::Read { path, source })?;
    stored.check()?;
    parse(name, &text)
}

fn parse<T: DeserializeOwned>(document: &str, text: &[u8]) -> Result<T, ContainerError> {
    serde_json::from_slice(text).map_err(|error| malformed(document, error))
}

fn open(path: &Path) -> Result<File, ContainerError> {
    let opened = file::open_regular(path).map_err(|source| ContainerError::Read { path: path.to_owned(), source })?;
    opened.ok_or_else(|| ContainerError::NotAFile { path: path.to_owned() })
}

fn read(path: &Path) -> Result<Vec<u8>, ContainerError> {
    let mut text = Vec::new();
    let failed = |source| ContainerError::Read { path: path.to_owned(), source };
    open(path)?.take(DOCUMENT_BYTES_MAX + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > DOCUMENT_BYTES_MAX {
        return Err(malformed(&path.display().to_string(), format!("it is longer than {DOCUMENT_BYTES_MAX} bytes")));
    }
    Ok(text)
}
