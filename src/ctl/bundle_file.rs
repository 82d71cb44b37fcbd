//! `hearth bundle export`, `import`, `key` and `sign`.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::bundle::BundleError;
use super::call::{Agent, PROMPT};
use super::output::{Output, note};
use super::progress::shown;
use super::table::bytes;
use crate::api::types::{Bundle, BundleImported, BundleList, BundleSignRequest, BundleTrust};
use crate::cli::{BundleExportArgs, BundleImportArgs, BundleKeyArgs, BundleSignArgs};
use crate::ids::{BundleId, ID_DIGEST_BYTES};
use crate::signing::{DIGEST_BYTES, KEY_BYTES, PrivateKey, PublicKey};

/// How long a file may take to come over a slow link. The agent gives up much earlier if nothing comes at all.
const IMPORT_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// Bytes read of a file at once.
const READ_BYTES: usize = 256 << 10;

/// Longest file of a key: one line.
const KEY_FILE_BYTES_MAX: u64 = 4096;

#[derive(Serialize)]
struct Exported<'a> {
    bundle: &'a str,
    file: String,
    bytes: u64,
}

#[derive(Serialize)]
struct KeyMade {
    public_key: PublicKey,
    file: String,
}

fn is_dash(path: &Path) -> bool {
    path == Path::new("-")
}

fn file_error(what: &'static str, path: &Path) -> impl Fn(io::Error) -> BundleError {
    let path = path.to_owned();
    move |source| BundleError::File { what, path: path.clone(), source }
}

pub(super) async fn export(agent: &Agent, out: Output, args: BundleExportArgs) -> Result<(), BundleError> {
    let word = args.bundle.as_str();
    let path = format!("/v1/bundles/{word}/export");
    if is_dash(&args.output) {
        if io::stdout().is_terminal() {
            return Err(BundleError::Terminal);
        }
        let body = agent.get_stream(&path).await?;
        let name = Path::new("standard output");
        copy(word, body, &mut io::stdout().lock(), name).await?;
        return Ok(());
    }
    let body = agent.get_stream(&path).await?;
    let new = beside(&args.output).ok_or_else(|| {
        file_error("write", &args.output)(io::Error::new(io::ErrorKind::InvalidInput, "it is no name of a file"))
    })?;
    let title = format!("export {word}");
    let written = shown(&title, write_file(word, body, &new)).await.and_then(|count| {
        std::fs::rename(&new, &args.output).map_err(file_error("write", &args.output))?;
        Ok(count)
    });
    let count = match written {
        Ok(count) => count,
        Err(error) => {
            // The error that matters is the first one.
            let _ = std::fs::remove_file(&new);
            return Err(error);
        }
    };
    let exported = Exported { bundle: word, file: args.output.display().to_string(), bytes: count };
    Ok(out.value(&exported, |it| format!("{}: {}", it.file, bytes(it.bytes)))?)
}

/// Where a file is written until it is whole.
fn beside(path: &Path) -> Option<PathBuf> {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name()?);
    name.push(".part");
    Some(path.with_file_name(name))
}

/// For its owner only: guests' memory is in it.
fn create_private(path: &Path, is_new: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).mode(0o600);
    if is_new {
        options.create_new(true)
    } else {
        options.create(true).truncate(true)
    };
    options.open(path)
}

async fn write_file(word: &str, body: Incoming, path: &Path) -> Result<u64, BundleError> {
    let mut file = create_private(path, false).map_err(file_error("write", path))?;
    let count = copy(word, body, &mut file, path).await?;
    file.sync_all().map_err(file_error("write", path))?;
    Ok(count)
}

/// Copies what comes. A connection that ends before the body does is an error.
async fn copy(word: &str, mut body: Incoming, to: &mut impl Write, path: &Path) -> Result<u64, BundleError> {
    let mut count = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|source| BundleError::BrokeOff { bundle: word.to_owned(), source })?;
        if let Ok(data) = frame.into_data() {
            to.write_all(&data).map_err(file_error("write", path))?;
            count += data.len() as u64;
        }
    }
    to.flush().map_err(file_error("write", path))?;
    Ok(count)
}

pub(super) async fn import(agent: &Agent, out: Output, args: BundleImportArgs) -> Result<(), BundleError> {
    if is_dash(&args.file) && io::stdin().is_terminal() {
        return Err(BundleError::Terminal);
    }
    let from: Box<dyn AsyncRead + Send + Unpin> = if is_dash(&args.file) {
        Box::new(tokio::io::stdin())
    } else {
        Box::new(tokio::fs::File::open(&args.file).await.map_err(file_error("read", &args.file))?)
    };
    let pieces = stream::unfold(from, |mut from| async move {
        let mut piece = Vec::with_capacity(READ_BYTES);
        match from.read_buf(&mut piece).await {
            Ok(0) => None,
            Ok(_) => Some((Ok(Frame::data(Bytes::from(piece))), from)),
            Err(error) => Some((Err(error), from)),
        }
    });
    let body = StreamBody::new(pieces.boxed()).boxed_unsync();
    let call = agent.post_bytes("/v1/bundle-imports", body, IMPORT_LIMIT);
    let imported: BundleImported = shown("import a bundle", call).await?;
    if !out.is_json() {
        tell(agent, &imported).await;
    }
    Ok(out.value(&imported, |it| it.bundle.id.to_string())?)
}

/// What people may want to know of a bundle that came.
async fn tell(agent: &Agent, imported: &BundleImported) {
    let BundleImported { bundle, existed, .. } = imported;
    if *existed {
        note(&format!("{} was here already", bundle.id));
    }
    if bundle.trust == BundleTrust::Untrusted {
        note("it is not launched here: nobody this host trusts signed it (`hearth bundle sign`)");
    }
    // It came; that the others cannot be listed does not matter.
    let Ok(list) = agent.get::<BundleList>("/v1/bundles").await else { return };
    let same_name = |other: &&Bundle| other.id != bundle.id && other.name == bundle.name && other.name.is_some();
    if let Some(name) = list.bundles.iter().find(same_name).and_then(|other| other.name.as_deref()) {
        note(&format!("another bundle is named {name} as well: their ids tell them apart"));
    }
}

/// Makes a key. No agent is asked.
pub(super) fn make_key(out: Output, args: &BundleKeyArgs) -> Result<(), BundleError> {
    let mut seed = [0; KEY_BYTES];
    let source = Path::new("/dev/urandom");
    File::open(source).and_then(|mut file| file.read_exact(&mut seed)).map_err(file_error("read", source))?;
    let key = PrivateKey::from_seed(seed).map_err(|source| BundleError::Key { path: args.output.clone(), source })?;
    let written = create_private(&args.output, true).and_then(|mut file| {
        file.write_all(key.to_text().as_bytes())?;
        file.sync_all()
    });
    written.map_err(file_error("write", &args.output))?;
    let made = KeyMade { public_key: key.public(), file: args.output.display().to_string() };
    Ok(out.value(&made, |made| made.public_key.to_string())?)
}

pub(super) async fn sign(agent: &Agent, out: Output, args: BundleSignArgs) -> Result<(), BundleError> {
    let mut text = String::new();
    let read = File::open(&args.key).and_then(|file| file.take(KEY_FILE_BYTES_MAX).read_to_string(&mut text));
    read.map_err(file_error("read", &args.key))?;
    let key = PrivateKey::from_text(&text).map_err(|source| BundleError::Key { path: args.key.clone(), source })?;
    let word = args.bundle.as_str();
    let bundle: Bundle = agent.get(&format!("/v1/bundles/{word}")).await?;
    let digest = digest_of(&bundle, word).ok_or_else(|| BundleError::OtherDigest { bundle: word.to_owned() })?;
    let request = BundleSignRequest { key: key.public(), signature: key.sign_bundle(&digest) };
    let path = format!("/v1/bundles/{}/signatures", bundle.id);
    let signed: Bundle = agent.post(&path, &request, PROMPT).await?;
    let public = key.public();
    Ok(out.value(&signed, |signed| format!("{} is signed by {public}", signed.id))?)
}

/// The digest to sign: the agent's, if the id is the start of it, and the id what was asked for.
fn digest_of(bundle: &Bundle, word: &str) -> Option<[u8; DIGEST_BYTES]> {
    let digest = from_hex(&bundle.manifest_digest)?;
    let first: [u8; ID_DIGEST_BYTES] = digest[..ID_DIGEST_BYTES].try_into().ok()?;
    let is_meant = word.parse().map_or(true, |id: BundleId| id == bundle.id);
    (BundleId::from_digest(first) == bundle.id && is_meant).then_some(digest)
}

fn from_hex(text: &str) -> Option<[u8; DIGEST_BYTES]> {
    let mut bytes = [0; DIGEST_BYTES];
    let text = text.as_bytes();
    if text.len() != DIGEST_BYTES * 2 {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        let digit = |digit: u8| char::from(digit).to_digit(16);
        *byte = u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_key_is_made_once_and_for_its_owner() {
        let directory = tempfile::tempdir().unwrap();
        let args = BundleKeyArgs { output: directory.path().join("key") };
        make_key(Output::new(true), &args).unwrap();
        assert_eq!(std::fs::metadata(&args.output).unwrap().permissions().mode() & 0o777, 0o600);
        let text = std::fs::read_to_string(&args.output).unwrap();
        PrivateKey::from_text(&text).unwrap();
        let again = make_key(Output::new(true), &args);
        assert!(
            matches!(&again, Err(BundleError::File { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists)
        );
        assert_eq!(std::fs::read_to_string(&args.output).unwrap(), text);
    }

    #[test]
    fn digests_are_hexadecimal_and_files_are_written_beside() {
        assert_eq!(from_hex(&"0f".repeat(32)), Some([15; 32]));
        for wrong in [&"0f".repeat(31)[..], &"0g".repeat(32), &"+f".repeat(32), &"\u{e4}".repeat(32), ""] {
            assert_eq!(from_hex(wrong), None, "{wrong}");
        }
        assert_eq!(beside(Path::new("/a/web")), Some("/a/.web.part".into()));
        assert_eq!((beside(Path::new("/")), beside(Path::new(".."))), (None, None));
    }
}
