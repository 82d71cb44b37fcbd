//! An agent that dies, or an effect that fails, at each point of a story there is.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use hearth::agent::{Door, Launched, SessionCreated, SessionError, Verb};
use hearth::sim::{Faults, SimHost};

use crate::life::{in_session, life, session};
use crate::rest::quiet_life;

/// What a client does in one life.
pub(crate) type Story = fn(SimHost, Arc<dyn Door>) -> Pin<Box<dyn Future<Output = ()>>>;

/// An agent that dies at this point.
pub(crate) fn crash(point: u64) -> Faults {
    Faults { crash_at_point: Some(point), ..Faults::default() }
}

/// An effect that fails at this point.
pub(crate) fn fail(point: u64) -> Faults {
    Faults { fail_at_point: Some(point), ..Faults::default() }
}

/// Tells the story again and again, with a fault at each of its points in turn; before it one without faults, and after
/// it the life in which everything has to come to rest. Gives the number of points.
pub(crate) fn at_every_point(faults: fn(u64) -> Faults, before: Story, story: Story) -> u64 {
    at_every_point_and(|_| {}, faults, before, story)
}

/// The same, and something happens to the host while it has no agent.
pub(crate) fn at_every_point_and(between: fn(&SimHost), faults: fn(u64) -> Faults, before: Story, story: Story) -> u64 {
    for point in 1.. {
        let host = SimHost::new(7);
        let told = AssertUnwindSafe(|| {
            life(&host, Faults::default(), |door| before(host.clone(), door)).expect("no crash before the story");
            life(&host, faults(point), |door| story(host.clone(), door));
            let passed = host.points();
            between(&host);
            life(&host, Faults::default(), |door| quiet_life(host.clone(), door)).expect("no crash in the quiet life");
            assert_eq!(host.violations(), Vec::<String>::new());
            passed
        });
        match std::panic::catch_unwind(told) {
            Ok(passed) if passed < point => return passed,
            Ok(_) => {}
            Err(panic) => {
                eprintln!("the fault was at point {point}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    0
}

/// Nothing happens before the story.
pub(crate) fn nothing(_: SimHost, _: Arc<dyn Door>) -> Pin<Box<dyn Future<Output = ()>>> {
    Box::pin(async {})
}

/// What a client does in [`a_crash_at_every_point_is_recovered_from`].
async fn whole_story(door: Arc<dyn Door>) {
    let made = door.create_session(session("tale", None)).await;
    assert!(matches!(made, Ok(SessionCreated::Session(_))));
    let launch = door.launch(in_session(Some("story".to_owned()), "tale")).await;
    let Ok(Launched::Vm(vm)) = launch else { panic!("a launch") };
    door.launched(vm).await.expect("it runs");
    door.ask("story", Verb::Pause).await.expect("paused");
    door.ask("story", Verb::Resume).await.expect("resumed");
    let grace = Duration::from_secs(10);
    let refused = door.remove_session("tale", false, grace).await;
    assert!(matches!(refused, Err(SessionError::InUse { members: 1, .. })), "{refused:?}");
    door.remove_session("tale", true, grace).await.expect("drained");
    assert!(door.vms().is_empty());
}

#[test]
fn a_crash_at_every_point_is_recovered_from() {
    let points = at_every_point(crash, nothing, |_, door| Box::pin(whole_story(door)));
    println!("{points} points");
    assert!(points > 40, "a session, a launch, pause, resume, stop and removal have more points than {points}");
}
