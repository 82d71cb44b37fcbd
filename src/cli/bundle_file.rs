//! `hearth bundle export`, `import`, `key` and `sign`.

use std::path::PathBuf;

use clap::Args;

use super::value::ReferenceWord;

const EXPORT_HELP: &str = "\
The file holds the bundle's manifest, state and memory, its signatures, and the bundles it builds on; it ends with a
digest over all of it. Whoever has the file has the guest's memory: it is made readable by its owner only.

Examples:
  hearth bundle export web --output web.hearth
  hearth bundle export web | ssh other hearth bundle import";

const IMPORT_HELP: &str = "\
Nothing is there until all of the file has come and was compared with its digests; a file that ends too early leaves
nothing. A bundle that is there already is fine. Whether it may be launched is asked at each launch: [bundles]
trusted_keys in the agent's configuration.

Examples:
  hearth bundle import web.hearth
  curl -s https://example.com/web.hearth | hearth bundle import";

const KEY_HELP: &str = "\
The public key that is printed goes into the configuration of the hosts that are to launch what is signed:

  [bundles]
  trusted_keys = [\"ed25519:...\"]

The file is for nobody but those who sign. No agent ever sees it.";

const SIGN_HELP: &str = "\
The agent tells the digest, this command signs it, the agent keeps the signature beside the bundle. Name the bundle by
its whole id if the agent is not to be relied on for which one a name means: a digest that is not the id's is not signed.

Examples:
  hearth bundle key --output release.key
  hearth bundle sign web --key release.key";

/// `hearth bundle export`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXPORT_HELP)]
pub struct BundleExportArgs {
    /// Id of the bundle, a unique prefix of it, or its name
    pub bundle: ReferenceWord,
    /// File to write; `-` is standard output
    #[arg(long, short, value_name = "FILE", default_value = "-")]
    pub output: PathBuf,
}

/// `hearth bundle import`.
#[derive(Debug, Clone, Args)]
#[command(after_help = IMPORT_HELP)]
pub struct BundleImportArgs {
    /// File to read; `-` is standard input
    #[arg(value_name = "FILE", default_value = "-")]
    pub file: PathBuf,
}

/// `hearth bundle key`.
#[derive(Debug, Clone, Args)]
#[command(after_help = KEY_HELP)]
pub struct BundleKeyArgs {
    /// File for the private key; one that is there is never overwritten
    #[arg(long, short, value_name = "FILE")]
    pub output: PathBuf,
}

/// `hearth bundle sign`.
#[derive(Debug, Clone, Args)]
#[command(after_help = SIGN_HELP)]
pub struct BundleSignArgs {
    /// Id of the bundle, a unique prefix of it, or its name
    pub bundle: ReferenceWord,
    /// File with the private key, as `hearth bundle key` makes it
    #[arg(long, short, value_name = "FILE")]
    pub key: PathBuf,
}
