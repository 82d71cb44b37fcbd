//! Secrets that a guest holds, by its own word: no bundle is made of them unasked, since every clone would have them.

use std::time::Duration;

use hearth_guest_wire::{FromGuest, SECRETS_MAX, ToGuest};
use tokio::time::timeout;

use super::{Outcome, Work, unreachable};
use crate::agent::guest::{self, ANSWER_LIMIT, GuestError, GuestLink, printable};
use crate::agent::vm_state::FailureCause;
use crate::agent::world::{ByteStream, World};

/// The version of the guest's protocol that knows them. Guests of earlier ones hold none that anybody could know of.
const SINCE_VERSION: u16 = 5;

/// Longest wait for a guest that is to be paused: one that is out of hand is not to run on for long.
const BEFORE_PAUSE_LIMIT: Duration = Duration::from_secs(2);

/// What helps.
const HELPS: &str = "have it give them up and remove their marks in /run/hearth/secrets.d, or ask for a bundle that has \
                     them: --with-secrets";

impl<W: World> Work<W> {
    /// Whether a bundle may be made of the guest, which runs.
    pub(super) async fn check_secrets<S: ByteStream>(&mut self, link: &mut GuestLink<S>) -> Result<(), Outcome> {
        if !self.order()?.with_secrets {
            let held = held(link).await.map_err(|error| unreachable(&error))?;
            refuse(&held)?;
        }
        Ok(())
    }

    /// Whether a bundle may be made of the guest, which stands still since before: by what it said then.
    pub(super) fn check_noted_secrets(&mut self) -> Result<(), Outcome> {
        if self.order()?.with_secrets {
            return Ok(());
        }
        match &self.record.secrets {
            Some(held) => refuse(held),
            None => Err(refused(
                "the guest did not say whether it holds secrets before it was paused, and cannot now: resume it, or ask \
                 for a bundle that has them: --with-secrets"
                    .to_owned(),
            )),
        }
    }

    /// Notes what the guest holds, which is about to be paused. One that does not answer is paused all the same.
    pub(super) async fn note_secrets(&mut self) {
        let asked = async {
            let mut link = guest::connect(self.shared.world.vmm(), &self.record.id).await?;
            held(&mut link).await
        };
        let asked: Result<Result<Vec<String>, GuestError>, _> = timeout(BEFORE_PAUSE_LIMIT, asked).await;
        self.record.secrets = asked.ok().and_then(Result::ok);
    }
}

/// What the guest says it holds: the names.
async fn held<S: ByteStream>(link: &mut GuestLink<S>) -> Result<Vec<String>, GuestError> {
    if link.version < SINCE_VERSION {
        return Ok(Vec::new());
    }
    let FromGuest::Secrets(names) = link.request(&ToGuest::Secrets, ANSWER_LIMIT).await? else {
        return Err(GuestError::Unexpected);
    };
    Ok(names.iter().take(SECRETS_MAX).map(|name| printable(name)).collect())
}

fn refuse(held: &[String]) -> Result<(), Outcome> {
    if held.is_empty() {
        return Ok(());
    }
    let names = held.join(", ");
    Err(refused(format!("the guest says that it holds secrets, which every clone would have ({names}): {HELPS}")))
}

fn refused(detail: String) -> Outcome {
    Outcome::Failed(FailureCause::Secrets { detail })
}
