//! `hearth bundle fetch`, `pin` and `unpin`.

use clap::Args;

use super::value::ReferenceWord;
use crate::ids::BundleId;

const FETCH_HELP: &str = "\
SOURCE is where the bundle is:
  peer:NAME                   another host of the fabric
  /srv/bundles                a directory of this host with bundles in it, by id, such as `bundles` below a state directory
  http://store:8080/bundles   a server that has such a directory, and answers ranges

Every part is compared with the bundle's id before it is used, so the source need not be trusted. VMs can be launched
from the bundle at once: what a guest reaches is fetched first, and what it waits for too long ends its VM.

Examples:
  hearth bundle fetch b-mzxw6ytbmzxw6ytbmzxw6ytbme --from peer:two
  hearth bundle fetch b-mzxw6ytbmzxw6ytbmzxw6ytbme --from http://store:8080/bundles --wait
  hearth vm launch --bundle b-mzxw6ytbmzxw6ytbmzxw6ytbme --lazy";

/// `hearth bundle fetch`.
#[derive(Debug, Clone, Args)]
#[command(after_help = FETCH_HELP)]
pub struct BundleFetchArgs {
    /// Id of the bundle, all of it
    pub bundle: BundleId,
    /// Where it is
    #[arg(long, value_name = "SOURCE")]
    pub from: String,
    /// Wait until all of it is here
    #[arg(long)]
    pub wait: bool,
}

/// `hearth bundle pin` and `unpin`.
#[derive(Debug, Clone, Args)]
pub struct BundlePinArgs {
    /// Id of the bundle, a unique prefix of it, or its name
    pub bundle: ReferenceWord,
}
