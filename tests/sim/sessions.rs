//! Sessions that end in time, and a host that changes its number.

use std::time::Duration;

use hearth::agent::{Launched, SessionCreated, SessionError, SessionRequest};
use hearth::sim::{Faults, SimHost};

use crate::life::{config, in_session, life, life_with, request, session};

#[test]
fn a_session_ends_when_its_time_has_run_out() {
    let host = SimHost::new(5);
    life(&host, Faults::default(), |door| {
        let host = host.clone();
        async move {
            let made = door.create_session(session("brief", Some(60))).await;
            let Ok(SessionCreated::Session(made)) = made else { panic!("a session: {made:?}") };
            let number = made.record.session_network_id;
            let Ok(Launched::Vm(vm)) = door.launch(in_session(None, "brief")).await else { panic!("a launch") };
            door.launched(vm).await.expect("it runs");
            tokio::time::sleep(Duration::from_secs(100)).await;
            assert!(door.vms().is_empty() && host.living().is_empty(), "its VMs are gone");
            assert!(door.sessions().await.expect("sessions").is_empty());
            // Its number rests, and whoever asks for it is told until when.
            let again = SessionRequest { session_network_id: Some(number.into()), ..SessionRequest::default() };
            let refused = door.create_session(again.clone()).await;
            assert!(matches!(refused, Err(SessionError::Resting { .. })), "{refused:?}");
            let refused = door.launch(in_session(None, &number.to_string())).await;
            assert!(refused.is_err_and(|error| error.to_string().contains("rests for another")));
            tokio::time::sleep(Duration::from_secs(120)).await;
            assert!(door.create_session(again).await.is_ok());
            let events = door.events(0).await.expect("events");
            let of_session = events.iter().filter(|event| event.subject.to_string() == made.record.id.to_string());
            let kinds: Vec<&str> = of_session.map(|event| event.kind.as_str()).collect();
            assert_eq!(kinds, ["session_created", "session_draining", "session_removed"]);
        }
    })
    .expect("no crash");
    assert_eq!(host.violations(), Vec::<String>::new());
}

#[test]
fn an_expiry_while_no_agent_ran_is_made_up_for() {
    let host = SimHost::new(6);
    let faults = Faults { crash_at_point: Some(70), ..Faults::default() };
    let life_of_maker = life(&host, faults, |door| async move {
        door.create_session(session("brief", Some(3600))).await.expect("a session");
        let Ok(Launched::Vm(vm)) = door.launch(in_session(None, "brief")).await else { panic!("a launch") };
        door.launched(vm).await.expect("it runs");
        // Until the crash: looks and sweeps pass points.
        tokio::time::sleep(Duration::from_secs(4000)).await;
    });
    assert!(life_of_maker.is_none(), "the agent was to die");
    life(&host, Faults::default(), |door| async move {
        tokio::time::sleep(Duration::from_secs(4000)).await;
        assert!(door.vms().is_empty());
        assert!(door.sessions().await.expect("sessions").is_empty());
    })
    .expect("no crash");
    assert_eq!(host.violations(), Vec::<String>::new());
}

#[test]
fn a_host_that_changed_its_number_says_so_and_takes_no_members() {
    let host = SimHost::new(8);
    life(&host, Faults::default(), |door| async move {
        door.create_session(session("old", None)).await.expect("a session");
        let Ok(Launched::Vm(vm)) = door.launch(in_session(None, "old")).await else { panic!("a launch") };
        assert_eq!(
            vm.network.as_ref().map(|network| network.ipv6.to_string()).as_deref(),
            Some("fd3c:91aa:7e2:3:0:1:0:1")
        );
        door.launched(vm).await.expect("it runs");
    })
    .expect("no crash");
    let mut changed = config();
    if let Some(fabric) = &mut changed.fabric {
        fabric.host = 4.try_into().expect("a host number");
    }
    life_with(&host, Faults::default(), changed, |door| async move {
        let conflicts = door.fabric().expect("a fabric").conflicts;
        assert!(conflicts.len() == 1 && conflicts[0].contains("host_number"), "{conflicts:?}");
        let refused = door.launch(in_session(None, "old")).await;
        assert!(refused.is_err_and(|error| error.to_string().contains("host_number")));
        let refused = door.create_session(session("new", None)).await;
        assert!(matches!(refused, Err(SessionError::FabricConflict { .. })), "{refused:?}");
        // What has no addresses is none of the fabric's business, and what is there can be removed.
        assert!(door.launch(request(None)).await.is_ok());
        door.remove_session("old", true, Duration::from_secs(1)).await.expect("drained");
    })
    .expect("no crash");
    life(&host, Faults::default(), |door| async move {
        assert!(door.fabric().expect("a fabric").conflicts.is_empty());
    })
    .expect("no crash");
    assert_eq!(host.violations(), Vec::<String>::new());
}
