//! Names of the image that are made by PID 1 and not by the kernel.
//!
//! A busybox is one file under some eighty names. Unpacking a name from the initrd costs 20 ms on an emulated kernel, a
//! second and a half of boot for all of them; made from here one costs half of that, and only a name that is about to
//! be run has to be there at once. So the image carries a list, and the names are made
//! - when the loop is idle, one at a time;
//! - one of them before a program of that name is started;
//! - all of them before any other program is started, and before a shell: what those look for is not known.

use alloc::ffi::CString;
use alloc::vec::Vec;
use core::ffi::CStr;
use core::fmt::Write as _;

use crate::stats::read_whole;
use crate::sys::{self, Console, Errno, Fd};

/// The list: lines `directory name target`, each a symbolic link.
const LIST: &CStr = c"/etc/links";

/// A program that finds others by path: the one name of the list that needs all the others.
const SHELLS: [&[u8]; 2] = [b"sh", b"ash"];

/// One link to be made.
struct Link {
    directory: usize,
    name: CString,
    target: CString,
}

/// The links not made yet.
#[derive(Default)]
pub(crate) struct Links {
    directories: Vec<(CString, Option<Fd>)>,
    left: Vec<Link>,
}

impl Links {
    /// The image's list; an image without one has no such links.
    pub(crate) fn read() -> Self {
        let mut links = Self::default();
        let Ok(list) = read_whole(LIST) else { return links };
        for line in list.split(|byte| *byte == b'\n') {
            let mut words = line.split(|byte| *byte == b' ').map(|word| CString::new(word).unwrap_or_default());
            let (Some(directory), Some(name), Some(target)) = (words.next(), words.next(), words.next()) else {
                continue;
            };
            let known = links.directories.iter().position(|(path, _)| *path == directory);
            let directory = known.unwrap_or_else(|| {
                links.directories.push((directory, None));
                links.directories.len() - 1
            });
            links.left.push(Link { directory, name, target });
        }
        links
    }

    /// Makes one; says whether there was one to make.
    pub(crate) fn make_one(&mut self) -> bool {
        let Some(link) = self.left.pop() else {
            // The directories need not stay open.
            self.directories = Vec::new();
            return false;
        };
        if let Err(errno) = self.make(&link) {
            let _ = writeln!(
                Console,
                "hearth-init: link {}: errno {}",
                link.name.to_bytes().escape_ascii(),
                errno.number()
            );
        }
        true
    }

    /// Makes what a program needs that was asked for by this name or path.
    pub(crate) fn make_for(&mut self, program: &[u8]) {
        let name = program.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let listed = self.left.iter().position(|link| link.name.to_bytes() == name);
        match listed {
            Some(index) if !SHELLS.contains(&name) => {
                // Last of those left, so that it is the next.
                let end = self.left.len() - 1;
                self.left.swap(index, end);
                self.make_one();
            }
            Some(_) | None => while self.make_one() {},
        }
    }

    fn make(&mut self, link: &Link) -> Result<(), Errno> {
        let (path, open) = self.directories.get_mut(link.directory).ok_or(Errno::NOENT)?;
        let directory = match open {
            Some(directory) => directory,
            None => open.insert(sys::open_read(path)?),
        };
        match sys::make_link(directory, &link.name, &link.target) {
            // The image has a file of that name: it is meant.
            Err(Errno::EXIST) => Ok(()),
            other => other,
        }
    }
}
