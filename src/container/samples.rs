//! Archives and layouts made for tests, and a reader of what becomes of them.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use sha2::{Digest, Sha256};
use tar::{EntryType, Header};

use super::*;

/// A tar archive that says whatever a test wants.
#[derive(Debug, Clone, Default)]
pub(super) struct Tar(pub(super) Vec<u8>);

impl Tar {
    /// An entry whose header says `says` bytes, whatever follows.
    pub(super) fn raw(mut self, kind: EntryType, name: &[u8], link: &[u8], says: u64, content: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(if kind == EntryType::Directory { 0o755 } else { 0o4750 });
        header.set_uid(7);
        header.set_gid(8);
        header.set_mtime(1_700_000_000);
        header.set_size(says);
        let old = header.as_old_mut();
        old.name[..name.len()].copy_from_slice(name);
        old.linkname[..link.len()].copy_from_slice(link);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(super) fn entry(self, kind: EntryType, name: &str, link: &str, content: &[u8]) -> Self {
        self.raw(kind, name.as_bytes(), link.as_bytes(), content.len() as u64, content)
    }

    pub(super) fn file(self, name: &str, content: &[u8]) -> Self {
        self.entry(EntryType::Regular, name, "", content)
    }

    pub(super) fn directory(self, name: &str) -> Self {
        self.entry(EntryType::Directory, name, "", b"")
    }

    pub(super) fn link(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, name, target, b"")
    }

    pub(super) fn hard_link(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Link, name, target, b"")
    }

    /// An extended header for the next entry.
    pub(super) fn extended(self, records: &[(&str, &[u8])]) -> Self {
        let mut text = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            text.extend_from_slice(format!("{length} {key}=").as_bytes());
            text.extend_from_slice(value);
            text.push(b'\n');
        }
        self.entry(EntryType::XHeader, "x", "", &text)
    }

    /// The whole archive.
    pub(super) fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 1024]);
        self.0
    }
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(super) const AMPLE: Bounds = Bounds { unpacked_bytes: 64 << 20, disk_bytes: 256 << 20 };

pub(super) fn spool() -> File {
    tempfile::tempfile().unwrap()
}

/// Layers on top of each other.
pub(super) fn layered(whiteouts: Whiteouts, layers: &[Vec<u8>]) -> Result<Container, ContainerError> {
    let mut container = Container::new(spool(), AMPLE);
    for (number, layer) in layers.iter().enumerate() {
        container.layer(&format!("layer {}", number + 1), whiteouts, layer.as_slice())?;
    }
    Ok(container)
}

/// An entry of an initramfs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unpacked {
    pub(super) inode: u32,
    pub(super) mode: u32,
    pub(super) owner: (u32, u32),
    pub(super) names: u32,
    pub(super) time: u32,
    pub(super) content: Vec<u8>,
}

pub(super) const AGENT: &[u8] = b"\x7fELF agent";

/// The initramfs, read back strictly: by name, without the agent.
pub(super) fn written(container: &Container) -> BTreeMap<String, Unpacked> {
    let mut file = tempfile::tempfile().unwrap();
    let initramfs = container.write_initramfs(AGENT, &mut file).unwrap();
    assert_eq!(find_file(&mut file, AGENT_PATH).unwrap(), AGENT);
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    assert_eq!(initramfs.bytes, bytes.len() as u64);
    let mut found = BTreeMap::new();
    let mut at = 0;
    loop {
        let header = std::str::from_utf8(&bytes[at..at + 110]).unwrap();
        assert!(at.is_multiple_of(4) && header.starts_with("070701"), "{header}");
        let field = |number: usize| u32::from_str_radix(&header[6 + number * 8..14 + number * 8], 16).unwrap();
        let name_end = at + 110 + field(11) as usize;
        let name = std::str::from_utf8(&bytes[at + 110..name_end]).unwrap().strip_suffix('\0').unwrap();
        let begins = name_end.next_multiple_of(4);
        let ends = begins + field(6) as usize;
        let next = ends.next_multiple_of(4);
        assert!(bytes[name_end..begins].iter().chain(&bytes[ends..next]).all(|byte| *byte == 0));
        at = next;
        if name == "TRAILER!!!" {
            assert_eq!(at, bytes.len());
            break;
        }
        assert!(!name.starts_with('/') && !name.split('/').any(|part| part == ".." || part.is_empty()), "{name}");
        if let Some((parent, _)) = name.rsplit_once('/') {
            assert!(
                found.get(parent).is_some_and(|at: &Unpacked| at.mode & 0o170_000 == 0o040_000),
                "{name} comes first"
            );
        }
        let content = bytes[begins..ends].to_vec();
        let (owner, time) = ((field(2), field(3)), field(5));
        let entry = Unpacked { inode: field(0), mode: field(1), owner, names: field(4), time, content };
        assert!(found.insert(name.to_owned(), entry).is_none(), "{name} is there twice");
    }
    found.remove(".hearth").unwrap();
    found.remove(".hearth/init").unwrap();
    found
}

/// The names an initramfs has, without the agent's.
pub(super) fn names(container: &Container) -> Vec<String> {
    written(container).into_keys().collect()
}

/// An OCI layout in a directory.
pub(super) struct LayoutDirectory {
    pub(super) directory: tempfile::TempDir,
}

pub(super) fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

impl LayoutDirectory {
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        file::make_directories(&directory.path().join("blobs/sha256")).unwrap();
        let layout = Self { directory };
        layout.write("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
        layout
    }

    pub(super) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(super) fn write(&self, name: &str, bytes: &[u8]) {
        file::replace(&self.path().join(name), bytes).unwrap();
    }

    /// Puts a blob there; its descriptor.
    pub(super) fn blob(&self, media_type: &str, bytes: &[u8]) -> serde_json::Value {
        let digest = digest(bytes);
        self.write(&format!("blobs/sha256/{}", digest.trim_start_matches("sha256:")), bytes);
        serde_json::json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    }

    pub(super) fn index(&self, manifests: &[serde_json::Value]) {
        let index = serde_json::json!({"schemaVersion": 2, "manifests": manifests});
        self.write("index.json", index.to_string().as_bytes());
    }

    /// An image of these layers; its manifest's descriptor.
    pub(super) fn image(&self, config: &serde_json::Value, layers: &[serde_json::Value]) -> serde_json::Value {
        let config = self.blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
        let manifest = serde_json::json!({"schemaVersion": 2, "config": config, "layers": layers});
        self.blob("application/vnd.oci.image.manifest.v1+json", manifest.to_string().as_bytes())
    }

    pub(super) fn unpack(&self, reference: Option<&str>) -> Result<Container, ContainerError> {
        let source = Source::Oci { layout: self.path().to_owned(), reference: reference.map(str::to_owned) };
        Container::unpack(&source, spool(), AMPLE)
    }
}
