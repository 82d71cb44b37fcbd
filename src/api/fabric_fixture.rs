//! Hosts of a fabric for tests: real agents on simulated hosts, and a link between them that loses and keeps what it
//! carries.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http_body_util::BodyExt;

use super::peer;
use crate::agent::config::{Config, Overrides, load};
use crate::agent::peers::{
    Callee, Channel, HEAD_HEADER, LinkError, PeerAnswer, PeerCall, PeerKey, PeerLine, PeerLink, PeerSetup, SEAL_HEADER,
};
use crate::agent::{
    Agent, Door, EventRecord, LaunchRequest, Launched, SessionCreated, SessionRequest, VmRecord, VolumeWish,
};
use crate::sim::{Faults, SimHost, SimWorld};

/// A configuration with a fabric of these peers: name, address and number.
#[expect(clippy::disallowed_methods, reason = "a file of a test, which need not survive anything")]
pub(super) fn config(number: u16, more: &str, peers: &[(&str, &str, u16)]) -> Config {
    let mut text = format!("[fabric]\nhost_number = {number}\nipv6_prefix = \"fd3c:91aa:7e2::/48\"\n{more}\n");
    for (name, address, number) in peers {
        text.push_str(&format!("[[peers]]\nname = \"{name}\"\naddress = \"{address}\"\nhost_number = {number}\n"));
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hearth.toml");
    std::fs::File::create(&path).unwrap().write_all(text.as_bytes()).unwrap();
    load(Overrides { config: Some(path), ..Overrides::default() }).unwrap()
}

/// A host with an agent.
#[derive(Clone)]
pub(super) struct Host {
    pub(super) name: String,
    pub(super) sim: SimHost,
    pub(super) agent: Agent<SimWorld>,
    pub(super) door: Arc<dyn Door>,
}

impl Host {
    pub(super) async fn start(name: &str, config: Config) -> Self {
        let seed = name.bytes().map(u64::from).sum();
        Self::start_on(SimHost::new(seed), name, config).await
    }

    /// The next agent of a host.
    pub(super) async fn start_on(sim: SimHost, name: &str, config: Config) -> Self {
        sim.set_boot(Duration::from_millis(20));
        let agent = Agent::start(sim.begin_life(Faults::default()), config).await.unwrap();
        let door: Arc<dyn Door> = Arc::new(agent.clone());
        Self { name: name.to_owned(), sim, agent, door }
    }

    pub(super) async fn session(&self, number: u32) -> String {
        let request = SessionRequest { session_network_id: Some(number), ..SessionRequest::default() };
        match self.door.create_session(request).await.unwrap() {
            SessionCreated::Session(view) => view.record.id.to_string(),
            SessionCreated::Answered(_) => panic!("there was no key"),
        }
    }

    pub(super) async fn vm(&self, name: &str, session: Option<u32>) -> Arc<VmRecord> {
        self.vm_with(name, session, Vec::new()).await
    }

    /// The same, with volumes.
    pub(super) async fn vm_with(&self, name: &str, session: Option<u32>, volumes: Vec<VolumeWish>) -> Arc<VmRecord> {
        let request = LaunchRequest {
            name: Some(name.to_owned()),
            image: "demo".to_owned(),
            session: session.map(|number| number.to_string()),
            volumes,
            ..LaunchRequest::default()
        };
        let Launched::Vm(vm) = self.door.launch(request).await.unwrap() else { panic!("there was no key") };
        self.door.launched(vm).await.unwrap()
    }

    /// The events of a kind, oldest first.
    pub(super) async fn events(&self, kind: &str) -> Vec<EventRecord> {
        let mut events = self.door.events(0).await.unwrap();
        events.retain(|event| event.kind == kind);
        events
    }

    /// Waits for something that comes with an event, or with a hello.
    pub(super) async fn until(&self, what: &str, is: impl Fn(&Self) -> bool) {
        for _ in 0..2000 {
            if is(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{} after 100 s: not {what}", self.name);
    }

    pub(super) fn conflicts(&self) -> Vec<String> {
        self.door.fabric().unwrap().conflicts
    }

    pub(super) fn peer_state(&self, name: &str) -> &'static str {
        let fabric = self.door.fabric().unwrap();
        fabric.peers.iter().find(|view| view.peer.name == name).unwrap().state.name()
    }
}

/// A link between agents without a network: a request is handed to the one at its address.
#[derive(Clone, Default)]
pub(super) struct Wire {
    hosts: Arc<Mutex<BTreeMap<IpAddr, Host>>>,
    /// Requests as they were sent.
    pub(super) sent: Arc<Mutex<Vec<PeerCall>>>,
    pub(super) is_cut: Arc<AtomicBool>,
}

impl Wire {
    /// Puts a host at an address and starts to say hello, with this key.
    pub(super) async fn plug(&self, host: &Host, address: &str, key: Option<&[u8]>) {
        let address: IpAddr = address.parse().unwrap();
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner).insert(address, host.clone());
        let link = Arc::new(End { wire: self.clone(), from: address, sim: host.sim.clone(), life: host.sim.life() });
        let setup = PeerSetup { key: key.map(PeerKey::new), link, host: host.name.clone() };
        host.door.start_peers(setup).await.unwrap();
    }

    pub(super) fn unplug(&self, address: &str) {
        let address: IpAddr = address.parse().unwrap();
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner).remove(&address);
    }

    /// Hands a request to the host at `to`, as from the host at `from`: its connection is as good as one by TLS.
    pub(super) async fn deliver(&self, from: IpAddr, to: IpAddr, call: PeerCall) -> io::Result<PeerAnswer> {
        let [sender, host] =
            [from, to].map(|at| self.hosts.lock().unwrap_or_else(PoisonError::into_inner).get(&at).cloned());
        let fabric = sender.and_then(|sender| sender.door.fabric());
        let channel = fabric.map_or(Channel::Plain, |fabric| Channel::Tls { number: fabric.config.host.into() });
        let host = host.filter(|host| !self.is_cut.load(Ordering::Relaxed) && !host.sim.has_crashed());
        let host = host.ok_or(io::Error::from(io::ErrorKind::HostUnreachable))?;
        let PeerCall { method, path, body, head } = call;
        let mut request = Request::builder().method(method).uri(path);
        if let Some(head) = head {
            request = request.header(HEAD_HEADER, head);
        }
        let request = request.body(Body::from(body)).unwrap();
        let answer = peer::answer(&*host.door, &host.name, from, channel, request).await;
        let status = answer.status().as_u16();
        let seal = answer.headers().get(SEAL_HEADER).map(|value| value.to_str().unwrap().to_owned());
        let body = answer.into_body().collect().await.unwrap().to_bytes().to_vec();
        Ok(PeerAnswer { status, body, seal })
    }
}

#[derive(Clone)]
struct End {
    wire: Wire,
    from: IpAddr,
    sim: SimHost,
    life: u64,
}

impl PeerLink for End {
    fn open(&self, to: Callee) -> BoxFuture<'_, Result<Box<dyn PeerLine>, LinkError>> {
        let line: Box<dyn PeerLine> = Box::new(Line { end: self.clone(), to: to.at.ip() });
        std::future::ready(Ok(line)).boxed()
    }
}

struct Line {
    end: End,
    to: IpAddr,
}

impl PeerLine for Line {
    fn call(self: Box<Self>, call: PeerCall) -> BoxFuture<'static, Result<PeerAnswer, LinkError>> {
        async move {
            let Self { end, to } = *self;
            if end.sim.life() != end.life || end.sim.has_crashed() {
                // A dead agent's.
                return std::future::pending().await;
            }
            end.wire.sent.lock().unwrap_or_else(PoisonError::into_inner).push(call.clone());
            Ok(end.wire.deliver(end.from, to, call).await?)
        }
        .boxed()
    }
}
