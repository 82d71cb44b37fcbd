//! Bundles that come from elsewhere.

use axum::http::StatusCode;

use crate::agent::{FetchedError, PartialError, SourceError};

/// Status, code, and what to do about it.
type Answer = (StatusCode, &'static str, Option<&'static str>);

const FULL: Answer = (StatusCode::INSUFFICIENT_STORAGE, "no_space", Some("free some disk space: `hearth bundle rm`"));
const HOST: Answer = (StatusCode::INTERNAL_SERVER_ERROR, "host_failure", None);

pub(super) const fn partial(error: &PartialError) -> Answer {
    match error {
        PartialError::Unknown { .. } => {
            (StatusCode::NOT_FOUND, "unknown_bundle", Some("`hearth bundle ls` lists the bundles of this host"))
        }
        PartialError::Whole { .. } => {
            (StatusCode::CONFLICT, "bundle_is_here", Some("`hearth bundle verify` looks whether it is whole"))
        }
        PartialError::Diff { .. } => {
            let todo = "where it is: `hearth bundle compact`; or export and import it";
            (StatusCode::UNPROCESSABLE_ENTITY, "bundle_builds_on_others", Some(todo))
        }
        PartialError::Manifest { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "bad_manifest", None),
        PartialError::Damaged { .. } => {
            (StatusCode::UNPROCESSABLE_ENTITY, "bundle_corrupt", Some("fetch it from somewhere else"))
        }
        PartialError::Signature { .. } | PartialError::Signatures(_) => {
            (StatusCode::UNPROCESSABLE_ENTITY, "bad_signature", None)
        }
        PartialError::From { .. } => (StatusCode::BAD_REQUEST, "invalid_source", None),
        PartialError::NoSpace { .. } => FULL,
        PartialError::Missing { .. }
        | PartialError::Commit { .. }
        | PartialError::Store(_)
        | PartialError::File { .. } => HOST,
    }
}

pub(super) const fn noted(error: &FetchedError) -> Answer {
    match error {
        FetchedError::NotFetched { .. } => (StatusCode::CONFLICT, "bundle_not_fetched", None),
        FetchedError::NoSpace { .. } => FULL,
        FetchedError::File { .. } => HOST,
    }
}

pub(super) const fn source(error: &SourceError) -> Answer {
    match error {
        SourceError::NotThere { .. } => (StatusCode::NOT_FOUND, "bundle_not_there", None),
        SourceError::UnknownPeer { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "unknown_peer", None),
        SourceError::NotStarted { .. } => (StatusCode::SERVICE_UNAVAILABLE, "not_started", None),
        SourceError::Peer { .. }
        | SourceError::Directory { .. }
        | SourceError::Store { .. }
        | SourceError::OtherPiece { .. }
        | SourceError::TooMany { .. } => {
            (StatusCode::BAD_GATEWAY, "bundle_source_failed", Some("is the bundle there, and does that host answer?"))
        }
    }
}
