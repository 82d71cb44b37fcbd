//! Connections over sockets of this machine: what a host takes, what it refuses, and in which words.

use std::net::SocketAddr;

use rustls::SignatureScheme;
use rustls::client::ClientConfig;
use rustls::crypto::ring;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::*;
use crate::agent::peers::{
    Callee, HELLO_PATH, LinkError, PeerAnswer, PeerCall, PeerLink, PeerSetup, RequestHead, Signed,
};
use crate::api::fabric_fixture::{Host, config};
use crate::api::peer::{ARRIVE_LIMIT, serve};
use crate::api::peer_link::HttpLink;
use crate::tls::{client_of, no_name};

const KEY: &[u8] = &[7; 32];
const OTHER_KEY: &[u8] = &[8; 32];

/// Longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(20);

/// What an upgrade needs.
const PLAIN_PEERS: &str = "key_file = '/etc/hearth/fabric.key'\nplain_peers = true";

fn key() -> PeerKey {
    PeerKey::new(KEY)
}

fn tls(key: &[u8], number: u16) -> PeerTls {
    PeerTls::new(&PeerKey::new(key), number).unwrap()
}

/// Host 2 of a fabric, which knows host 1, and where it listens.
struct Called {
    host: Host,
    at: SocketAddr,
    _end: watch::Sender<bool>,
}

impl Called {
    async fn start(more: &str, tls: Option<PeerTls>) -> Self {
        let (end, ending) = watch::channel(false);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        // Nobody is at that address: this host's own hellos are not what these tests are about.
        let host = Host::start("b", config(2, more, &[("a", "2001:db8::a", 1)])).await;
        let link = Arc::new(HttpLink::new(tls.clone(), false));
        host.door.start_peers(PeerSetup { key: Some(key()), link, host: "b".to_owned() }).await.unwrap();
        tokio::spawn(serve(listener, tls, Arc::clone(&host.door), "b".into(), ending));
        Self { host, at, _end: end }
    }

    /// As it is usually.
    async fn usual() -> Self {
        Self::start("", Some(tls(KEY, 2))).await
    }

    fn callee(&self, number: Option<u16>) -> Callee {
        Callee { name: "b".to_owned(), at: self.at, number, limit: LIMIT }
    }

    /// A signed request of a host, with its head.
    fn request(&self, from: u16, path: &str) -> (PeerCall, RequestHead) {
        let body = if path == HELLO_PATH { hello(from) } else { Vec::new() };
        let method = if path == HELLO_PATH { "POST" } else { "GET" };
        let what = Signed { method, path, body: &body };
        let nonce = fresh_nonce();
        let head = key().sign(from, 2, self.host.door.now().0 / 1_000_000, nonce, &what);
        (PeerCall { method, path: path.to_owned(), head: Some(head.to_string()), body }, head)
    }

    async fn call(&self, tls: PeerTls, from: u16, path: &str) -> Result<PeerAnswer, LinkError> {
        HttpLink::new(Some(tls), false).call(self.callee(Some(2)), self.request(from, path).0).await
    }

    /// Waits until a refusal is counted.
    async fn counted(&self, reason: &str) {
        let line = format!("hearth_peer_refusals_total{{reason=\"{reason}\"}}");
        for _ in 0..500 {
            if self.host.door.metrics().await.contains(&line) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not counted: {reason}: {}", self.host.door.metrics().await);
    }
}

/// Bytes that differ each time.
fn fresh_nonce() -> [u8; 16] {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut nonce = [0; 16];
    nonce[..8].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    nonce
}

fn hello(number: u16) -> Vec<u8> {
    serde_json::to_vec(&serde_json::json!({
        "ipv6_prefix": "fd3c:91aa:7e2::", "ipv4_bits": [8, 10, 6], "host_number": number,
        "instance": "1", "life": "1", "name": "x", "version": "1", "peer_host_number": 2,
    }))
    .unwrap()
}

fn code(answer: &PeerAnswer) -> (u16, String) {
    let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    (answer.status, body["error"]["code"].as_str().unwrap_or_default().to_owned())
}

fn tls_error(result: Result<PeerAnswer, LinkError>) -> TlsError {
    match result {
        Err(LinkError::Tls(error)) => error,
        other => panic!("{other:?}"),
    }
}

const MEMBERS: &str = "/peer/v1/sessions/5/members";

#[tokio::test]
async fn hosts_with_one_key_speak() {
    let called = Called::usual().await;
    for path in [MEMBERS, HELLO_PATH] {
        let (call, head) = called.request(1, path);
        let answer = HttpLink::new(Some(tls(KEY, 1)), false).call(called.callee(Some(2)), call).await.unwrap();
        assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
        assert!(key().has_sealed(&answer.seal.unwrap(), head.nonce, 200, &answer.body));
    }
}

#[tokio::test]
async fn another_key_is_named_by_both() {
    let called = Called::usual().await;
    let error = tls_error(called.call(tls(OTHER_KEY, 1), 1, MEMBERS).await);
    assert_eq!(error, TlsError::Proof(ProofError::OtherKey));
    assert!(error.to_string().contains("fabric.key_file has to be the same on both hosts"), "{error}");
    // The one that was called was told by the handshake's alert.
    called.counted("peer_key_refused").await;
}

#[tokio::test]
async fn a_host_is_the_one_that_is_called_or_said_to_be_another() {
    let called = Called::start("", Some(tls(KEY, 3))).await;
    let error = tls_error(called.call(tls(KEY, 1), 1, MEMBERS).await);
    assert_eq!(error, TlsError::OtherHost { proven: 3, wanted: 2 });
    assert!(error.to_string().contains("proves to be host number 3, but [[peers]] here says 2"), "{error}");
    // A hello goes to whoever is there: so two find out that they disagree.
    let call = called.request(1, HELLO_PATH).0;
    let answer = HttpLink::new(Some(tls(KEY, 1)), false).call(called.callee(None), call).await.unwrap();
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn a_request_is_of_the_host_whose_connection_it_came_by() {
    let called = Called::usual().await;
    for path in [MEMBERS, HELLO_PATH] {
        let answer = called.call(tls(KEY, 3), 1, path).await.unwrap();
        assert_eq!(code(&answer), (403, "peer_other_sender".to_owned()));
        let said = String::from_utf8_lossy(&answer.body).into_owned();
        assert!(said.contains("of host number 1, but the connection is of host number 3"), "{said}");
        assert!(answer.seal.is_some());
    }
}

#[tokio::test]
async fn a_host_that_is_no_peer_says_hello_and_nothing_more() {
    let called = Called::usual().await;
    assert_eq!(called.call(tls(KEY, 9), 9, HELLO_PATH).await.unwrap().status, 200);
    let answer = called.call(tls(KEY, 9), 9, MEMBERS).await.unwrap();
    assert_eq!(code(&answer), (403, "peer_unknown_host".to_owned()));
    assert!(answer.seal.is_some());
}

/// Writes these bytes and reads what comes back, until the end.
async fn say(at: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    answer
}

/// A request as agents of the version before send it.
fn plain_bytes(call: &PeerCall) -> Vec<u8> {
    let PeerCall { method, path, body, head } = call;
    let head = head.as_ref().map(|head| format!("hearth-peer: {head}\r\n")).unwrap_or_default();
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: b\r\nconnection: close\r\ncontent-type: application/json\r\n{head}\
         content-length: {length}\r\n\r\n"
    );
    [request.as_bytes(), body].concat()
}

#[tokio::test]
async fn without_tls_a_request_is_refused_in_sealed_words() {
    let called = Called::usual().await;
    for path in [HELLO_PATH, MEMBERS] {
        let answer = say(called.at, &plain_bytes(&called.request(1, path).0)).await;
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
        assert!(answer.contains("peer_plain") && answer.contains("fabric.plain_peers = true"), "{answer}");
        assert!(answer.contains("hearth-peer-seal: "), "{answer}");
    }
    called.counted("peer_plain").await;
    let unsigned = PeerCall { head: None, ..called.request(1, MEMBERS).0 };
    let answer = String::from_utf8(say(called.at, &plain_bytes(&unsigned)).await).unwrap();
    assert!(answer.starts_with("HTTP/1.1 401") && !answer.contains("hearth-peer-seal"), "{answer}");
}

#[tokio::test]
async fn while_hosts_are_upgraded_a_request_without_tls_is_taken() {
    let called = Called::start(PLAIN_PEERS, Some(tls(KEY, 2))).await;
    for path in [HELLO_PATH, MEMBERS] {
        let (call, head) = called.request(1, path);
        let answer = String::from_utf8(say(called.at, &plain_bytes(&call)).await).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let (heads, body) = answer.split_once("\r\n\r\n").unwrap();
        let seal = heads.lines().find_map(|line| line.strip_prefix("hearth-peer-seal: ")).unwrap();
        assert!(key().has_sealed(seal, head.nonce, 200, body.as_bytes()));
    }
    // What has TLS uses it all the same.
    assert_eq!(called.call(tls(KEY, 1), 1, MEMBERS).await.unwrap().status, 200);
    // And what is wrong with it is not made good by leaving it away.
    let link = HttpLink::new(Some(tls(OTHER_KEY, 1)), true);
    let error = tls_error(link.call(called.callee(Some(2)), called.request(1, MEMBERS).0).await);
    assert_eq!(error, TlsError::Proof(ProofError::OtherKey));
}

#[tokio::test]
async fn a_host_without_tls_is_spoken_with_while_hosts_are_upgraded_only() {
    // An agent of the version before: it knows no TLS, and takes what is signed.
    let older = Called::start(PLAIN_PEERS, None).await;
    let error = tls_error(older.call(tls(KEY, 1), 1, MEMBERS).await);
    assert_eq!(error, TlsError::Plain);
    for wanted in ["its agent is of an older version", "fabric.plain_peers = true", "while you upgrade"] {
        assert!(error.to_string().contains(wanted), "{error}");
    }
    let link = HttpLink::new(Some(tls(KEY, 1)), true);
    for _ in 0..2 {
        let answer = link.call(older.callee(Some(2)), older.request(1, MEMBERS).0).await.unwrap();
        assert_eq!(answer.status, 200);
    }
}

#[tokio::test]
async fn what_is_neither_tls_nor_http_is_closed() {
    let called = Called::usual().await;
    for bytes in [&b"\0\0\0"[..], b"get / HTTP/1.1\r\n\r\n", b"\x80\x2e\x01", b"\r\n"] {
        assert_eq!(say(called.at, bytes).await, b"", "{bytes:?}");
    }
    called.counted("peer_garbage").await;
    // A record of a handshake, with nothing like a handshake in it.
    let answer = say(called.at, b"\x16\x03\x01\x00\x04\x01\x00\x00\x00").await;
    assert_eq!(answer.first(), Some(&0x15), "an alert, not {answer:?}");
    called.counted("peer_handshake_failed").await;
    assert_eq!(called.call(tls(KEY, 1), 1, MEMBERS).await.unwrap().status, 200);
}

#[tokio::test]
async fn older_tls_is_refused_by_its_alert() {
    let called = Called::usual().await;
    // Client random; no session; ECDHE with AES-GCM; no compression; groups, formats, signatures: TLS 1.2's hello.
    let mut hello = vec![3, 3];
    hello.extend([0x5a; 32]);
    hello.extend([0, 0, 4, 0xc0, 0x2b, 0xc0, 0x2f, 1, 0]);
    let extensions: &[u8] = &[0, 10, 0, 4, 0, 2, 0, 23, 0, 11, 0, 2, 1, 0, 0, 13, 0, 6, 0, 4, 4, 3, 8, 4];
    hello.extend(u16::try_from(extensions.len()).unwrap().to_be_bytes());
    hello.extend(extensions);
    let length = u8::try_from(hello.len()).unwrap();
    let record = [&[0x16, 3, 1, 0, length + 4, 1, 0, 0, length], hello.as_slice()].concat();
    // A fatal alert: protocol_version.
    assert_eq!(say(called.at, &record).await, [0x15, 3, 3, 0, 2, 2, 70]);
}

/// A client that differs from an agent in one thing.
fn client(
    change: impl FnOnce(&mut ClientConfig),
    certificates: Option<(Vec<CertificateDer<'static>>, Vec<u8>)>,
) -> TlsConnector {
    let config = client_of(ByProof(key())).unwrap();
    let mut config = match certificates {
        Some((chain, key)) => {
            config.with_client_auth_cert(chain, PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key))).unwrap()
        }
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    change(&mut config);
    Arc::new(config).into()
}

/// Says nothing; how the connection ends.
async fn ends(called: &Called, client: TlsConnector) -> Result<Vec<u8>, Option<TlsError>> {
    let stream = TcpStream::connect(called.at).await.unwrap();
    let mut stream = client.connect(no_name(), stream).await.map_err(|error| of_tls(&error))?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.map_err(|error| of_tls(&error))?;
    Ok(answer)
}

#[tokio::test]
async fn a_client_has_one_certificate_with_its_own_proof() {
    let called = Called::usual().await;
    let made = |number| HostCertificate::make(&key(), number).unwrap();
    let der = |made: &HostCertificate| CertificateDer::from(made.certificate.clone());

    assert_eq!(ends(&called, client(|_| (), None)).await, Err(Some(TlsError::Refused)));
    called.counted("peer_no_certificate").await;

    let (one, two) = (made(1), made(1));
    let chain = vec![der(&one), der(&two)];
    assert_eq!(ends(&called, client(|_| (), Some((chain, one.private_key)))).await, Err(Some(TlsError::Refused)));
    called.counted("peer_other_certificate").await;

    // A proof of another host's, with a key that is not the one it is about.
    let theirs = Arc::new(rustls::sign::CertifiedKey::new(
        vec![der(&made(1))],
        ring::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(made(1).private_key)).unwrap(),
    ));
    let stolen = client(|config| config.client_auth_cert_resolver = Arc::new(Always(theirs)), None);
    let failed = ends(&called, stolen).await;
    assert!(matches!(failed, Err(Some(TlsError::Failed { .. }))), "{failed:?}");
    called.counted("peer_handshake_failed").await;
}

/// A certificate that is shown whatever is asked for.
#[derive(Debug)]
struct Always(Arc<rustls::sign::CertifiedKey>);

impl rustls::client::ResolvesClientCert for Always {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[tokio::test]
async fn another_protocol_within_is_not_spoken() {
    let called = Called::usual().await;
    let chain = |made: HostCertificate| (vec![CertificateDer::from(made.certificate)], made.private_key);
    let own = || Some(chain(HostCertificate::make(&key(), 1).unwrap()));
    let other = client(|config| config.alpn_protocols = vec![b"h2".to_vec()], own());
    assert_eq!(ends(&called, other).await, Err(Some(TlsError::OtherProtocol)));
    // What offers none gets through the handshake, and no further.
    let none = client(|config| config.alpn_protocols.clear(), own());
    assert!(!matches!(ends(&called, none).await, Ok(bytes) if !bytes.is_empty()));
    called.counted("peer_other_protocol").await;
}

#[tokio::test]
async fn connections_end_with_a_word() {
    let called = Called::usual().await;
    let stream = TcpStream::connect(called.at).await.unwrap();
    let mut stream = tls(KEY, 1).connect(stream, Some(2), LIMIT).await.unwrap();
    stream.write_all(&plain_bytes(&called.request(1, MEMBERS).0)).await.unwrap();
    let mut answer = Vec::new();
    // Without a close_notify this is an error.
    stream.read_to_end(&mut answer).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"));
    assert_eq!(stream.get_ref().1.handshake_kind(), Some(rustls::HandshakeKind::Full));
}

#[tokio::test(start_paused = true)]
async fn who_says_nothing_or_half_of_it_is_dropped_in_time() {
    let called = Called::usual().await;
    for bytes in [&b""[..], b"\x16", b"\x16\x03\x01\x01\x00\x01"] {
        let began = tokio::time::Instant::now();
        say(called.at, bytes).await;
        let took = began.elapsed();
        assert!(took <= ARRIVE_LIMIT + Duration::from_secs(1), "{bytes:?}: {took:?}");
    }
    called.counted("peer_handshake_timeout").await;
}

#[tokio::test(start_paused = true)]
async fn who_is_called_and_says_nothing_is_given_up_before_the_callers_time_is_over() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let callee = Callee { name: "b".to_owned(), at: listener.local_addr().unwrap(), number: Some(2), limit: LIMIT };
    let call = PeerCall { method: "GET", path: MEMBERS.to_owned(), body: Vec::new(), head: None };
    let error = tls_error(HttpLink::new(Some(tls(KEY, 1)), true).call(callee, call).await);
    assert_eq!(error, TlsError::TimedOut { limit: LIMIT / 4 * 3 });
    assert!(error.to_string().contains("did not finish the TLS handshake within 15000 ms"), "{error}");
}
