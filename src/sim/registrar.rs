//! Guests of a simulated host that are asked to register, and whoever looks on and does not believe it: no member runs
//! unregistered, no two that live have one executor id, none is launched anew twice, and none calculates before it has
//! heard of its registration.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use hearth_guest_wire::{FromGuest, Identity, Join, Registration};

use super::SimHost;
use crate::agent::{CalculationState, Store, VmState};
use crate::ids::VmId;

/// How a guest behaves that is asked to register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manners {
    /// It says who it is.
    Honest,
    /// It does not answer.
    Silent,
    /// It has another secret.
    WrongToken,
    /// It says it is another VM.
    OtherVm,
    /// It says it is another member.
    OtherExecutor,
    /// It has the generation of another launch.
    OldGeneration,
    /// It hangs up when it is told that it is registered, the first time.
    HangsUp,
}

impl Manners {
    const fn odd(random: u64) -> Self {
        match random % 6 {
            0 => Self::Silent,
            1 => Self::WrongToken,
            2 => Self::OtherVm,
            3 => Self::OtherExecutor,
            4 => Self::OldGeneration,
            _ => Self::HangsUp,
        }
    }
}

/// What is known of guests that register.
#[derive(Debug, Default)]
pub(super) struct Registrar {
    /// How the next ones behave; after them, by chance.
    next: VecDeque<Manners>,
    manners: BTreeMap<VmId, Manners>,
    generations: BTreeMap<VmId, [u8; 16]>,
    /// Those that have heard that they are registered.
    heard: BTreeSet<VmId>,
    /// Who was launched instead of whom.
    successors: BTreeMap<VmId, VmId>,
}

impl Registrar {
    /// Looks at the ledger; what is wrong, if anything.
    pub(super) fn look(&mut self, store: &Store) -> Vec<String> {
        let mut wrong = Vec::new();
        let (Ok(vms), Ok(calculations)) = (store.vms(), store.calculations_under_way()) else {
            return vec!["the ledger cannot be read".to_owned()];
        };
        let mut executors = BTreeSet::new();
        for vm in &vms {
            let Some(member) = &vm.spec.cluster else { continue };
            let runs = matches!(
                vm.state,
                VmState::Running
                    | VmState::Paused
                    | VmState::Saving { .. }
                    | VmState::HandingOver { .. }
                    | VmState::ChangingVolumes { .. }
            );
            if runs && (vm.registration.is_none() || !self.heard.contains(&vm.id)) {
                wrong.push(format!("{} is {} and does not know that it is registered", vm.id, vm.state.name()));
            }
            let executor = (&member.cluster, &member.executor_id);
            if vm.state.holds_resources() && !executors.insert(executor) {
                wrong.push(format!("{} is {:?}, as another living member", vm.id, member.executor_id));
            }
            if let Some(replaced) = &member.replaces {
                let first = self.successors.entry(replaced.clone()).or_insert_with(|| vm.id.clone());
                if *first != vm.id {
                    wrong.push(format!("{replaced} was launched anew as {first} and as {}", vm.id));
                }
            }
        }
        for one in calculations.iter().filter(|one| one.state == CalculationState::Running) {
            if one.member.as_ref().is_none_or(|member| !self.heard.contains(member)) {
                wrong.push(format!("{} was given to {:?}, which is not registered", one.id, one.member));
            }
        }
        wrong
    }
}

impl SimHost {
    /// Guests that register from now on behave like this, one after the other; those after them as usual.
    pub fn set_manners(&self, manners: &[Manners]) {
        self.state().registrar.next.extend(manners);
    }

    /// A guest was told who it is.
    pub(super) fn identified(&self, vm: &VmId, identity: &Identity) {
        self.state().registrar.generations.insert(vm.clone(), identity.generation);
    }

    /// A guest is asked to join; nothing when it does not answer.
    pub(super) fn join(&self, vm: &VmId, join: Join) -> Option<FromGuest> {
        let mut state = self.state();
        let known = state.registrar.manners.get(vm).copied();
        let manners = known.unwrap_or_else(|| {
            let odd = state.faults.odd_guest_permille;
            match state.registrar.next.pop_front() {
                Some(manners) => manners,
                None if state.roll(odd) => Manners::odd(state.next_random()),
                None => Manners::Honest,
            }
        });
        let registrar = &mut state.registrar;
        registrar.manners.insert(vm.clone(), manners);
        let generation = registrar.generations.get(vm).copied().unwrap_or_default();
        let Join { cluster_id, executor_id, token, endpoint, .. } = join;
        if endpoint.is_some() && manners != Manners::Silent {
            registrar.heard.insert(vm.clone());
            return Some(FromGuest::Joined { epoch: 1 });
        }
        let honest = Registration { executor_id, cluster_id, vm_id: vm.to_string(), generation, token };
        Some(FromGuest::Register(match manners {
            Manners::Silent => return None,
            Manners::Honest | Manners::HangsUp => honest,
            Manners::WrongToken => Registration { token: "not the token".to_owned(), ..honest },
            Manners::OtherVm => Registration { vm_id: VmId::from_random([0; 10]).to_string(), ..honest },
            Manners::OtherExecutor => Registration { executor_id: "somebody-else".to_owned(), ..honest },
            Manners::OldGeneration => Registration { generation: [0; 16], ..honest },
        }))
    }

    /// A guest is told that it is registered; whether it takes note of that.
    pub(super) fn registered(&self, vm: &VmId) -> bool {
        let mut state = self.state();
        if state.registrar.manners.get(vm) == Some(&Manners::HangsUp) {
            state.registrar.manners.insert(vm.clone(), Manners::Honest);
            return false;
        }
        state.registrar.heard.insert(vm.clone());
        true
    }

    /// A program in a guest has heard by the metadata service that the guest is registered.
    pub fn heard_of_registration(&self, vm: &VmId) {
        self.state().registrar.heard.insert(vm.clone());
    }
}
