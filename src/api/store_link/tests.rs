//! A store of the test's own on a socket of this machine, which answers as it should, and as it should not.

use super::*;
use crate::report::Retry;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// Short enough for a test, long enough for a busy machine.
const LINK: HttpStores =
    HttpStores { progress: Duration::from_millis(700), range: Duration::from_secs(3), file: Duration::from_secs(3) };

/// What is written after another.
#[derive(Clone)]
enum Piece {
    Bytes(Vec<u8>),
    Wait(Duration),
    /// For ever.
    Endless(Vec<u8>),
}

fn text(text: &str) -> Vec<Piece> {
    vec![Piece::Bytes(text.as_bytes().to_vec())]
}

/// Answers one request with these pieces, and gives what it was asked.
async fn store(pieces: Vec<Piece>) -> (String, JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let authority = listener.local_addr().unwrap().to_string();
    let serving = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        for piece in pieces {
            match piece {
                Piece::Bytes(bytes) => drop(stream.write_all(&bytes).await),
                Piece::Wait(long) => tokio::time::sleep(long).await,
                Piece::Endless(bytes) => while stream.write_all(&bytes).await.is_ok() {},
            }
        }
        String::from_utf8(head).unwrap()
    });
    (authority, serving)
}

async fn get(pieces: Vec<Piece>, range: Option<Range<u64>>, bytes_max: u64) -> Result<Bytes, StoreLinkError> {
    let (authority, serving) = store(pieces).await;
    let got = LINK.get(&authority, "/base/file", range, bytes_max).await;
    serving.abort();
    got
}

#[tokio::test]
async fn a_file_and_a_range_come_as_they_are() {
    let (authority, serving) = store(text("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwhole")).await;
    assert_eq!(LINK.get(&authority, "/base/b-1/manifest.json", None, 5).await.unwrap(), "whole");
    let asked = serving.await.unwrap().to_lowercase();
    assert!(asked.starts_with("get /base/b-1/manifest.json http/1.1\r\n"), "{asked}");
    assert!(asked.contains(&format!("host: {authority}\r\n")) && !asked.contains("range:"), "{asked}");
    let answer = "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 10-13/99\r\nContent-Length: 4\r\n\r\npart";
    let (authority, serving) = store(text(answer)).await;
    assert_eq!(LINK.get(&authority, "/x", Some(10..14), 4).await.unwrap(), "part");
    assert!(serving.await.unwrap().to_lowercase().contains("range: bytes=10-13\r\n"));
    // Chunked, without a length, and until the connection ends.
    for answer in [
        "HTTP/1.1 206 OK\r\nContent-Range: bytes 10-13/*\r\nTransfer-Encoding: chunked\r\n\r\n2\r\npa\r\n2\r\nrt\r\n0\r\n\r\n",
        "HTTP/1.0 206 OK\r\ncontent-range: Bytes 10-13/14\r\n\r\npart",
    ] {
        assert_eq!(get(text(answer), Some(10..14), 4).await.unwrap(), "part", "{answer}");
    }
    assert_eq!(get(text("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"), None, 4).await.unwrap(), "");
    let slowly = ["HTTP/1.1 200", " OK\r\nContent-Length: 4\r\n\r\nsl", "ow"];
    let wait = || Piece::Wait(Duration::from_millis(150));
    let slowly = slowly.iter().flat_map(|piece| [text(piece).remove(0), wait()]).collect();
    assert_eq!(get(slowly, None, 9).await.unwrap(), "slow");
}

#[tokio::test]
async fn what_is_not_there_or_elsewhere_is_told() {
    for status in [404, 410] {
        let answer = text(&format!("HTTP/1.1 {status} No\r\nContent-Length: 3\r\n\r\nno\n"));
        let got = get(answer, Some(0..4), 4).await;
        assert!(matches!(&got, Err(StoreLinkError::NotThere { status: found, .. }) if *found == status), "{got:?}");
    }
    for status in [301, 302, 303, 307, 308] {
        let answer = format!("HTTP/1.1 {status} There\r\nLocation: http://other/x\r\nContent-Length: 0\r\n\r\n");
        let error = get(text(&answer), None, 4).await.unwrap_err();
        assert!(matches!(&error, StoreLinkError::Redirected { to, .. } if to == "http://other/x"), "{error}");
        assert!(error.to_string().contains("redirects are not followed"), "{error}");
    }
    for (status, retry) in [(500, Retry::Later), (503, Retry::Later), (429, Retry::Later), (403, Retry::WithChange)] {
        let error = get(text(&format!("HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n")), None, 4).await.unwrap_err();
        assert!(matches!(error, StoreLinkError::Status { .. }) && error.retry() == retry, "{error}");
    }
    // Not modified, without a place where it is instead.
    let got = get(text("HTTP/1.1 304 Not Modified\r\n\r\n"), None, 4).await;
    assert!(matches!(got, Err(StoreLinkError::Status { status: 304, .. })), "{got:?}");
}

#[tokio::test]
async fn ranges_are_those_that_were_asked_for() {
    let whole = "HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n01234567890123456789";
    let error = get(text(whole), Some(10..14), 4).await.unwrap_err();
    assert!(matches!(error, StoreLinkError::NoRanges { status: 200 }), "{error}");
    assert!(error.to_string().contains("does not do ranges"), "{error}");
    for range in
        ["", "bytes 9-12/99", "bytes 10-14/99", "bytes 10-13/13", "bytes 10-13", "pages 10-13/99", "bytes */99"]
    {
        let answer = format!("HTTP/1.1 206 OK\r\nContent-Range: {range}\r\nContent-Length: 4\r\n\r\npart");
        let got = get(text(&answer), Some(10..14), 4).await;
        assert!(matches!(&got, Err(StoreLinkError::OtherRange { first: 10, last: 13, .. })), "{range}: {got:?}");
    }
    let got = get(text("HTTP/1.1 206 OK\r\nContent-Length: 4\r\n\r\npart"), Some(10..14), 4).await;
    assert!(matches!(got, Err(StoreLinkError::OtherRange { .. })), "{got:?}");
    let got = get(text("HTTP/1.1 416 No\r\nContent-Length: 0\r\n\r\n"), Some(10..14), 4).await;
    assert!(matches!(got, Err(StoreLinkError::Short { found: 0, wanted: 4, .. })), "{got:?}");
    let packed = "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\npart";
    assert!(matches!(get(text(packed), None, 4).await, Err(StoreLinkError::Encoded { .. })));
}

#[tokio::test]
async fn lengths_are_bounds() {
    let part = "HTTP/1.1 206 OK\r\nContent-Range: bytes 10-13/99\r\n";
    for (answer, wanted) in [
        (format!("{part}Content-Length: 4\r\n\r\npa"), 2),
        (format!("{part}Content-Length: 3\r\n\r\npar"), 3),
        (format!("{part}\r\n"), 0),
    ] {
        let got = get(text(&answer), Some(10..14), 4).await;
        assert!(matches!(&got, Err(StoreLinkError::Short { found, wanted: 4, .. }) if *found == wanted), "{got:?}");
    }
    let cut = get(text("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nfour"), None, 9).await;
    assert!(matches!(cut, Err(StoreLinkError::Short { found: 4, .. })), "{cut:?}");
    let long = get(text("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwhole"), None, 4).await;
    assert!(matches!(long, Err(StoreLinkError::Long { most: 4, .. })), "{long:?}");
    let endless = |head: &str, body: &[u8]| vec![Piece::Bytes(head.as_bytes().to_vec()), Piece::Endless(body.to_vec())];
    // Large chunks: the bound on the length is met long before that on the time, on a busy host as well.
    let chunk = [&b"1000\r\n"[..], &[7; 4096], b"\r\n"].concat();
    for (head, body) in [
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", chunk.as_slice()),
        ("HTTP/1.1 200 OK\r\n\r\n", &[7; 4096]),
    ] {
        let got = get(endless(head, body), None, 1 << 20).await;
        assert!(matches!(got, Err(StoreLinkError::Long { most: 1_048_576, .. })), "{got:?}");
    }
    // A head without an end, and a chunk that is one endless size.
    for (head, body) in [
        ("HTTP/1.1 200 OK\r\n", &b"X-More: and more\r\n"[..]),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", &b"1;more"[..]),
    ] {
        let got = get(endless(head, body), None, 1 << 20).await;
        assert!(matches!(got, Err(StoreLinkError::Way(_))), "{got:?}");
    }
}

#[tokio::test]
async fn a_store_that_is_slow_or_nobody_is_given_up() {
    let stalled = |got: Result<Bytes, StoreLinkError>| {
        assert!(matches!(got, Err(StoreLinkError::Stalled { .. })), "{got:?}");
    };
    let wait = || Piece::Wait(Duration::from_secs(60));
    stalled(get(vec![wait()], None, 4).await);
    stalled(get([text("HTTP/1.1 200 OK\r\n"), vec![wait()]].concat(), None, 4).await);
    stalled(get([text("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfo"), vec![wait()]].concat(), None, 4).await);
    // A byte now and then is progress, and still has an end.
    let mut drip = text("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n");
    for _ in 0..100 {
        drip.extend([Piece::Bytes(b"x".to_vec()), Piece::Wait(Duration::from_millis(100))]);
    }
    let got = get(drip, None, 100).await;
    assert!(matches!(got, Err(StoreLinkError::TimedOut { .. })), "{got:?}");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let authority = listener.local_addr().unwrap().to_string();
    drop(listener);
    let error = LINK.get(&authority, "/x", None, 4).await.unwrap_err();
    assert!(matches!(error, StoreLinkError::Way(_)) && error.retry() == Retry::Later, "{error}");
}

#[tokio::test]
async fn garbage_is_no_answer() {
    for answer in ["", "\r\n\r\n", "SSH-2.0-x\r\n", "HTTP/1.1 abc\r\n\r\n", "HTTP/2.0 200\r\n\r\n", "\u{16}\u{3}\u{1}"]
    {
        let got = get(text(answer), None, 4).await;
        assert!(matches!(got, Err(StoreLinkError::Way(_))), "{answer:?}: {got:?}");
    }
    let control = "HTTP/1.1 302 X\r\nLocation: http://a/\u{1b}[31m\r\nContent-Length: 0\r\n\r\n";
    let got = get(text(control), None, 4).await.unwrap_err().to_string();
    assert!(!got.chars().any(char::is_control), "{got:?}");
}

#[test]
fn authorities_are_connected_to() {
    for (authority, wanted) in [
        ("store", "store:80"),
        ("store:8080", "store:8080"),
        ("192.0.2.7", "192.0.2.7:80"),
        ("[2001:db8::7]", "[2001:db8::7]:80"),
        ("[2001:db8::7]:9", "[2001:db8::7]:9"),
    ] {
        assert_eq!(socket(authority), wanted);
    }
}

proptest! {
    #[test]
    fn ranges_are_read_as_they_are_written(first in 0_u64..1 << 40, count in 1_u64..1 << 20, more in 0_u64..9) {
        let range = first..first + count;
        let last = range.end - 1;
        let total = range.end + more;
        prop_assert_eq!(content_range(&format!("bytes {first}-{last}/{total}")), Some(range.clone()));
        prop_assert_eq!(content_range(&format!("bytes {first}-{last}/*")), Some(range));
        prop_assert_eq!(content_range(&format!("bytes {first}-{last}/{last}")), None);
    }

    #[test]
    fn any_text_is_a_range_or_none(text in "\\PC{0,40}|bytes [0-9*/ -]{0,40}") {
        if let Some(range) = content_range(&text) {
            prop_assert!(range.start < range.end);
        }
    }
}
