//! A bundle, with what it builds on, as one stream of bytes. All of it is compared with its digests on the way: what is
//! damaged breaks off, and has no end that anybody would take it for whole by.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::archive::{MEMORY_BYTES_MAX, Writer};
use super::damage::{Damage, ReadBundleError};
use super::digest::Digest;
use super::image::{Content, Image, View};
use super::manifest::Manifest;
use super::places::{MANIFEST, MEMORY, STATE};
use super::run;
use super::signatures::{BundleSignature, SignError, Signed};
use super::store::Store;
use crate::ids::BundleId;
use crate::report::Retry;
use crate::units::PAGE_BYTES;

/// A bundle that is being exported. Nobody removes it, or what it builds on, meanwhile.
#[derive(Debug)]
pub struct Export {
    store: Store,
    /// Parents first.
    chain: Vec<Link>,
}

/// One of a chain, open.
#[derive(Debug)]
struct Link {
    id: BundleId,
    manifest: Arc<Manifest>,
    manifest_file: File,
    state: File,
    memory: File,
    signatures: Vec<BundleSignature>,
}

/// Why a bundle was not exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// It, or what it builds on, cannot be read or is not whole.
    #[error(transparent)]
    Read(#[from] ReadBundleError),
    /// Its signatures cannot be read.
    #[error(transparent)]
    Signatures(#[from] SignError),
    /// Nobody takes it any more.
    #[error("export bundle {bundle}: write it")]
    Write {
        /// The id.
        bundle: BundleId,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl ExportError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Read(error) => error.retry(),
            Self::Signatures(error) => error.retry(),
            Self::Write { .. } => Retry::Later,
        }
    }
}

impl Store {
    /// Opens a bundle and what it builds on, to write them into one stream.
    pub fn open_export(&self, id: &BundleId) -> Result<Export, ExportError> {
        let mut export = Export { store: self.clone(), chain: Vec::new() };
        // Nothing is removed between two of a chain.
        let _changes = self.lock_changes();
        let mut next = Some(id.clone());
        while let Some(id) = next {
            let link = self.open_link(&id)?;
            next = match &link.manifest.parent {
                // By the depths, which become smaller, chains end.
                Some(parent) => Some(self.parent_manifest(&id, &link.manifest, parent).map(|_| parent.bundle.clone())?),
                None => None,
            };
            *self.lock_exported().entry(id).or_default() += 1;
            export.chain.push(link);
        }
        export.chain.reverse();
        Ok(export)
    }

    fn open_link(&self, id: &BundleId) -> Result<Link, ExportError> {
        let manifest = self.manifest(id)?;
        let open = |name| self.places().open(id, name);
        let (manifest_file, state, memory) = (open(MANIFEST)?, open(STATE)?, open(MEMORY)?);
        self.check_length(id, &self.stamp(id, &memory, MEMORY)?, &manifest)?;
        let Signed { manifest_digest, mut signatures, .. } = self.signed(id)?;
        // Somebody wrote into the file who is not this program: nobody would take the others with it.
        signatures.retain(|one| one.is_of(&manifest_digest));
        Ok(Link { id: id.clone(), manifest, manifest_file, state, memory, signatures })
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        let mut exported = self.store.lock_exported();
        for link in &self.chain {
            if let Some(count) = exported.get_mut(&link.id) {
                *count -= 1;
                if *count == 0 {
                    exported.remove(&link.id);
                }
            }
        }
    }
}

impl Export {
    /// Writes all of it.
    pub fn write(mut self, to: impl Write) -> Result<(), ExportError> {
        let bundle = self.chain.last().map(|link| link.id.clone());
        let unwritten = |source| match &bundle {
            Some(bundle) => ExportError::Write { bundle: bundle.clone(), source },
            None => ReadBundleError::File { bundle: BundleId::from_digest([0; 16]), path: "".into(), source }.into(),
        };
        let mut writer = Writer::begin(to).map_err(unwritten)?;
        for at in 0..self.chain.len() {
            let (manifest, state) = self.small_files(at)?;
            writer.manifest(&manifest).and_then(|()| writer.state(&state)).map_err(unwritten)?;
            drop((manifest, state));
            self.memory(at, &mut writer, &unwritten)?;
            for one in &self.chain[at].signatures {
                writer.signature(one).map_err(unwritten)?;
            }
        }
        writer.end().map(drop).map_err(unwritten)
    }

    /// The manifest's bytes and the state's.
    fn small_files(&mut self, at: usize) -> Result<(Vec<u8>, Vec<u8>), ExportError> {
        let store = self.store.clone();
        let Link { id, manifest, manifest_file, state, .. } = &mut self.chain[at];
        let bytes = store.manifest_bytes(id, manifest_file)?;
        let mut content = Vec::new();
        // One more, so that what is too long differs.
        let limit = manifest.state.bytes.saturating_add(1);
        (&*state).take(limit).read_to_end(&mut content).map_err(|source| store.unread(id, STATE, source))?;
        if Digest::of(&content) != manifest.state.digest {
            return Err(damaged(id, Damage::State).into());
        }
        Ok((bytes, content))
    }

    /// Writes the memory of one of the chain, chunk by chunk, each compared with its digest before.
    fn memory(
        &self,
        at: usize,
        writer: &mut Writer<impl Write>,
        unwritten: &impl Fn(io::Error) -> ExportError,
    ) -> Result<(), ExportError> {
        let Link { id, manifest, memory, .. } = &self.chain[at];
        let unread = |source| ExportError::Read(self.store.unread(id, MEMORY, source));
        let mut view = self.view(at).map_err(unread)?;
        let (memory_bytes, chunk_bytes) = (manifest.machine.memory_bytes, u64::from(manifest.memory.chunk_bytes));
        let own = Image::new(memory, memory_bytes, manifest.memory.chunk_bytes).map_err(unread)?;
        let held: Option<Vec<_>> =
            manifest.memory.pages.as_ref().map(|pages| pages.iter().map(|run| run.bytes(PAGE_BYTES)).collect());
        let below = at.checked_sub(1).map(|below| &self.chain[below].manifest.memory);
        let mut buffer = vec![0; MEMORY_BYTES_MAX];
        for index in 0..manifest.chunk_count() {
            let start = index * chunk_bytes;
            let chunk = start..start.saturating_add(chunk_bytes).min(memory_bytes);
            let (first_page, last_page) = (chunk.start / PAGE_BYTES, (chunk.end - 1) / PAGE_BYTES);
            let found = match below.filter(|_| !view.holds(index)) {
                Some(below) => below.digest(index),
                None => match view.chunk(index).map_err(unread)? {
                    Content::Data(bytes) => Some(Digest::of(bytes)),
                    Content::Zero { .. } => None,
                },
            };
            match (manifest.memory.digest(index), found) {
                (wanted, found) if wanted == found => {}
                (Some(_), _) => return Err(damaged(id, Damage::Chunk { index, first_page, last_page }).into()),
                (None, _) => return Err(damaged(id, Damage::NotZero { index, first_page, last_page }).into()),
            }
            for data in run::intersect(own.data(), &chunk) {
                // In a diff, what lies outside of its pages is not its.
                let parts = match &held {
                    Some(held) => run::intersect(held, &data).collect(),
                    None => vec![data],
                };
                for part in parts {
                    // At most a chunk, and a chunk is at most as long as the buffer.
                    let bytes = &mut buffer[..usize::try_from(part.end - part.start).unwrap_or(0)];
                    memory.read_exact_at(bytes, part.start).map_err(unread)?;
                    writer.memory(part.start, bytes).map_err(unwritten)?;
                }
            }
        }
        Ok(())
    }

    /// The memory of one of the chain, as its guest sees it.
    fn view(&self, at: usize) -> io::Result<View<'_>> {
        let links = &self.chain[..=at];
        view(links.iter().map(|link| (&*link.manifest, &link.memory)))
    }
}

/// The memory of the last of a chain, as its guest sees it; parents first.
pub(super) fn view<'a>(mut chain: impl Iterator<Item = (&'a Manifest, &'a File)>) -> io::Result<View<'a>> {
    let image = |(manifest, memory): (&Manifest, &'a File)| {
        Image::new(memory, manifest.machine.memory_bytes, manifest.memory.chunk_bytes)
    };
    let first = chain.next().ok_or(io::ErrorKind::InvalidInput)?;
    chain.try_fold(View::flat(image(first)?), |view, (manifest, memory)| {
        let pages = manifest.memory.pages.as_deref().unwrap_or_default();
        Ok(view.with(image((manifest, memory))?, pages))
    })
}

fn damaged(bundle: &BundleId, damage: Damage) -> ReadBundleError {
    ReadBundleError::Damaged { bundle: bundle.clone(), damage }
}
