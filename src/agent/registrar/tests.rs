//! Who says all of it right is taken, once; who says one word wrong is told which, and nobody else's words help.

use super::*;
use crate::agent::cluster_record::{ClusterState, Membership, Registered, Token};
use crate::agent::fixture;
use crate::agent::vm_state::FailureCause;
use crate::clock::UnixNanos;
use crate::ids::{ClusterId, VmId};
use proptest::prelude::*;

pub(super) fn cluster(number: u8) -> ClusterRecord {
    ClusterRecord {
        schema_version: 1,
        id: ClusterId::from_random([number; 10]),
        name: None,
        token: Token::new(format!("secret of {number}")),
        endpoint: None,
        registration_deadline_s: 30,
        state: ClusterState::Active,
        epoch: 6,
        revision: 1,
        created_at: UnixNanos(1),
    }
}

/// A VM that is to register with its cluster.
fn member(number: u8, cluster: &ClusterRecord) -> VmRecord {
    let mut vm = fixture::vm(number, &format!("vm{number}"));
    vm.state = VmState::Registering;
    vm.generation = format!("{number:02x}").repeat(16);
    vm.spec.cluster = Some(Membership {
        cluster: cluster.id.clone(),
        executor_id: format!("e-{number}"),
        attempt: 1,
        replaces: None,
    });
    vm
}

/// What this VM says when it is honest.
fn words(cluster: &ClusterRecord, vm: &VmRecord) -> RegistrationWords {
    RegistrationWords {
        executor_id: vm.spec.cluster.as_ref().map(|member| member.executor_id.clone()).unwrap_or_default(),
        cluster_id: cluster.id.to_string(),
        vm_id: Some(vm.id.to_string()),
        generation: vm.generation.clone(),
        token: cluster.token.secret().to_owned(),
    }
}

#[test]
fn an_honest_member_is_taken_once_and_told_the_same_again_until_it_has_heard() {
    let cluster = cluster(1);
    let mut vm = member(2, &cluster);
    let words = words(&cluster, &vm);
    assert_eq!(admit(&cluster, &vm, &words), Ok(Admission::New { epoch: 7 }));
    // By the metadata service nobody is asked which VM it is.
    let unnamed = RegistrationWords { vm_id: None, ..words.clone() };
    assert_eq!(admit(&cluster, &vm, &unnamed), Ok(Admission::New { epoch: 7 }));
    vm.registration = Some(Registered { epoch: 7, at: UnixNanos(3) });
    let later = ClusterRecord { epoch: 9, ..cluster };
    assert_eq!(admit(&later, &vm, &words), Ok(Admission::Again { epoch: 7 }));
    vm.state = VmState::Running;
    assert_eq!(admit(&later, &vm, &words), Err(RegistrationRefusal::Twice));
}

#[test]
fn each_wrong_word_has_a_refusal_of_its_own() {
    use RegistrationRefusal as R;
    let (cluster, other) = (cluster(1), cluster(9));
    let vm = member(2, &cluster);
    let good = words(&cluster, &vm);
    for (wrong, refusal) in [
        (RegistrationWords { token: other.token.secret().to_owned(), ..good.clone() }, R::WrongToken),
        (RegistrationWords { token: String::new(), ..good.clone() }, R::WrongToken),
        (RegistrationWords { cluster_id: other.id.to_string(), ..good.clone() }, R::WrongCluster),
        (RegistrationWords { executor_id: "e-3".to_owned(), ..good.clone() }, R::WrongExecutor),
        (RegistrationWords { vm_id: Some(VmId::from_random([3; 10]).to_string()), ..good.clone() }, R::WrongVm),
        (RegistrationWords { generation: "03".repeat(16), ..good.clone() }, R::WrongGeneration),
        (RegistrationWords { generation: "02".repeat(15), ..good.clone() }, R::WrongGeneration),
    ] {
        assert_eq!(admit(&cluster, &vm, &wrong), Err(refusal), "{wrong:?}");
    }
    assert_eq!(admit(&other, &vm, &words(&other, &vm)), Err(R::NotInCluster));
    let elsewhere = ClusterRecord { endpoint: "192.0.2.7:7070".parse().ok(), ..cluster.clone() };
    assert_eq!(admit(&elsewhere, &vm, &good), Err(R::Elsewhere));
    let alone = fixture::vm(2, "alone");
    assert_eq!(admit(&cluster, &alone, &good), Err(R::NotInCluster));
}

#[test]
fn only_a_vm_that_registers_is_taken() {
    let cluster = cluster(1);
    let failed = VmState::Failed { cause: FailureCause::NotRegistered { detail: String::new() } };
    for state in [VmState::Launching, VmState::Running, VmState::Paused, VmState::Stopping, VmState::Stopped, failed] {
        let vm = VmRecord { state, ..member(2, &cluster) };
        assert_eq!(admit(&cluster, &vm, &words(&cluster, &vm)), Err(RegistrationRefusal::NotNow));
    }
}

proptest! {
    /// Of two members, none is taken by anything that has a word of the other.
    #[test]
    fn a_word_of_another_member_is_never_taken(mask in 0_u8..16) {
        let cluster = cluster(1);
        let (one, two) = (member(2, &cluster), member(3, &cluster));
        let (own, foreign) = (words(&cluster, &one), words(&cluster, &two));
        let of = |bit: u8| if mask & bit == 0 { &own } else { &foreign };
        let mixed = RegistrationWords {
            executor_id: of(1).executor_id.clone(),
            vm_id: of(2).vm_id.clone(),
            generation: of(4).generation.clone(),
            cluster_id: if mask & 8 == 0 { own.cluster_id.clone() } else { ClusterId::from_random([9; 10]).to_string() },
            token: own.token.clone(),
        };
        prop_assert_eq!(admit(&cluster, &one, &mixed).is_ok(), mask == 0);
        prop_assert!(admit(&cluster, &two, &mixed).is_err() || mask == 7);
    }

    #[test]
    fn words_at_random_are_refused(executor_id in ".{0,70}", generation in ".{0,40}", token in ".{0,40}") {
        let cluster = cluster(1);
        let vm = member(2, &cluster);
        let wild = RegistrationWords { executor_id, generation, token, ..words(&cluster, &vm) };
        prop_assert_eq!(admit(&cluster, &vm, &wild).is_ok(), wild == words(&cluster, &vm));
    }
}
