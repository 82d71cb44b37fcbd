//! Bundles: why something was not done with one.

use axum::http::StatusCode;

use super::{ApiError, fetch, transfer};
use crate::agent::{
    BundleError, ExportError, FindBundleError, OpenBundleError, ReadBundleError, ReadPartError, RemoveError, SignError,
    UNKNOWN_BUNDLE, VerifyError,
};
use crate::report::chain;

impl From<BundleError> for ApiError {
    fn from(error: BundleError) -> Self {
        let (message, retry) = (chain(&error), error.retry());
        let listed = "`hearth bundle ls` lists the bundles of this host";
        let corrupt = (StatusCode::UNPROCESSABLE_ENTITY, "bundle_corrupt", None);
        let host = (StatusCode::INTERNAL_SERVER_ERROR, "host_failure", None);
        let full = (StatusCode::INSUFFICIENT_STORAGE, "no_space", Some("free some disk space: `hearth bundle rm`"));
        let unknown = (StatusCode::NOT_FOUND, UNKNOWN_BUNDLE, Some(listed));
        let read = |error: &ReadBundleError| match error {
            ReadBundleError::Unknown { .. } => unknown,
            ReadBundleError::Damaged { .. } => corrupt,
            ReadBundleError::File { .. } => host,
        };
        let (status, code, todo) = match &error {
            BundleError::NoRoom(error) => return error.clone().into(),
            BundleError::Untrusted { .. } => {
                let todo = "sign it with a key that is in [bundles] trusted_keys of this host's configuration (`hearth \
                            bundle sign`), or add the key of who signed it there and restart the agent";
                (StatusCode::FORBIDDEN, "bundle_untrusted", Some(todo))
            }
            BundleError::Export(ExportError::Read(error)) | BundleError::Sign(SignError::Read(error)) => read(error),
            BundleError::Export(ExportError::Write { .. }) => host,
            BundleError::Export(ExportError::Signatures(error)) | BundleError::Sign(error) => {
                transfer::signatures(error)
            }
            BundleError::ReadPart(
                ReadPartError::Read(error)
                | ReadPartError::Open(OpenBundleError::Read(error))
                | ReadPartError::Signatures(SignError::Read(error)),
            ) => read(error),
            BundleError::ReadPart(error) => transfer::part(error),
            BundleError::Import(error) => transfer::import(error),
            BundleError::Source(error) => fetch::source(error),
            BundleError::Partial(error) => fetch::partial(error),
            BundleError::Fetched(error) => fetch::noted(error),
            BundleError::Coming { .. } => {
                let todo =
                    "launch from it with --lazy (`mode`: `lazy`), or wait: `hearth bundle show` tells how far it is";
                (StatusCode::CONFLICT, "bundle_on_its_way", Some(todo))
            }
            BundleError::NotPartial { .. } => (StatusCode::CONFLICT, "bundle_not_on_its_way", Some(listed)),
            BundleError::TooManyChunks { .. } => {
                let todo = "wait until all of it is here: `hearth bundle show` tells how far it is";
                (StatusCode::CONFLICT, "too_many_chunks", Some(todo))
            }
            BundleError::TooManyTransfers { .. } => (StatusCode::SERVICE_UNAVAILABLE, "too_many_transfers", None),
            BundleError::Find(FindBundleError::Unknown { .. }) => unknown,
            BundleError::Find(FindBundleError::Ambiguous { .. }) => (StatusCode::CONFLICT, "ambiguous_id", None),
            BundleError::Read(error) => read(error),
            BundleError::Open(OpenBundleError::Read(error)) => read(error),
            BundleError::Open(OpenBundleError::NoSpace { .. }) => full,
            BundleError::Incompatible { .. } => {
                (StatusCode::CONFLICT, "incompatible_host", Some("build the bundle on a host like this one"))
            }
            BundleError::GuestDiffers(_) => {
                (StatusCode::CONFLICT, "incompatible_host", Some("hosts of a migration have to be alike"))
            }
            BundleError::Verify(VerifyError::Damaged { .. }) => corrupt,
            BundleError::Verify(VerifyError::Read(error)) => read(error),
            BundleError::Verify(VerifyError::Parent { .. }) => corrupt,
            BundleError::Remove(RemoveError::Unknown { .. }) => unknown,
            BundleError::Remove(RemoveError::HasChildren { .. }) => {
                (StatusCode::CONFLICT, "bundle_in_use", Some("remove those first, or `hearth bundle compact` them"))
            }
            BundleError::Remove(RemoveError::Exported { .. }) => {
                (StatusCode::CONFLICT, "bundle_in_use", Some("wait until it is exported, or end that"))
            }
            BundleError::InUse { .. } => {
                (StatusCode::CONFLICT, "bundle_in_use", Some("remove its VMs first: `hearth vm ls`"))
            }
            BundleError::Pooled { .. } => (StatusCode::CONFLICT, "bundle_in_use", Some("`hearth pool rm` ends them")),
            BundleError::Name { .. } => (StatusCode::BAD_REQUEST, "invalid_name", None),
            BundleError::NameTaken { .. } => (StatusCode::CONFLICT, "name_taken", Some(listed)),
            BundleError::Ledger(_) => (StatusCode::SERVICE_UNAVAILABLE, "ledger_failure", None),
            BundleError::Compact(_) => (StatusCode::CONFLICT, "not_compacted", None),
            BundleError::NoFacts => (StatusCode::SERVICE_UNAVAILABLE, "no_host_facts", None),
            BundleError::Find(FindBundleError::Store(_))
            | BundleError::Open(OpenBundleError::Compose { .. })
            | BundleError::Commit(_)
            | BundleError::NothingSaved { .. }
            | BundleError::Remove(RemoveError::Store(_) | RemoveError::File { .. })
            | BundleError::Store(_)
            | BundleError::Host { .. } => host,
        };
        let answer = Self::new(status, code, message, retry);
        match todo {
            Some(todo) => answer.with_detail(todo),
            None => answer,
        }
    }
}
