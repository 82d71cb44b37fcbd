//! What an agent finds that cannot be by what it knows: it leaves it alone, says so, and lets it be ended.

use std::sync::Arc;
use std::time::Duration;

use hearth::agent::{
    Door, ExecSpec, Launched, SwapMode, SwapOrder, Verb, VerbError, VmError, VmRecord, VmState, Write,
};
use hearth::sim::{Faults, SimHost};
use hearth::wire::frame;

use crate::life::{life, request};

const NAME: &str = "odd";

async fn runs(door: Arc<dyn Door>) {
    let launch = door.launch(request(Some(NAME.to_owned()))).await;
    let Ok(Launched::Vm(vm)) = launch else { panic!("a launch: {launch:?}") };
    door.launched(vm).await.expect("it runs");
}

/// Changes the VM's record while no agent runs, as an older ledger that is put back does.
fn rewrite(host: &SimHost, change: impl FnOnce(&mut VmRecord)) {
    host.with_store(|store| {
        let mut vm = store.vms().expect("VMs").remove(0);
        change(&mut vm);
        store.commit(&[Write::Vm(Box::new(vm))]).expect("written");
    });
}

/// The next agent leaves it alone; it is there, and ends when somebody says so.
fn is_left_alone(host: &SimHost, why: &'static str) {
    let told = host.clone();
    let done = life(host, Faults::default(), |door| async move {
        let host = told;
        // The agent looks in the background.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let vm = door.vm(NAME).expect("it is there");
        let report = vm.quarantine.clone().expect("in quarantine").report;
        assert!(report.contains(why), "{report}");
        assert!(host.living().contains(&vm.id), "what runs is not ended");
        for verb in [Verb::Pause, Verb::Resume] {
            let asked = door.ask(NAME, verb).await;
            assert!(matches!(asked, Err(VmError::Verb(VerbError::Quarantined { .. }))), "{asked:?}");
        }
        assert!(door.exec(NAME, ExecSpec { argv: vec!["true".to_owned()], ..ExecSpec::default() }).await.is_err());
        let told = door.events(0).await.expect("events");
        assert!(told.iter().any(|event| event.kind == "vm_quarantined"));
        door.ask(NAME, Verb::Remove { grace: Duration::from_secs(10) }).await.expect("removed");
        assert_eq!((host.living(), host.directories(), host.jailed()), (vec![], vec![], vec![]));
    });
    done.expect("no crash");
    assert_eq!(host.violations(), Vec::<String>::new());
}

#[test]
fn a_vmm_with_another_secret_is_left_alone() {
    let host = SimHost::new(21);
    life(&host, Faults::default(), runs).expect("no crash");
    rewrite(&host, |vm| vm.nonce.0[0] ^= 1);
    is_left_alone(&host, "another secret");
}

#[test]
fn a_vmm_of_a_newer_program_is_left_alone() {
    let host = SimHost::new(22);
    life(&host, Faults::default(), runs).expect("no crash");
    rewrite(&host, |vm| vm.wire_version += 1);
    is_left_alone(&host, "start a newer agent");
}

#[test]
fn a_vmm_of_a_program_two_versions_older_is_left_alone() {
    let host = SimHost::new(26);
    life(&host, Faults::default(), runs).expect("no crash");
    rewrite(&host, |vm| vm.wire_version = frame::VERSION_MIN - 1);
    is_left_alone(&host, "start the agent of the version before");
}

#[test]
fn a_hibernated_vm_that_runs_is_left_alone() {
    let host = SimHost::new(23);
    life(&host, Faults::default(), |door| async move {
        runs(door.clone()).await;
        let order = SwapOrder { mode: SwapMode::Page, wake_after: None, because: "a test".to_owned() };
        door.ask(NAME, Verb::SwapOut(order)).await.expect("out");
    })
    .expect("no crash");
    rewrite(&host, |vm| vm.state = VmState::SwappedOut { mode: SwapMode::Hibernate });
    is_left_alone(&host, "which of the two is newer");
}

#[test]
fn what_was_found_once_need_not_be_there_for_ever() {
    let host = SimHost::new(24);
    life(&host, Faults::default(), runs).expect("no crash");
    rewrite(&host, |vm| vm.wire_version += 1);
    let looked = |quarantined: bool| {
        life(&host, Faults::default(), |door| async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert_eq!(door.vm(NAME).expect("it is there").quarantine.is_some(), quarantined);
        })
        .expect("no crash");
    };
    looked(true);
    rewrite(&host, |vm| vm.wire_version -= 1);
    looked(false);
    life(&host, Faults::default(), |door| async move {
        door.ask(NAME, Verb::Pause).await.expect("it is like any other again");
    })
    .expect("no crash");
}
