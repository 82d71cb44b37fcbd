//! The API's socket: a stale file is replaced, a live one is somebody else's.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};

/// Who may connect: the owner and the group. What goes over the socket is root's power over VMs.
const SOCKET_MODE: u32 = 0o660;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The path is no file's name.
    #[error("{} is not a path for a socket", path.display())]
    Path {
        /// The path.
        path: PathBuf,
    },
    /// Somebody listens there.
    #[error("another program listens on {}; stop it, or choose another --socket", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Something else is there.
    #[error("{} is there and is not a socket; remove it, or choose another --socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("listen on {}", path.display())]
    Listen {
        /// The path.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// The listening socket; its file goes with it.
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) listener: UnixListener,
    pub(super) file: SocketFile,
}

/// The file of a listening socket, removed when dropped.
#[derive(Debug)]
pub(super) struct SocketFile {
    // Held open: the path leads through it, since a socket's own path has room for 107 bytes only.
    dir: File,
    name: String,
}

impl SocketFile {
    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{}", self.dir.as_raw_fd(), self.name))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Gone already, or replaced by whoever took the path: nothing to say about it.
        let _ = std::fs::remove_file(self.path());
    }
}

/// Binds the socket, replacing a stale file.
pub(super) async fn bind(path: &Path) -> Result<Socket, ListenError> {
    let wrong = || ListenError::Path { path: path.to_owned() };
    let failed = |source| ListenError::Listen { path: path.to_owned(), source };
    let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(wrong)?.to_owned();
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(failed)?;
    let dir = File::open(parent).map_err(failed)?;
    let place = PathBuf::from(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()));
    match std::fs::symlink_metadata(&place) {
        Ok(found) if !found.file_type().is_socket() => return Err(ListenError::NotASocket { path: path.to_owned() }),
        Ok(_) => match UnixStream::connect(&place).await {
            Ok(_) => return Err(ListenError::InUse { path: path.to_owned() }),
            // Nobody listens any more.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(&place).map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    // Until its mode is set only the owner can connect: umask never adds writers.
    let listener = UnixListener::bind(&place).map_err(failed)?;
    let file = SocketFile { dir, name };
    std::fs::set_permissions(file.path(), Permissions::from_mode(SOCKET_MODE)).map_err(failed)?;
    Ok(Socket { listener, file })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        // Longer than a socket's path may be.
        let path = dir.path().join("d".repeat(120)).join("api.sock");
        let first = bind(&path).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, SOCKET_MODE);
        assert!(matches!(bind(&path).await, Err(ListenError::InUse { .. })));
        assert!(path.exists());
        // As after kill -9: the listener is gone, its file is not.
        let Socket { listener, file } = first;
        drop(listener);
        std::mem::forget(file);
        assert!(path.exists());
        let second = bind(&path).await.unwrap();
        drop(second);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_file_that_is_no_socket_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::create_dir(&path).unwrap();
        assert!(matches!(bind(&path).await, Err(ListenError::NotASocket { .. })));
        assert!(matches!(bind(Path::new("/")).await, Err(ListenError::Path { .. })));
    }
}
