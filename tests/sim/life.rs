//! An agent's life on a simulated host, and what is asked in many of them.

use std::future::Future;
use std::io::Write;
use std::sync::{Arc, OnceLock};

use hearth::agent::config::{Config, Overrides, load};
use hearth::agent::{Agent, Door, LaunchRequest, SessionRequest};
use hearth::sim::{Faults, SimHost};

pub(crate) fn config() -> Config {
    static CONFIG: OnceLock<Config> = OnceLock::new();
    let read = || {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(b"[fabric]\nhost_number = 3\nipv6_prefix = 'fd3c:91aa:7e2::/48'\n").expect("it is written");
        load(Overrides { config: Some(file.path().into()), ..Overrides::default() }).expect("a configuration")
    };
    CONFIG.get_or_init(read).clone()
}

/// Runs an agent's life in a runtime of its own, until `work` is done or a fault kills the agent: then all its tasks
/// stop where they are, as in a process that is killed. Nothing comes of one that cannot begin, its ledger being full.
pub(crate) fn life<F, T>(host: &SimHost, faults: Faults, work: impl FnOnce(Arc<dyn Door>) -> F) -> Option<T>
where
    F: Future<Output = T>,
{
    life_with(host, faults, config(), work)
}

/// [`life`] with a configuration of its own.
pub(crate) fn life_with<F, T>(
    host: &SimHost,
    faults: Faults,
    config: Config,
    work: impl FnOnce(Arc<dyn Door>) -> F,
) -> Option<T>
where
    F: Future<Output = T>,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime");
    let done = runtime.block_on(async {
        let world = host.begin_life(faults);
        let living = async {
            match Agent::start(world, config).await {
                Ok(agent) => Some(work(Arc::new(agent)).await),
                // One that cannot write down that it lives does not.
                Err(_) if faults.ledger_full_at_point.is_some() => None,
                Err(error) => panic!("the ledger is readable: {error}"),
            }
        };
        let done = tokio::select! {
            biased;
            () = host.crashed() => None,
            done = living => done,
        };
        host.end_life();
        done
    });
    drop(runtime);
    done
}

pub(crate) fn request(name: Option<String>) -> LaunchRequest {
    LaunchRequest { name, image: "demo".to_owned(), ..LaunchRequest::default() }
}

pub(crate) fn in_session(name: Option<String>, session: &str) -> LaunchRequest {
    LaunchRequest { session: Some(session.to_owned()), ..request(name) }
}

/// A session of this name, with a short life or none.
pub(crate) fn session(name: &str, ttl_s: Option<u32>) -> SessionRequest {
    SessionRequest { name: Some(name.to_owned()), ttl_s, ..SessionRequest::default() }
}
