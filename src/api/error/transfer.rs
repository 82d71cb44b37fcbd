//! Bundles as files, and their signatures.

use axum::http::StatusCode;

use crate::agent::{ArchiveError, CommitError, ImportError, OpenBundleError, ReadPartError, SignError, StageError};

/// Status, code, and what to do about it.
type Answer = (StatusCode, &'static str, Option<&'static str>);

const FULL: Answer = (StatusCode::INSUFFICIENT_STORAGE, "no_space", Some("free some disk space: `hearth bundle rm`"));
const HOST: Answer = (StatusCode::INTERNAL_SERVER_ERROR, "host_failure", None);
const AGAIN: &str = "export it again, and compare the two files";

pub(super) const fn signatures(error: &SignError) -> Answer {
    match error {
        SignError::Invalid { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "bad_signature", None),
        SignError::TooMany { .. } => (StatusCode::CONFLICT, "too_many_signatures", None),
        SignError::NoSpace { .. } => FULL,
        SignError::Read(_) | SignError::Malformed { .. } | SignError::File { .. } => HOST,
    }
}

const fn bad(code: &'static str, todo: Option<&'static str>) -> Answer {
    (StatusCode::UNPROCESSABLE_ENTITY, code, todo)
}

pub(super) const fn part(error: &ReadPartError) -> Answer {
    match error {
        ReadPartError::Beyond { .. } => (StatusCode::RANGE_NOT_SATISFIABLE, "part_beyond_end", None),
        ReadPartError::NotHere { .. } => (StatusCode::NOT_FOUND, "part_not_here", None),
        ReadPartError::Open(OpenBundleError::NoSpace { .. }) => FULL,
        ReadPartError::Signatures(error) => signatures(error),
        ReadPartError::Read(_) | ReadPartError::Open(_) => HOST,
    }
}

pub(super) const fn import(error: &ImportError) -> Answer {
    match error {
        ImportError::Archive(ArchiveError::Magic) => {
            bad("import_unknown", Some("`hearth bundle export` makes such files"))
        }
        ImportError::Archive(ArchiveError::Version { .. }) => {
            bad("import_version", Some("import it with a program of the version that exported it, or a later one"))
        }
        ImportError::Archive(ArchiveError::Truncated { .. } | ArchiveError::Read { .. }) => {
            bad("import_truncated", Some("its end is missing: copy or export it again"))
        }
        ImportError::Archive(ArchiveError::Record { .. } | ArchiveError::Digest | ArchiveError::Trailing { .. }) => {
            bad("import_corrupt", Some(AGAIN))
        }
        ImportError::Manifest(_) | ImportError::Damaged { .. } | ImportError::Unrelated { .. } => {
            bad("import_corrupt", Some(AGAIN))
        }
        ImportError::Parent { .. } => bad("import_parent_missing", Some(AGAIN)),
        ImportError::Signature { .. } => bad("bad_signature", Some(AGAIN)),
        ImportError::Stage(StageError::NoSpace { .. })
        | ImportError::Commit(
            CommitError::NoSpace { .. } | CommitError::Signatures { source: SignError::NoSpace { .. }, .. },
        )
        | ImportError::NoSpace { .. } => FULL,
        ImportError::Stage(_) | ImportError::Commit(_) | ImportError::File { .. } => HOST,
    }
}
