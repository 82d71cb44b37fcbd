//! A store of bundles in a namespace: a server that answers ranges, and can be slow, silent, gone or a liar.

use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What a store does with requests for memory. Manifests and states it always has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manner {
    /// Answers each after this long.
    After(Duration),
    /// Answers so many in all since it was opened, and none of the others.
    Until(usize),
    /// Takes them, and never answers.
    Silent,
    /// Closes connections.
    Gone,
    /// Sends other bytes.
    Lying,
}

struct Shelf {
    root: PathBuf,
    manner: Mutex<Manner>,
    requests: AtomicUsize,
}

/// A store; it ends when dropped.
pub(crate) struct Store {
    shelf: Arc<Shelf>,
    address: SocketAddr,
    _root: tempfile::TempDir,
}

impl Store {
    /// A store in a network namespace, with nothing in it.
    pub(crate) fn open(namespace: &str) -> Self {
        let root = tempfile::tempdir().expect("a temporary directory");
        let path = format!("/run/netns/{namespace}");
        // A socket stays in the namespace that it was made in.
        let bound = std::thread::spawn(move || {
            let namespace = std::fs::File::open(path).expect("the namespace");
            nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET).expect("enter it");
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port")
        });
        let listener = bound.join().expect("a listener");
        let address = listener.local_addr().expect("its address");
        let shelf = Arc::new(Shelf {
            root: root.path().to_owned(),
            manner: Mutex::new(Manner::After(Duration::ZERO)),
            requests: AtomicUsize::new(0),
        });
        let serving = Arc::downgrade(&shelf);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (Some(shelf), Ok(stream)) = (serving.upgrade(), stream) else { return };
                std::thread::spawn(move || drop(shelf.serve(stream)));
            }
        });
        Self { shelf, address, _root: root }
    }

    /// What to fetch from.
    pub(crate) fn source(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The same bundles as a directory.
    pub(crate) fn directory(&self) -> &Path {
        &self.shelf.root
    }

    /// Puts a copy of a bundle into it, and who signed it.
    pub(crate) fn put(&self, bundles: &Path, id: &str) {
        let to = self.shelf.root.join(id);
        std::fs::create_dir(&to).expect("a directory");
        for name in ["manifest.json", "state.bin", "memory.img"] {
            std::fs::copy(bundles.join(id).join(name), to.join(name)).expect("a copy");
        }
        let signatures = format!(".signatures/{id}.json");
        if bundles.join(&signatures).exists() {
            std::fs::create_dir_all(self.shelf.root.join(".signatures")).expect("a directory");
            std::fs::copy(bundles.join(&signatures), self.shelf.root.join(&signatures)).expect("a copy");
        }
    }

    /// What it does from now on.
    pub(crate) fn is(&self, manner: Manner) {
        *self.shelf.manner.lock().expect("nobody panics with it") = manner;
    }

    /// Requests for memory until now.
    pub(crate) fn requests(&self) -> usize {
        self.shelf.requests.load(Ordering::SeqCst)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.is(Manner::Gone);
    }
}

impl Shelf {
    fn serve(&self, mut stream: TcpStream) -> std::io::Result<()> {
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut reader = BufReader::new(stream.try_clone()?);
        loop {
            let (mut path, mut range) = (None, None);
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line)? == 0 {
                    return Ok(());
                }
                let line = line.trim_end();
                if line.is_empty() {
                    break;
                }
                match line.split_once(' ') {
                    Some(("GET", rest)) => path = rest.split(' ').next().map(str::to_owned),
                    _ => {
                        let lower = line.to_ascii_lowercase();
                        if let Some(bytes) = lower.strip_prefix("range: bytes=").and_then(|text| text.split_once('-')) {
                            range = Some((bytes.0.parse::<u64>(), bytes.1.parse::<u64>()));
                        }
                    }
                }
            }
            let path = path.unwrap_or_default();
            let Ok(mut file) = std::fs::File::open(self.root.join(path.trim_start_matches('/'))) else {
                stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")?;
                continue;
            };
            let whole = file.metadata()?.len();
            let Some((Ok(first), Ok(last))) = range else {
                let mut bytes = Vec::new();
                file.read_to_end(&mut bytes)?;
                stream.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {whole}\r\n\r\n").as_bytes())?;
                stream.write_all(&bytes)?;
                continue;
            };
            let number = self.requests.fetch_add(1, Ordering::SeqCst) + 1;
            let count = last + 1 - first;
            let mut bytes = vec![0; usize::try_from(count).expect("a chunk")];
            file.seek(SeekFrom::Start(first))?;
            file.read_exact(&mut bytes)?;
            if !self.may_send(number, &mut bytes) {
                return Ok(());
            }
            let head = format!(
                "HTTP/1.1 206 Partial Content\r\ncontent-length: {count}\r\ncontent-range: bytes {first}-{last}/{whole}\r\n\r\n"
            );
            stream.write_all(head.as_bytes())?;
            stream.write_all(&bytes)?;
        }
    }

    /// Waits as long as it has to; whether the answer to the request of this number is sent at all.
    fn may_send(&self, number: usize, bytes: &mut [u8]) -> bool {
        loop {
            let manner = *self.manner.lock().expect("nobody panics with it");
            match manner {
                Manner::After(time) => {
                    std::thread::sleep(time);
                    return true;
                }
                Manner::Lying => {
                    let middle = bytes.len() / 2;
                    bytes[middle] ^= 1;
                    return true;
                }
                Manner::Gone => return false,
                Manner::Until(last) if number <= last => return true,
                // Until the store is of another manner.
                Manner::Until(_) | Manner::Silent => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}
