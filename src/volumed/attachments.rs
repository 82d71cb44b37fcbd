//! Which VMMs are served with what: written down, so that whoever starts next goes on with it.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::sets::SetNumbers;
use crate::sys::file;
use crate::wire::volumed::{Attachment, AttachmentReport, LINES_MAX};

/// The file, in the daemon's own directory.
pub(super) const FILE: &str = "attachments.json";

/// Most attachments: more slots than the VMs of a host have.
const ATTACHMENTS_MAX: usize = 2048;

/// The file's content.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Written {
    format: u32,
    attachments: Vec<Attachment>,
}

/// The only version.
const FORMAT: u32 = 1;

/// Why an attachment is not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum AttachError {
    /// Words nobody can use.
    #[error("{0}")]
    Words(&'static str),
    /// Too many.
    #[error("{ATTACHMENTS_MAX} attachments, which is the most")]
    Full,
    /// It could not be written down.
    #[error("write down the attachments in {}", path.display())]
    NotWritten {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Its connections are still there.
    #[error("requests of {} are still being carried out", .0.display())]
    Busy(PathBuf),
}

/// An attachment and how it goes. Its dialers end when it does.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) attachment: Attachment,
    numbers: Arc<SetNumbers>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    ended: bool,
    /// A dialer says that there is no use in trying again.
    given_up: bool,
    /// The number of the present set of connections; 0: it has none yet.
    set: u64,
    /// Connections that belong to it.
    members: u32,
    /// One of them ended, so the others do: none joins until none is left, and the next set begins.
    breaking: bool,
    connected: u8,
    trouble: Option<String>,
}

impl Kept {
    fn new(attachment: Attachment, numbers: &Arc<SetNumbers>) -> Self {
        Self { attachment, numbers: Arc::clone(numbers), state: Mutex::default(), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is kept no longer.
    pub(super) fn ended(&self) -> bool {
        self.state().ended
    }

    fn end(&self) {
        self.state().ended = true;
        self.changed.notify_all();
    }

    /// Rests, unless it ends meanwhile; whether it is still kept.
    pub(super) fn rest(&self, time: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.state(), time, |state| !state.ended);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !state.ended
    }

    /// The set that a connection belongs to that is made now; waits until the connections of the one before have ended.
    /// `None`: the attachment is kept no longer. `now_ms` is the wall clock's.
    pub(super) fn set(&self, now_ms: u64) -> Option<u64> {
        let waited = self.changed.wait_while(self.state(), |state| state.breaking && !state.ended);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        if state.set == 0 {
            state.set = self.numbers.next(now_ms, self.attachment.upstream.is_some());
        }
        (!state.ended).then_some(state.set)
    }

    /// Lets a connection belong to its set, if that has not ended meanwhile. Whoever breaks the set must find its socket.
    pub(super) fn join(&self, set: u64) -> bool {
        let mut state = self.state();
        let joins = !state.ended && !state.breaking && state.set == set;
        state.members += u32::from(joins);
        joins
    }

    /// Nothing of a connection that joined is being carried out any more. If requests came by it, its set ends: whether
    /// there are others to be ended.
    pub(super) fn leave(&self, had_requests: bool) -> bool {
        let mut state = self.state();
        state.members = state.members.saturating_sub(1);
        state.breaking |= had_requests;
        if state.breaking && state.members == 0 {
            state.breaking = false;
            state.set = 0;
            self.changed.notify_all();
        }
        state.breaking
    }

    /// Notes that a connection is there.
    pub(super) fn connected(&self) {
        let mut state = self.state();
        state.connected = state.connected.saturating_add(1);
        state.trouble = None;
    }

    /// Notes that one is there no longer.
    pub(super) fn disconnected(&self) {
        let mut state = self.state();
        state.connected = state.connected.saturating_sub(1);
    }

    /// Notes that there is no use in trying again.
    pub(super) fn give_up(&self) {
        self.state().given_up = true;
    }

    /// Notes why there is no connection; whether that is news.
    pub(super) fn trouble(&self, text: &str) -> bool {
        let mut state = self.state();
        let is_news = state.connected == 0 && state.trouble.as_deref() != Some(text);
        if is_news {
            state.trouble = Some(text.to_owned());
        }
        is_news
    }

    fn report(&self) -> AttachmentReport {
        let state = self.state();
        AttachmentReport {
            attachment: self.attachment.clone(),
            connected: state.connected,
            trouble: state.trouble.clone(),
        }
    }
}

/// What became of an attachment that was asked for.
#[derive(Debug, Default)]
pub(super) struct Attached {
    /// The new one, to be dialed; `None`: it is so already.
    pub(super) new: Option<Arc<Kept>>,
    /// The one of the same socket that it takes the place of.
    pub(super) before: Option<Arc<Kept>>,
}

/// All attachments.
#[derive(Debug)]
pub(super) struct Attachments {
    path: PathBuf,
    numbers: Arc<SetNumbers>,
    kept: Mutex<BTreeMap<PathBuf, Arc<Kept>>>,
}

impl Attachments {
    /// Reads what was written down; gives it, to be dialed.
    pub(super) fn open(directory: &Path) -> io::Result<(Self, Vec<Arc<Kept>>)> {
        let path = directory.join(FILE);
        let numbers = Arc::new(SetNumbers::open(directory));
        let written = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice::<Written>(&bytes)?,
            Err(error) if error.kind() == ErrorKind::NotFound => Written::default(),
            Err(error) => return Err(error),
        };
        let kept: BTreeMap<_, _> = written
            .attachments
            .into_iter()
            .map(|attachment| (attachment.socket.clone(), Arc::new(Kept::new(attachment, &numbers))))
            .collect();
        let to_dial = kept.values().cloned().collect();
        Ok((Self { path, numbers, kept: Mutex::new(kept) }, to_dial))
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Arc<Kept>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_down(&self, kept: &BTreeMap<PathBuf, Arc<Kept>>) -> Result<(), AttachError> {
        let attachments = kept.values().map(|kept| kept.attachment.clone()).collect();
        let written = serde_json::to_vec_pretty(&Written { format: FORMAT, attachments }).map_err(io::Error::other);
        let written = written.and_then(|bytes| file::replace(&self.path, &bytes));
        written.map_err(|source| AttachError::NotWritten { path: self.path.clone(), source })
    }

    /// Takes an attachment, in the place of one of the same socket. One that was given up is tried anew.
    pub(super) fn attach(&self, attachment: Attachment) -> Result<Attached, AttachError> {
        if !attachment.socket.is_absolute() {
            return Err(AttachError::Words("the path of a socket is absolute"));
        }
        if !(1..=LINES_MAX).contains(&attachment.lines) {
            return Err(AttachError::Words("an attachment has 1 to 8 connections"));
        }
        let mut kept = self.kept();
        let before = kept.get(&attachment.socket).cloned();
        let is_so = |before: &Arc<Kept>| before.attachment == attachment && !before.state().given_up;
        if before.as_ref().is_some_and(is_so) {
            return Ok(Attached::default());
        }
        if before.is_none() && kept.len() >= ATTACHMENTS_MAX {
            return Err(AttachError::Full);
        }
        let socket = attachment.socket.clone();
        let new = Arc::new(Kept::new(attachment, &self.numbers));
        kept.insert(socket.clone(), Arc::clone(&new));
        if let Err(error) = self.write_down(&kept) {
            match before {
                Some(before) => kept.insert(socket, before),
                None => kept.remove(&socket),
            };
            return Err(error);
        }
        if let Some(before) = &before {
            before.end();
        }
        Ok(Attached { new: Some(new), before })
    }

    /// Keeps an attachment no longer; whether there was one.
    pub(super) fn detach(&self, socket: &Path) -> Result<bool, AttachError> {
        let mut kept = self.kept();
        let Some(before) = kept.remove(socket) else { return Ok(false) };
        if let Err(error) = self.write_down(&kept) {
            kept.insert(socket.to_owned(), before);
            return Err(error);
        }
        before.end();
        Ok(true)
    }

    /// All of them.
    pub(super) fn reports(&self) -> Vec<AttachmentReport> {
        self.kept().values().map(|kept| kept.report()).collect()
    }

    /// Ends the dialers. What is written down stays.
    pub(super) fn end_all(&self) {
        self.kept().values().for_each(|kept| kept.end());
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.kept().is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{LeaseId, VolumeId};

    fn attachment(socket: &str, epoch: u64) -> Attachment {
        Attachment {
            socket: socket.into(),
            volume: VolumeId::from_random([1; 10]),
            lease: LeaseId::from_random([2; 10]),
            epoch,
            read_only: false,
            lines: 4,
            upstream: None,
        }
    }

    #[test]
    fn attachments_are_there_again() {
        let dir = tempfile::tempdir().unwrap();
        let (attachments, none) = Attachments::open(dir.path()).unwrap();
        assert!(none.is_empty() && attachments.is_empty());
        let Attached { new: first, before } = attachments.attach(attachment("/run/a", 1)).unwrap();
        assert!(first.is_some() && before.is_none());
        assert!(attachments.attach(attachment("/run/a", 1)).unwrap().new.is_none(), "it is so already");
        first.unwrap().give_up();
        let Attached { new: first, before } = attachments.attach(attachment("/run/a", 1)).unwrap();
        assert!(before.unwrap().ended() && !first.unwrap().ended(), "it is tried anew");
        let Attached { new: second, before } = attachments.attach(attachment("/run/a", 2)).unwrap();
        assert!(before.unwrap().ended() && !second.unwrap().ended());
        attachments.attach(attachment("/run/b", 1)).unwrap();
        let (again, to_dial) = Attachments::open(dir.path()).unwrap();
        assert_eq!(to_dial.iter().map(|kept| kept.attachment.epoch).collect::<Vec<_>>(), [2, 1]);
        assert!(again.detach(Path::new("/run/a")).unwrap() && !again.detach(Path::new("/run/a")).unwrap());
        assert!(to_dial[0].ended() && !to_dial[0].rest(Duration::from_secs(60)));
        assert_eq!(Attachments::open(dir.path()).unwrap().1.len(), 1);
        for wrong in [attachment("run/a", 1), Attachment { lines: 0, ..attachment("/run/c", 1) }] {
            assert!(matches!(again.attach(wrong), Err(AttachError::Words(_))));
        }
    }

    #[test]
    fn the_connections_of_a_set_end_together() {
        let dir = tempfile::tempdir().unwrap();
        let numbers = Arc::new(SetNumbers::open(dir.path()));
        let kept = Arc::new(Kept::new(attachment("/run/a", 1), &numbers));
        let set = kept.set(1000).unwrap();
        assert!(set == 1000 && kept.join(set) && kept.join(set) && kept.join(set));
        assert!(!kept.leave(false), "one that never had a request ends alone");
        assert!(kept.join(set));
        assert!(kept.leave(true), "there are others to be ended");
        assert!(!kept.join(set), "nobody joins a set that ends");
        let next = std::thread::spawn({
            let kept = Arc::clone(&kept);
            move || kept.set(0)
        });
        assert!(kept.leave(true) && !kept.leave(false), "the last one");
        assert_eq!(next.join().unwrap(), Some(set + 1));
        assert!(!kept.join(set) && kept.join(set + 1), "a connection that was begun before is of no use");
        kept.end();
        assert!(!kept.join(set + 1) && kept.set(0).is_none());
    }

    #[test]
    fn a_trouble_is_news_once() {
        let dir = tempfile::tempdir().unwrap();
        let kept = Kept::new(attachment("/run/a", 1), &Arc::new(SetNumbers::open(dir.path())));
        assert!(kept.trouble("no") && !kept.trouble("no") && kept.trouble("still no"));
        kept.connected();
        assert!(!kept.trouble("of another connection"));
        kept.disconnected();
        assert!(kept.trouble("no"));
    }
}
