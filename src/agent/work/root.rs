//! The root of a guest on a volume: the guest's agent, which begins in the image's file system, goes on in the volume's.
//!
//! It is asked before it hears who it is, as that is written down in its root.

use std::time::Duration;

use hearth_guest_wire::{FromGuest, ToGuest};
use nix::errno::Errno;

use super::Work;
use super::volumes::disk_name;
use crate::agent::guest::{GuestError, GuestLink};
use crate::agent::volumes::VolumeUse;
use crate::agent::world::{ByteStream, World};
use crate::report::Retry;

/// The version of the guest's protocol that knows roots.
const SINCE_VERSION: u16 = 4;

/// How long the mount may take: a journal is replayed first.
const MOUNT_LIMIT: Duration = Duration::from_secs(60);

/// What helps where nothing can be a root.
const NEEDS_ROOT: &str =
    "begin the volume with an image that has a root file system: `hearth volume create --from-file`";

impl<W: World> Work<W> {
    /// Has the guest go on in the root on its volume, if that is where it is to have one. Asking again is harmless.
    pub(super) async fn enter_root<S: ByteStream>(&self, link: &mut GuestLink<S>) -> Result<(), GuestError> {
        let Some((index, used)) = self.record.spec.root() else { return Ok(()) };
        let no_root = |reason, retry| GuestError::NoRoot { volume: used.volume.clone(), reason, retry };
        if link.version < SINCE_VERSION {
            return Err(no_root(too_old(&self.record.spec.image, link.version), Retry::WithChange));
        }
        let message = ToGuest::Root { disk: disk_name(index), read_only: used.read_only };
        match link.request(&message, MOUNT_LIMIT).await {
            Ok(FromGuest::Done) => Ok(()),
            Ok(_) => Err(GuestError::Unexpected),
            Err(GuestError::Failed { errno, what }) => {
                let errno = Errno::from_raw(errno);
                let retry = if errno == Errno::EIO { Retry::Later } else { Retry::WithChange };
                Err(no_root(refused(errno, &what, used), retry))
            }
            Err(GuestError::TimedOut { limit }) => {
                let reason = format!("the guest did not mount it within {} s", limit.as_secs());
                Err(no_root(reason, Retry::Later))
            }
            Err(error) => Err(error),
        }
    }
}

fn too_old(image: &str, version: u16) -> String {
    format!(
        "the agent of image {image:?} speaks version {version}, and knows of no root but its own: make the image again, \
         `scripts/guest-image`"
    )
}

/// What the guest says, and what helps.
#[expect(clippy::wildcard_enum_match_arm, reason = "of most that can happen to a mount nobody knows what helps")]
fn refused(errno: Errno, what: &str, used: &VolumeUse) -> String {
    let helps = match errno {
        Errno::EINVAL | Errno::ENODEV | Errno::ENOENT | Errno::ENXIO | Errno::ENOMEDIUM => NEEDS_ROOT,
        Errno::EUCLEAN => "repair it from outside: `hearth volume lease`, then e2fsck by NBD",
        Errno::EIO if !used.read_only => "`hearth volume leases` tells whether somebody else has the volume by now",
        _ => return what.to_owned(),
    };
    format!("{what}; {helps}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{LeaseId, VolumeId};
    use crate::lease::LeaseSecret;

    fn used(read_only: bool) -> VolumeUse {
        VolumeUse {
            volume: VolumeId::from_random([1; 10]),
            home: None,
            bytes: 4096,
            read_only,
            lease: LeaseId::from_random([2; 10]),
            epoch: 1,
            secret: LeaseSecret::from_random([3; 16]),
            mount: Some("/".to_owned()),
            limits: Default::default(),
            standby: None,
            phase: Default::default(),
        }
    }

    #[test]
    fn what_helps_is_said_where_something_does() {
        assert!(refused(Errno::EINVAL, "/dev/vda is empty", &used(false)).ends_with("--from-file`"));
        assert!(refused(Errno::EUCLEAN, "it is damaged", &used(false)).contains("e2fsck"));
        assert!(refused(Errno::EIO, "errno 5", &used(false)).contains("leases"));
        assert_eq!(refused(Errno::EIO, "errno 5", &used(true)), "errno 5");
        assert_eq!(refused(Errno::ENOMEM, "errno 12", &used(false)), "errno 12");
    }
}
