//! The effect by which a guest becomes somebody: its agent is reached, and hears who it is, what its hardware addresses,
//! its network and the time are; programs of its own take note. Until all of that is acknowledged, its jail is closed.

use std::sync::Arc;
use std::time::Duration;

use hearth_guest_wire::{FromGuest, HardwareAddress, Identity, ToGuest};
use tokio::time::sleep;

use super::{Outcome, Work, ended, micros, prefaulting, unreachable};
use crate::agent::guest::{self, ANSWER_LIMIT, GuestError, GuestLink};
use crate::agent::guest_network::{self, guest_network};
use crate::agent::host_open::interface_mac;
use crate::agent::member::member;
use crate::agent::vm_state::FailureCause;
use crate::agent::world::{VmBundles, VmmHost, World, random_array};
use crate::clock::{Clock, Monotonic};
use crate::ids::Generation;
use crate::report::chain;

/// Time between two tries to reach a guest that boots. The VMM answers at once whether something listens in the guest,
/// so this bounds how late the agent notices. Each try costs a booting guest an interrupt and a packet, which on an
/// emulating host are some twenty milliseconds of its boot.
const GREET_INTERVAL: Duration = Duration::from_millis(200);

/// The first a guest's agent was heard of.
#[derive(Clone, Copy)]
struct Heard {
    /// When it said Hello.
    at: Monotonic,
    /// How long it had been running by then.
    running: Duration,
    /// The version of its protocol.
    protocol: u16,
}

/// Longest time for the programs in a guest that take note of its new identity.
const HOOKS_LIMIT: Duration = Duration::from_secs(30);

/// Largest error of a guest's wall clock that is let pass, if the host is not too busy to do better.
const CLOCK_ERROR_MAX: Duration = Duration::from_millis(50);

/// Times a clock is set in a row before what was best so far is good enough.
const CLOCK_TRIES: u32 = 5;

/// Most times a clock is set in a row.
const CLOCK_TRIES_MAX: u32 = 12;

type Stream<W> = <<W as World>::Vmm as VmmHost>::Stream;

impl<W: World> Work<W> {
    /// Waits until few enough guests are on their way to their identity. Only guests from bundles: one that boots waits
    /// for most of its time, and would keep the others waiting.
    pub(super) async fn wait_for_turn(&mut self) -> Result<(), Outcome> {
        if !self.is_launch() || self.record.spec.bundle.is_none() || self.turn.is_some() {
            return Ok(());
        }
        let (mut hurry, process, turns) = (self.hurry.clone(), self.process.clone(), Arc::clone(&self.shared.turns));
        self.turn = tokio::select! {
            biased;
            _ = hurry.wait_for(|hurry| *hurry) => return Err(Outcome::Hurried),
            end = ended(process.as_ref()) => return Err(Outcome::VmmEnded(end)),
            // It is never closed.
            turn = turns.acquire_owned() => turn.ok(),
        };
        Ok(())
    }

    pub(super) async fn greet_guest(&mut self) -> Result<(), Outcome> {
        // One whose memory is on its way may wait for it before that.
        let for_memory = if self.record.spec.lazy { self.shared.fill_patience() } else { Duration::ZERO };
        let limit = self.shared.guest_patience() + for_memory;
        let begun = self.now();
        let mut hurry = self.hurry.clone();
        let process = self.process.clone();
        let mut last = None;
        let greeting = async {
            loop {
                match self.greet_once().await {
                    Ok(heard) => return Ok(heard),
                    // It answered, and is not fit to run: asking again would not change that.
                    Err(error @ (GuestError::Hooks { .. } | GuestError::NoRoot { .. })) => {
                        return Err(unreachable(&error));
                    }
                    Err(error) => last = Some(error),
                }
                sleep(GREET_INTERVAL).await;
            }
        };
        let heard = tokio::select! {
            biased;
            _ = hurry.wait_for(|hurry| *hurry) => return Err(Outcome::Hurried),
            end = ended(process.as_ref()) => return Err(Outcome::VmmEnded(end)),
            heard = greeting => heard?,
            () = sleep(limit) => {
                let last = last.map_or_else(|| "no try ended".to_owned(), |error| chain(&error));
                let detail = format!("no answer within {} s: {last}", limit.as_secs());
                return Err(Outcome::Failed(FailureCause::GuestUnreachable { detail }));
            }
        };
        self.turn = None;
        if self.is_launch() {
            prefaulting::note(&self.shared, &self.record);
        }
        self.keep_boot_times(begun, heard).await;
        Ok(())
    }

    async fn greet_once(&self) -> Result<Heard, GuestError> {
        let world = &self.shared.world;
        let mut link = guest::connect(world.vmm(), &self.record.id).await?;
        let running = Duration::from_nanos(link.running_ns);
        let heard = Heard { at: self.now(), running, protocol: link.version };
        self.enter_root(&mut link).await?;
        let entropy = [random_array(world), random_array(world)];
        let [Ok(first), Ok(second)] = entropy else {
            return Err(GuestError::Stream(std::io::Error::other("no randomness on this host")));
        };
        let identity = Identity {
            vm_id: self.record.id.to_string(),
            hostname: self.record.hostname().to_owned(),
            generation: self.record.generation.parse::<Generation>().map_or([0; 16], |generation| generation.0),
            entropy: [first, second],
            unix_ns: world.clock().wall().0,
            interfaces: Vec::new(),
        };
        let mut messages = vec![ToGuest::Identity(identity)];
        if link.version >= guest_network::SINCE_VERSION {
            let config = &self.shared.config;
            let member = member(&self.record, config.fabric.as_ref().map(|fabric| &fabric.fabric));
            let hardware = self.hardware().await?;
            if !hardware.is_empty() {
                messages.push(ToGuest::Hardware(hardware));
            }
            messages.push(ToGuest::Network(guest_network(&member, config.mtu())));
        }
        if link.version >= guest_network::HOOKS_SINCE_VERSION {
            messages.push(ToGuest::RunHooks { timeout_ms: u32::try_from(HOOKS_LIMIT.as_millis()).unwrap_or(u32::MAX) });
        }
        let sent = self.now();
        let mut set = sent;
        let answers = link.answers(&messages, ANSWER_LIMIT, || set = self.now()).await?;
        for answer in answers {
            if let FromGuest::HooksRan(hooks) = &answer {
                if !hooks.failed.is_empty() {
                    return Err(GuestError::hooks(hooks));
                }
            } else if answer != FromGuest::Done {
                return Err(GuestError::Unexpected);
            }
        }
        if set.since(sent) > CLOCK_ERROR_MAX {
            self.set_clock(&mut link).await?;
        }
        Ok(heard)
    }

    /// Sets the guest's wall clock. The guest takes the time somewhere between its sending and its answer, so the way
    /// there and back bounds the error: on a host that is busy it is tried again, and half of the shortest way is added.
    /// It does not end with a way much longer than the shortest, which would make worse what was set before.
    pub(super) async fn set_clock(&self, link: &mut GuestLink<Stream<W>>) -> Result<(), GuestError> {
        let mut shortest = Duration::MAX;
        for tried in 1..=CLOCK_TRIES_MAX {
            let on_the_way = if shortest == Duration::MAX { Duration::ZERO } else { shortest / 2 };
            let sent = self.now();
            let unix_ns = self.shared.world.clock().wall().0.saturating_add(nanos(on_the_way));
            link.done(&ToGuest::SetClock { unix_ns }, ANSWER_LIMIT).await?;
            let took = self.now().since(sent);
            shortest = shortest.min(took);
            // It was taken after none of that time, or after all of it.
            let error = on_the_way.max(took.saturating_sub(on_the_way));
            if error <= CLOCK_ERROR_MAX || tried >= CLOCK_TRIES && error <= shortest / 4 * 3 {
                break;
            }
        }
        Ok(())
    }

    /// The hardware addresses that a guest from a bundle takes its interfaces to have, and those they have.
    async fn hardware(&self) -> Result<Vec<HardwareAddress>, GuestError> {
        let Some(bundle) = &self.record.spec.bundle else { return Ok(Vec::new()) };
        let manifest = match self.shared.fillings.of(bundle) {
            Some(filling) => Arc::clone(filling.partial.manifest()),
            // Without them it would keep those of the guest that was frozen.
            None => match self.shared.world.bundles().find(bundle.as_str()).await {
                Ok(found) => found.manifest,
                Err(error) => return Err(GuestError::Stream(std::io::Error::other(error))),
            },
        };
        let frozen = manifest.identity.macs.iter().filter_map(|text| parse_mac(text));
        let own = (0..self.record.spec.interfaces).map(|index| interface_mac(&self.record.id, index));
        Ok(frozen.zip(own).map(|(from, to)| HardwareAddress { from, to }).collect())
    }

    async fn keep_boot_times(&mut self, begun: Monotonic, heard: Heard) {
        let first_entry_ns = self.status().await.map_or(0, |status| status.first_entry_ns);
        let first_entry = Duration::from_nanos(first_entry_ns);
        let kernel = heard.at.since(begun).saturating_sub(first_entry).saturating_sub(heard.running);
        let asked = self.asked_at;
        let now = self.now();
        self.record.guest_protocol = Some(heard.protocol);
        let is_boot = self.record.spec.bundle.is_none();
        let timings = &mut self.record.timings;
        timings.answered_us = asked.map(|asked| micros(heard.at.since(asked)));
        timings.first_entry_us = Some(first_entry_ns / 1000);
        if is_boot {
            timings.kernel_us = Some(micros(kernel));
            timings.init_us = Some(micros(now.since(begun).saturating_sub(first_entry).saturating_sub(kernel)));
        }
        timings.total_us = asked.map(|asked| micros(now.since(asked)));
    }

    pub(super) async fn set_guest_clock(&self) -> Result<(), Outcome> {
        let setting = async {
            let mut link = guest::connect(self.shared.world.vmm(), &self.record.id).await?;
            self.set_clock(&mut link).await
        };
        setting.await.map_err(|error| unreachable(&error))
    }
}

/// `02:00:00:00:00:01` as bytes.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Vec<u8> = text.split(':').map_while(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes.try_into().ok()
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
