//! Settings of the network stack: the files below `/proc/sys/net` (ip-sysctl.rst), which are those of the calling
//! thread's network namespace.

use std::io;
use std::path::{Path, PathBuf};

const DIR: &str = "/proc/sys/net";

/// Longest value that is read, in bytes.
const VALUE_BYTES_MAX: usize = 4096;

/// Why a setting could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("network setting {setting}")]
pub struct NetconfError {
    /// The setting, below `/proc/sys/net`.
    pub setting: String,
    /// The system's answer.
    #[source]
    pub source: io::Error,
}

fn failed(setting: &str) -> impl Fn(io::Error) -> NetconfError {
    move |source| NetconfError { setting: setting.to_owned(), source }
}

/// The value of `setting`, e.g. `ipv6/conf/all/forwarding`, without the end of line.
pub fn read(setting: &str) -> Result<String, NetconfError> {
    let value = path(setting).and_then(std::fs::read_to_string).map_err(failed(setting))?;
    if value.len() > VALUE_BYTES_MAX {
        return Err(failed(setting)(io::ErrorKind::FileTooLarge.into()));
    }
    Ok(value.trim_end().to_owned())
}

/// Sets `setting` to `value`. Fails with `NotFound` for what this kernel does not have, or an interface that is not
/// there.
pub fn write(setting: &str, value: &str) -> Result<(), NetconfError> {
    // Opened without creating: the setting has to be there.
    let write = |path: PathBuf| {
        let mut file = std::fs::OpenOptions::new().write(true).open(path)?;
        io::Write::write_all(&mut file, value.as_bytes())
    };
    path(setting).and_then(write).map_err(failed(setting))
}

/// Sets all of `settings` (name, value). Every one is tried; those that failed are returned.
pub fn write_all(settings: &[(&str, &str)]) -> Vec<NetconfError> {
    settings.iter().filter_map(|(setting, value)| write(setting, value).err()).collect()
}

/// Names of the interfaces that have IPv6 settings in the calling thread's namespace, `all` and `default` included.
pub fn interfaces() -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(Path::new(DIR).join("ipv6/conf"))? {
        names.extend(entry?.file_name().into_string());
    }
    Ok(names)
}

fn path(setting: &str) -> io::Result<PathBuf> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'@' | b':');
    let word = |word: &str| !word.is_empty() && word != "." && word != ".." && word.bytes().all(plain);
    if setting.split('/').all(word) {
        return Ok([DIR, setting].iter().collect());
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "not a name of a setting"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::netns;

    #[test]
    fn settings_are_those_of_the_threads_namespace() {
        let forwarding = "ipv6/conf/all/forwarding";
        let outside = read(forwarding).unwrap();
        let inside = |value: &'static str| {
            let set = move || {
                assert!(write_all(&[("ipv4/ip_forward", "1"), (forwarding, value)]).is_empty());
                (read(forwarding).unwrap(), read("ipv4/ip_forward").unwrap())
            };
            netns::in_new(set).expect("a new network namespace needs root")
        };
        assert_eq!(inside("1"), ("1".to_owned(), "1".to_owned()));
        assert_eq!(inside("0"), ("0".to_owned(), "1".to_owned()));
        assert_eq!(read(forwarding).unwrap(), outside);
    }

    #[test]
    fn what_is_not_there_is_said_by_name() {
        let error = write("ipv6/conf/nosuch0/forwarding", "1").unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::NotFound);
        assert_eq!(error.to_string(), "network setting ipv6/conf/nosuch0/forwarding");
        for outside in ["../kernel/hostname", "ipv4//x", "", "/etc/passwd"] {
            assert_eq!(read(outside).unwrap_err().source.kind(), io::ErrorKind::InvalidInput, "{outside}");
        }
        let failed = write_all(&[("ipv4/nosuch", "1"), ("ipv4/nosuch2", "1")]);
        assert_eq!(failed.len(), 2);
    }
}
